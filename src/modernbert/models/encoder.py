"""The ModernBERT encoder: packed rows in, packed rows out, the caller's shape at the door.

Shapes: B texts, S columns of a padded grid, T real tokens of all texts together, M hidden size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from modernbert.config import ModernBertConfig
from modernbert.models.base import BareModel
from modernbert.models.outputs import BaseModelOutput
from modernbert.nn.backbone import check_kwargs
from modernbert.nn.layers import EncoderAttention


class ModernBertModel(BareModel):
    """The bare encoder, without a head.

    Args:
        config: the architecture.
        attn_implementation: see `PreTrainedModel`.

    Source: ModernBERT, arXiv:2412.13663.
    """

    config: ModernBertConfig
    config_class = ModernBertConfig
    attention_class = EncoderAttention

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        sliding_window_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        indices: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        batch_size: int | None = None,
        seq_len: int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Encode a padded or a packed batch.

        Padded input is (B, S) with `attention_mask`. Packed input is (T,) or (1, T) with `cu_seqlens`; its
        outputs are packed too, unless `indices`, `batch_size` and `seq_len` say how to pad them.

        Args:
            input_ids: (B, S), (T,) or (1, T) token ids.
            attention_mask: (B, S), nonzero at real tokens; None means that all are real.
            sliding_window_mask: (B, S) or (B, 1, S, S). Local windows follow from the positions, so it is
                checked for its shape and changes nothing.
            position_ids: positions for the rotary embedding, of the shape of the input or (1, S). Without a mask,
                a position that is not above the one before begins another text in the same row, as collators that
                pack texts hand them over; outputs keep the input's shape.
            inputs_embeds: (B, S, M), (T, M) or (1, T, M), in the place of `input_ids`.
            indices: (T,) the place of each packed token in the flattened grid.
            cu_seqlens: (B + 1,) cumulative lengths of packed texts, from 0 to T.
            max_seqlen: longest text of a packed batch, checked against `cu_seqlens`.
            batch_size, seq_len: B and S of the grid that packed outputs are padded to.
            output_attentions: return attention weights; needs the backend "eager" (or "auto", which takes it).
            output_hidden_states: return the embeddings and every layer's output, the last one normed.
            return_dict: False returns a plain tuple.
            kwargs: `token_type_ids` is accepted and ignored.

        Raises:
            InputError: arguments contradict each other or have the wrong shape.
        """
        check_kwargs(kwargs)
        config = self.config
        inputs = self.pack_inputs(
            input_ids,
            inputs_embeds,
            attention_mask=attention_mask,
            sliding_window_mask=sliding_window_mask,
            position_ids=position_ids,
            indices=indices,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            batch_size=batch_size,
            seq_len=seq_len,
        )
        hidden = self.encode(inputs, output_attentions, output_hidden_states)
        output = BaseModelOutput(inputs.restore(hidden.last_TM), hidden.states or None, hidden.weights or None)
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()
