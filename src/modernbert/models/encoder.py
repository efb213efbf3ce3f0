"""The ModernBERT encoder: packed rows in, packed rows out, the caller's shape at the door.

Shapes: B texts, S columns of a padded grid, T real tokens of all texts together, M hidden size.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modernbert.config import ModernBertConfig
from modernbert.errors import InputError
from modernbert.models.base import PreTrainedModel
from modernbert.models.inputs import PackedInputs, pack_inputs
from modernbert.models.layers import Embeddings, Layer, LayerContext, layer_norm
from modernbert.models.outputs import BaseModelOutput
from modernbert.ops.attention.eager import EagerAttention
from modernbert.ops.rope import rope_tables

logger = logging.getLogger(__name__)

# What callers hand over out of habit, and what means nothing to this architecture.
_IGNORED = {"token_type_ids"}


class ModernBertModel(PreTrainedModel):
    """The bare encoder, without a head.

    Args:
        config: the architecture.
        attn_implementation: "auto", "eager" or "sdpa".

    Source: ModernBERT, arXiv:2412.13663.
    """

    def __init__(self, config: ModernBertConfig, attn_implementation: str | None = "auto") -> None:
        super().__init__(config, attn_implementation)
        self.backend = self.make_backend()
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList([Layer(config, i) for i in range(config.num_hidden_layers)])
        self.final_norm = layer_norm(config)
        self._finish()

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
            position_ids: positions for the rotary embedding, of the shape of the input or (1, S).
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
        output = self.encode(inputs, output_attentions, output_hidden_states)
        x_TM = output.last_hidden_state
        assert x_TM is not None
        output.last_hidden_state = inputs.restore(x_TM)
        output.hidden_states = restore_all(inputs, output.hidden_states)
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    @property
    def pack_inputs(self) -> functools.partial[PackedInputs]:
        """`models.inputs.pack_inputs` for this model's vocabulary and width."""
        return functools.partial(pack_inputs, vocab_size=self.config.vocab_size, hidden_size=self.config.hidden_size)

    def encode(
        self,
        inputs: PackedInputs,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutput:
        """Packed inputs to a packed last hidden state and hidden states (T, M), and padded attentions."""
        config = self.config
        want_weights = config.output_attentions if output_attentions is None else output_attentions
        want_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        x_TM = self.embeddings(inputs.ids_T, inputs.embeds_TM)
        shared = self._shared(inputs, x_TM, want_weights)
        states = [x_TM]
        weights: list[Any] | None = [] if want_weights else None
        for layer in self.layers:
            assert isinstance(layer, Layer)
            context = shared[layer.kind]
            if self.is_gradient_checkpointing and self.training and torch.is_grad_enabled():
                x_TM = checkpoint(layer, x_TM, context, weights, use_reentrant=False)
            else:
                x_TM = layer(x_TM, context, weights)
            states.append(x_TM)
        x_TM = self.final_norm(x_TM)
        states[-1] = x_TM
        return BaseModelOutput(
            last_hidden_state=x_TM,
            hidden_states=tuple(states) if want_states else None,
            attentions=None
            if weights is None
            else tuple(EagerAttention.pad_weights(w, inputs.packing) for w in weights),
        )

    def _shared(self, inputs: PackedInputs, x_TM: Tensor, want_weights: bool) -> dict[str, LayerContext]:
        """Masks and rotary tables, once for each kind of layer."""
        config, packing = self.config, inputs.packing
        backend = self.backend
        if want_weights and not isinstance(backend, EagerAttention):
            if self.attn_implementation != "auto":
                raise InputError(
                    f"output_attentions needs attention weights, which attn_implementation "
                    f"{self.attn_implementation!r} never makes; load the model with 'eager' or 'auto'"
                )
            logger.info("attention backend: eager for this call, which wants attention weights")
            backend = EagerAttention()
        autocast = torch.is_autocast_enabled(x_TM.device.type)
        dtype = torch.get_autocast_dtype(x_TM.device.type) if autocast else x_TM.dtype
        shared = {}
        for kind in dict.fromkeys(config.layer_types or ()):
            assert config.rope_parameters is not None
            cos_T1F, sin_T1F = rope_tables(
                config.rope_parameters[kind],
                config.head_dim,
                inputs.positions_T,
                max_positions=config.max_position_embeddings,
                text_T=packing.text_T,
            )
            shared[kind] = LayerContext(backend, backend.plan(packing, config.reach(kind), dtype), cos_T1F, sin_T1F)
        return shared


def check_kwargs(kwargs: dict[str, Any]) -> None:
    """Refuse forward arguments that are neither served nor known to mean nothing here."""
    unknown = sorted(set(kwargs) - _IGNORED)
    if unknown:
        raise TypeError(f"forward got unknown arguments: {', '.join(unknown)}")


def restore_all(inputs: PackedInputs, states: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
    """Every hidden state in the caller's shape."""
    return None if states is None else tuple(inputs.restore(x) for x in states)
