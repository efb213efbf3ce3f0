"""The ModernBERT decoder and its heads: the encoder's layers, looking back only, with a cache.

Shapes: B texts, S columns of a padded grid, T real tokens of all texts together, M hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modernbert.config import ModernBertDecoderConfig
from modernbert.decoding.cache import DecoderCache
from modernbert.decoding.exchange import read_cache
from modernbert.decoding.generate import GenerationMixin
from modernbert.errors import InputError
from modernbert.models.base import BareModel, PreTrainedModel
from modernbert.models.forward import DECODER, PACKED, Arguments, Model, forward_of
from modernbert.models.outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from modernbert.nn.layers import DecoderAttention, Linear, PredictionHead
from modernbert.nn.losses import IGNORED, cross_entropy, pack_text_labels, pack_token_labels, text_loss
from modernbert.nn.outputs import ModelOutput
from modernbert.nn.packing import PackedInputs
from modernbert.nn.pooling import pool


class ModernBertDecoderPreTrainedModel(PreTrainedModel):
    """Base of all decoders, for heads of one's own as well; arguments are those of `PreTrainedModel`."""

    config: ModernBertDecoderConfig
    config_class = ModernBertDecoderConfig


class Decoder(Model, ModernBertDecoderPreTrainedModel):
    """What all decoders share: the cache."""

    def open(self, given: Arguments) -> tuple[PackedInputs, DecoderCache | None]:
        """Packed inputs that continue a cache, and the cache to fill, if any."""
        cache, use_cache, body = given.past_key_values, given.use_cache, self.base_model
        handed: Any = cache
        if cache is not None and not isinstance(handed, DecoderCache):
            cache = read_cache(handed, body.config, given.attention_mask)
        if cache is not None:
            cache.check_model(body.config)
            if use_cache is False:
                raise InputError("use_cache is False and past_key_values is given; leave one of them out")
        if body.training and (use_cache or cache is not None):
            raise InputError("use_cache and past_key_values are for evaluation mode; call model.eval() first")
        if cache is None and (body.config.use_cache and not body.training if use_cache is None else use_cache):
            cache = DecoderCache(body.config)
        columns, ends = (0, ()) if cache is None else (cache.columns, cache.ends)
        return body.pack_inputs(given, gaps_separate=True, columns=columns, ends=ends), cache


class ModernBertDecoderModel(Decoder, BareModel):
    """The bare decoder, without a head.

    Arguments are those of `PreTrainedModel`. Source: Ettin, arXiv:2507.11412.
    """

    config: ModernBertDecoderConfig
    attention_class = DecoderAttention

    forward = forward_of(
        """Read a padded or a packed batch; each token sees those before it in its text.

        Padded input is (B, S) with `attention_mask`. Packed input is (T,) or (1, T) with `cu_seqlens`; its outputs are
        packed too, unless `indices`, `batch_size` and `seq_len` say how to pad them.""",
        (*DECODER, "use_cache", "cache_position", *PACKED),
    )

    def apply_head(self, x_TM: Tensor, inputs: PackedInputs, labels: None, given: Arguments) -> ModelOutput:
        return BaseModelOutputWithPast(inputs.restore(x_TM))


class DecoderWithHead(Decoder):
    """Base of the models with a decoder in `model`."""

    def __init__(self, config: ModernBertDecoderConfig, attn_implementation: str | None = "auto") -> None:
        super().__init__(config, attn_implementation)
        self.model = ModernBertDecoderModel(config, attn_implementation)


class ModernBertDecoderForCausalLM(GenerationMixin, DecoderWithHead):
    """The decoder with an output over the vocabulary, whose weight is the token embedding's.

    Labels are the ids themselves, or -100, in the shape of the input, and are shifted inside: the score at a token is
    for the next one of its text. `shift_labels` are shifted already, and win. -100 does not count, nor does padding.
    Logits are (B, S, V), zeros at padding, or (T, V) for packed input; as many columns or tokens as `logits_to_keep`
    asks for.

    Arguments are those of `PreTrainedModel`. Source: Ettin, arXiv:2507.11412.
    """

    loss_type: ClassVar[str] = "ForCausalLM"  # trainers then count labels without the first of each text
    tied_weights: ClassVar[Mapping[str, str]] = {"decoder.weight": "model.embeddings.tok_embeddings.weight"}

    def __init__(self, config: ModernBertDecoderConfig, attn_implementation: str | None = "auto") -> None:
        super().__init__(config, attn_implementation)
        self.generation_config = None
        self.lm_head = PredictionHead(config)
        self.decoder = Linear(config.hidden_size, config.vocab_size, bias=config.decoder_bias)
        self._finish()

    forward = forward_of(
        "Score the next token at every token.",
        (*DECODER, "labels", "use_cache", "cache_position", "logits_to_keep", *PACKED, "num_items_in_batch"),
        unshown=("shift_labels",),
    )

    def pack_labels(self, inputs: PackedInputs, given: Arguments) -> Tensor | None:
        """What each token should predict, (T,): the next one's label; -100 at each text's last token."""
        shifted = given.shift_labels
        labels = given.labels if shifted is None else shifted
        if labels is not None and not _keeps_all(given.logits_to_keep):
            raise InputError("labels need the logits of every token; leave logits_to_keep out")
        labels_T = pack_token_labels(labels, inputs, self.config.vocab_size)
        if labels_T is None or shifted is not None:
            return labels_T
        following_T = labels_T.roll(-1)
        ends = [end - 1 for start, end in inputs.packing.spans if end > start]
        following_T[torch.tensor(ends, dtype=torch.int64, device=labels_T.device)] = IGNORED
        return following_T

    def apply_head(self, x_TM: Tensor, inputs: PackedInputs, labels: Tensor | None, given: Arguments) -> ModelOutput:
        if _keeps_all(given.logits_to_keep):
            logits = self.score(x_TM)
            loss = None if labels is None else cross_entropy(logits, labels, num_items=given.num_items_in_batch)
            return CausalLMOutputWithPast(loss, inputs.restore(logits))
        tokens, kept_BK = _kept(inputs, given.logits_to_keep)
        logits = self.score(x_TM.index_select(0, tokens))
        if kept_BK is not None:
            grid = logits.new_zeros((*kept_BK.shape, logits.shape[1]))
            logits = grid.masked_scatter(kept_BK[:, :, None], logits)
        return CausalLMOutputWithPast(None, logits)

    @property
    def loss_function(self) -> Callable[..., Tensor]:
        """See `Model`."""
        return self._shifted_loss

    def _shifted_loss(
        self, logits: Tensor, labels: Tensor, *, shift_labels: Tensor | None = None, **others: Any
    ) -> Tensor:
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORED)
        return self._token_loss(logits, shift_labels, **others)

    def score(self, x: Tensor) -> Tensor:
        """Scores of the whole vocabulary for the next token: (N, M) to (N, V)."""
        return self.decoder(self.lm_head(x))


class ModernBertDecoderForSequenceClassification(DecoderWithHead):
    """The decoder with a classifier of whole texts, by one of their last tokens.

    That is the last token of the text that is not `pad_token_id`, padded or packed, with a mask or without. A text that
    ends with the padding id, as texts do where the same id ends them, is therefore read at the token before. If the
    configuration has no padding id, or `inputs_embeds` are given instead of ids, it is the last real token. Labels and
    loss are those of `ModernBertForSequenceClassification`. The classifier has a bias if `classifier_bias` says so.

    Arguments are those of `PreTrainedModel`. Source: Ettin, arXiv:2507.11412, and the reference's head.
    """

    def __init__(self, config: ModernBertDecoderConfig, attn_implementation: str | None = "auto") -> None:
        super().__init__(config, attn_implementation)
        self.head = PredictionHead(config)
        assert config.num_labels is not None
        self.drop = nn.Dropout(config.classifier_dropout)
        self.classifier = Linear(config.hidden_size, config.num_labels, bias=config.classifier_bias)
        self._finish()

    forward = forward_of(
        "Score each text.", (*DECODER, "labels", "use_cache", "cache_position", *PACKED, "num_items_in_batch")
    )

    def pack_labels(self, inputs: PackedInputs, given: Arguments) -> Tensor | None:
        return pack_text_labels(given.labels, inputs, self.config)

    def apply_head(self, x_TM: Tensor, inputs: PackedInputs, labels: Tensor | None, given: Arguments) -> ModelOutput:
        logits = self.classify(pool(x_TM, self._spans(inputs), "last"))
        loss = text_loss(logits, labels, self.config, given.num_items_in_batch)
        return SequenceClassifierOutputWithPast(loss, logits)

    @property
    def loss_function(self) -> Callable[..., Tensor]:
        """See `Model`."""
        return self._text_loss

    def classify(self, x: Tensor) -> Tensor:
        """Scores of pooled texts: (N, M) to (N, labels)."""
        return self.classifier(self.drop(self.head(x)))

    def _spans(self, inputs: PackedInputs) -> list[tuple[int, int]]:
        """The tokens of each text up to its last one that is not the padding id."""
        pad, ids_T, spans = self.config.pad_token_id, inputs.ids_T, inputs.packing.spans
        if pad is None or ids_T is None or not bool((ids_T == pad).any()):
            return spans
        is_pad = (ids_T == pad).tolist()
        found = []
        for start, end in spans:
            last = next((i for i in range(end - 1, start - 1, -1) if not is_pad[i]), start)
            found.append((start, min(last + 1, end)))  # padding ids alone: the first token; an empty text: none
        return found


def _kept(inputs: PackedInputs, wanted: int | Tensor) -> tuple[Tensor, Tensor | None]:
    """Tokens to score, and which places of the kept columns (B, K) hold them; None for packed input."""
    packing = inputs.packing
    if isinstance(wanted, Tensor):
        size = packing.tokens if packing.grid is None else packing.grid[1]
        whole = not wanted.is_floating_point() and wanted.dtype != torch.bool and wanted.dim() == 1
        if not whole or bool(((wanted < -size) | (wanted >= size)).any()):
            raise InputError(f"logits_to_keep is {wanted.tolist()}; it must be (K,) whole numbers below {size}")
    elif not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 0:
        raise InputError(f"logits_to_keep is {wanted!r}; it must be a whole number of at least 0, or a tensor of them")
    every = torch.arange(packing.tokens, device=packing.positions_T.device)
    if packing.grid is not None:
        token_BS = packing.repad(every, -1)
        token_BK = token_BS[:, -wanted:] if isinstance(wanted, int) else token_BS[:, wanted.to(every.device)]
        return token_BK[token_BK >= 0], token_BK >= 0
    if isinstance(wanted, int):
        return torch.cat([every[:0], *(every[max(start, end - wanted) : end] for start, end in packing.spans)]), None
    return every[wanted.to(every.device)], None


def _keeps_all(wanted: int | Tensor) -> bool:
    return isinstance(wanted, int) and wanted == 0
