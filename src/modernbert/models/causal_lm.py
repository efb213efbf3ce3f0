"""Causal language modelling on the decoder.

Shapes: B texts, S columns, T real tokens of all texts together, M hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from modernbert.config import ModernBertDecoderConfig
from modernbert.decoding.cache import DecoderCache
from modernbert.decoding.generate import GenerationMixin
from modernbert.errors import InputError
from modernbert.models.decoder import DecoderWithHead, open_inputs
from modernbert.models.heads import check_classes
from modernbert.models.outputs import CausalLMOutputWithPast
from modernbert.nn.backbone import check_kwargs
from modernbert.nn.inputs import PackedInputs
from modernbert.nn.layers import Linear, PredictionHead
from modernbert.nn.losses import IGNORED, cross_entropy


class ModernBertDecoderForCausalLM(GenerationMixin, DecoderWithHead):
    """The decoder with an output over the vocabulary, whose weight is the token embedding's.

    Labels have the shape of the input and are shifted inside: the score at a token is for the next one of its text.
    -100 does not count, nor does padding.

    Args:
        config: the architecture.
        attn_implementation: see `PreTrainedModel`.

    Source: Ettin, arXiv:2507.11412.
    """

    tied_weights: ClassVar[Mapping[str, str]] = {"decoder.weight": "model.embeddings.tok_embeddings.weight"}

    def __init__(self, config: ModernBertDecoderConfig, attn_implementation: str | None = "auto") -> None:
        super().__init__(config, attn_implementation)
        self.generation_config: dict[str, Any] = {}
        self.lm_head = PredictionHead(config)
        self.decoder = Linear(config.hidden_size, config.vocab_size, bias=config.decoder_bias)
        self._finish()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        indices: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        batch_size: int | None = None,
        seq_len: int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | float | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Score the next token at every token.

        Arguments not listed are those of `ModernBertDecoderModel.forward`.

        Args:
            labels: the ids themselves, or -100, in the shape of the input.
            logits_to_keep: score the last so many columns only, or the columns of this tensor; 0 scores all.
                Of packed input, the last so many tokens of each text, or the tokens of these numbers.
            num_items_in_batch: labels of the whole batch when this call sees a part of it; the loss is then the
                sum over the labels divided by this.

        Returns:
            Logits (B, S, V), zeros at padding; (T, V) for packed input; as many columns or rows as were asked for.

        Raises:
            InputError: arguments contradict each other or have the wrong shape.
        """
        check_kwargs(kwargs)
        inputs, cache = open_inputs(
            self.model,
            input_ids,
            inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            cache_position=cache_position,
            indices=indices,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            batch_size=batch_size,
            seq_len=seq_len,
        )
        all_kept = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if labels is not None and not all_kept:
            raise InputError("labels need the logits of every token; leave logits_to_keep out")
        labels_T = None
        if labels is not None:
            labels_T = next_tokens(inputs, check_classes(inputs.pack("labels", labels), self.config.vocab_size))
        encoded = self.model.encode(inputs, output_attentions, output_hidden_states, cache)
        x_TM = encoded.last_TM
        loss = None
        if all_kept:
            logits = self.score(x_TM)
            if labels_T is not None:
                loss = cross_entropy(logits, labels_T, num_items=num_items_in_batch)
            logits = inputs.restore(logits)
        else:
            rows, shape, places = _kept(inputs, logits_to_keep)
            logits = self.score(x_TM.index_select(0, rows))
            if shape is not None:
                grid = logits.new_zeros((shape[0] * shape[1], logits.shape[1]))
                logits = grid.index_copy(0, places, logits).unflatten(0, shape)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache,
            hidden_states=encoded.states or None,
            attentions=encoded.weights or None,
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def score(self, x: Tensor) -> Tensor:
        """Scores of the whole vocabulary for what follows rows: (N, M) to (N, V)."""
        return self.decoder(self.lm_head(x))


def next_tokens(inputs: PackedInputs, labels_T: Tensor) -> Tensor:
    """What each token should predict, (T,): the label of the next token of its text; -100 at each text's last one."""
    following_T = labels_T.roll(-1)
    ends = [end - 1 for start, end in inputs.packing.spans if end > start]
    following_T[torch.tensor(ends, dtype=torch.int64, device=labels_T.device)] = IGNORED
    return following_T


def _kept(inputs: PackedInputs, wanted: int | Tensor) -> tuple[Tensor, tuple[int, int] | None, Tensor]:
    """Rows to score, the grid that their scores go into (None leaves them packed), and their places in it."""
    packing = inputs.packing
    if isinstance(wanted, Tensor):
        size = packing.tokens if packing.grid is None else packing.grid[1]
        whole = not wanted.is_floating_point() and wanted.dtype != torch.bool and wanted.dim() == 1
        if not whole or bool(((wanted < -size) | (wanted >= size)).any()):
            raise InputError(f"logits_to_keep is {wanted.tolist()}; it must be (K,) whole numbers below {size}")
    elif not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 0:
        raise InputError(f"logits_to_keep is {wanted!r}; it must be a whole number of at least 0, or a tensor of them")
    device = packing.positions_T.device
    none = torch.empty(0, dtype=torch.int64, device=device)
    if packing.grid is None or packing.indices_T is None:
        if isinstance(wanted, int):
            parts = [torch.arange(max(start, end - wanted), end, device=device) for start, end in packing.spans]
            return torch.cat([none, *parts]), None, none
        return torch.arange(packing.tokens, device=device)[wanted], None, none
    batch, columns = packing.grid
    every = torch.arange(columns, device=device)
    column_K = every[-wanted:] if isinstance(wanted, int) else every[wanted.to(device)]
    row_BS = torch.full((batch * columns,), -1, device=device)
    row_BS[packing.indices_T] = torch.arange(packing.tokens, device=device)
    row_N = row_BS.unflatten(0, packing.grid)[:, column_K].flatten()
    places = (row_N >= 0).nonzero().squeeze(1)
    return row_N[places], (batch, len(column_K)), places
