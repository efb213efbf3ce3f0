"""The ModernBERT decoder: the encoder's layers, looking back only, with a cache.

Shapes: B texts, S columns of a padded grid, T real tokens of all texts together, M hidden size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from modernbert.config import ModernBertDecoderConfig
from modernbert.decoding.cache import DecoderCache
from modernbert.errors import InputError
from modernbert.models.base import BareModel, PreTrainedModel
from modernbert.models.outputs import BaseModelOutputWithPast
from modernbert.nn.backbone import check_kwargs
from modernbert.nn.inputs import PackedInputs, check_tensors
from modernbert.nn.layers import DecoderAttention


class ModernBertDecoderModel(BareModel):
    """The bare decoder, without a head.

    Args:
        config: the architecture.
        attn_implementation: see `PreTrainedModel`.

    Source: Ettin, arXiv:2507.11412.
    """

    config: ModernBertDecoderConfig
    config_class = ModernBertDecoderConfig
    attention_class = DecoderAttention

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        indices: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        batch_size: int | None = None,
        seq_len: int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Read a padded or a packed batch; each token sees those before it in its text.

        Padded input is (B, S) with `attention_mask`. Packed input is (T,) or (1, T) with `cu_seqlens`; its
        outputs are packed too, unless `indices`, `batch_size` and `seq_len` say how to pad them.

        Args:
            input_ids: (B, S), (T,) or (1, T) token ids; with `past_key_values` the new ones alone.
            attention_mask: (B, S), nonzero at real tokens; None means that all are real. With a cache it may
                also be (B, columns before + S), of which the last S count.
            position_ids: positions for the rotary embedding, of the shape of the input or (1, S); None counts
                each text's real tokens, those in the cache included. Without a mask and a filled cache, a position
                that is not one more than the one before begins another text in the same row, as collators that pack
                texts hand them over.
            past_key_values: a `DecoderCache`, which is changed in place and returned.
            inputs_embeds: (B, S, M), (T, M) or (1, T, M), in the place of `input_ids`.
            use_cache: whether to return a cache; None takes the configuration's word in evaluation mode, and no
                cache in training mode. Gradients do not reach what is in a cache.
            cache_position: (S,) columns of the input counted from the first text's beginning; checked, and
                otherwise known from the cache.
            indices, cu_seqlens, max_seqlen, batch_size, seq_len: of packed input, as of the encoder.
            output_attentions: return attention weights; needs the backend "eager" (or "auto", which takes it).
            output_hidden_states: return the embeddings and every layer's output, the last one normed.
            return_dict: False returns a plain tuple.
            kwargs: `token_type_ids` is accepted and ignored.

        Raises:
            InputError: arguments contradict each other or have the wrong shape.
        """
        check_kwargs(kwargs)
        inputs, cache = open_inputs(
            self,
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
        encoded = self.encode(inputs, output_attentions, output_hidden_states, cache)
        output = BaseModelOutputWithPast(
            last_hidden_state=inputs.restore(encoded.last_TM),
            past_key_values=cache,
            hidden_states=encoded.states or None,
            attentions=encoded.weights or None,
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


def open_inputs(
    model: ModernBertDecoderModel,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: DecoderCache | None = None,
    use_cache: bool | None = None,
    cache_position: Tensor | None = None,
    **packed: Any,
) -> tuple[PackedInputs, DecoderCache | None]:
    """The door of the decoder: packed inputs that go on where a cache ends, and the cache to fill, if any."""
    check_tensors(
        input_ids=input_ids,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        position_ids=position_ids,
        cache_position=cache_position,
    )
    if past_key_values is not None and not isinstance(past_key_values, DecoderCache):
        raise InputError(
            f"past_key_values is a {type(past_key_values).__name__}; it must be a DecoderCache, such as an earlier "
            "output's past_key_values"
        )
    cache = past_key_values
    if cache is not None:
        cache.check_model(model.config)
        if use_cache is False:
            raise InputError("use_cache is False and past_key_values is given; leave one of them out")
    if model.training and (use_cache or cache is not None):
        raise InputError("use_cache and past_key_values are for evaluation mode; call model.eval() first")
    if cache is None and (model.config.use_cache and not model.training if use_cache is None else use_cache):
        cache = DecoderCache(model.config)
    given = input_ids if input_ids is not None else inputs_embeds
    columns = given.shape[1] if given is not None and given.dim() > 1 else 0
    before = 0 if cache is None else cache.columns
    if attention_mask is not None and attention_mask.dim() == 2 and attention_mask.shape[1] == before + columns:
        attention_mask = attention_mask[:, before:]
    if cache_position is not None and packed.get("cu_seqlens") is not None:
        raise InputError("cache_position counts the columns of padded input; packed input has none")
    if cache_position is not None and cache_position.tolist() != list(range(before, before + columns)):
        raise InputError(
            f"cache_position is {cache_position.tolist()}; with {before} columns in the cache and {columns} new ones "
            f"it must be {before} to {before + columns - 1}"
        )
    if cache is not None and len(cache) and columns and position_ids is not None and attention_mask is None:
        assert given is not None
        if packed.get("cu_seqlens") is None:  # each row goes on with the cache's text, whatever its positions
            attention_mask = torch.ones(given.shape[:2], device=given.device)
    inputs = model.pack_inputs(
        input_ids,
        inputs_embeds,
        attention_mask=attention_mask,
        position_ids=position_ids,
        gaps_separate=True,
        **packed,
    )
    if cache is not None and len(cache) and position_ids is None:
        if len(cache) != len(inputs.packing.lengths):
            raise InputError(f"the input has {len(inputs.packing.lengths)} texts; past_key_values holds {len(cache)}")
        ends_B = torch.tensor(cache.ends, device=inputs.positions_T.device)
        inputs = dataclasses.replace(inputs, positions_T=inputs.positions_T + ends_B[inputs.packing.text_T])
    return inputs, cache


class DecoderWithHead(PreTrainedModel):
    """Base of the models with a decoder in `model`.

    Args:
        config: the architecture.
        attn_implementation: see `PreTrainedModel`.
    """

    config: ModernBertDecoderConfig
    config_class = ModernBertDecoderConfig

    def __init__(self, config: ModernBertDecoderConfig, attn_implementation: str | None = "auto") -> None:
        super().__init__(config, attn_implementation)
        self.model = ModernBertDecoderModel(config, attn_implementation)
