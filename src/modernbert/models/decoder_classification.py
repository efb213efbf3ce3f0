"""Classification and regression of whole texts on the decoder.

Shapes: B texts, S columns, T real tokens of all texts together, M hidden size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from modernbert.config import ModernBertDecoderConfig
from modernbert.decoding.cache import DecoderCache
from modernbert.models.decoder import DecoderWithHead, open_inputs
from modernbert.models.outputs import SequenceClassifierOutputWithPast
from modernbert.models.sequence_classification import check_text_labels, problem_of, text_loss
from modernbert.nn.backbone import check_kwargs
from modernbert.nn.inputs import PackedInputs
from modernbert.nn.layers import Linear, PredictionHead
from modernbert.nn.pooling import pool


class ModernBertDecoderForSequenceClassification(DecoderWithHead):
    """The decoder with a classifier of whole texts, by one of their last tokens.

    That is the last token of the text that is not `pad_token_id`, padded or packed, with a mask or without. A text that
    ends with the padding id, as texts do where the same id ends them, is therefore read at the token before. Where the
    configuration has no padding id, or `inputs_embeds` are given instead of ids, it is the last real token. The loss is
    that of `ModernBertForSequenceClassification`. The classifier has a bias where `classifier_bias` says so.

    Args:
        config: the architecture.
        attn_implementation: see `PreTrainedModel`.

    Source: Ettin, arXiv:2507.11412, and the reference's head.
    """

    def __init__(self, config: ModernBertDecoderConfig, attn_implementation: str | None = "auto") -> None:
        super().__init__(config, attn_implementation)
        self.head = PredictionHead(config)
        assert config.num_labels is not None
        self.drop = nn.Dropout(config.classifier_dropout)
        self.classifier = Linear(config.hidden_size, config.num_labels, bias=config.classifier_bias)
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
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """Score each text.

        Arguments not listed are those of `ModernBertDecoderModel.forward`.

        Args:
            labels: (B,) class numbers or values, or (B, `num_labels`).
            num_items_in_batch: labels of the whole batch when this call sees a part of it; the loss is then the
                sum over the labels divided by this.

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
        texts = len(inputs.packing.lengths)
        problem = "" if labels is None else problem_of(self.config, labels)
        if labels is not None:
            assert self.config.num_labels is not None
            labels = check_text_labels(labels, texts, problem, self.config.num_labels)
        encoded = self.model.encode(inputs, output_attentions, output_hidden_states, cache)
        x_TM = encoded.last_TM
        logits = self.classify(pool(x_TM, self._spans(inputs), "last"))
        output = SequenceClassifierOutputWithPast(
            loss=None if labels is None else text_loss(logits, labels, problem, num_items_in_batch),
            logits=logits,
            past_key_values=cache,
            hidden_states=encoded.states or None,
            attentions=encoded.weights or None,
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def classify(self, x: Tensor) -> Tensor:
        """Scores of rows (N, M): (N, labels)."""
        return self.classifier(self.drop(self.head(x)))

    def _spans(self, inputs: PackedInputs) -> list[tuple[int, int]]:
        """The rows of each text up to its last token that is not the padding id."""
        pad, ids_T = self.config.pad_token_id, inputs.ids_T
        spans = inputs.packing.spans
        if pad is None or ids_T is None or not bool((ids_T == pad).any()):
            return spans
        is_pad = (ids_T == pad).tolist()

        def end_of(start: int, end: int) -> int:
            kept = next((row for row in range(end - 1, start - 1, -1) if not is_pad[row]), start)
            return min(kept + 1, end)  # a text of padding ids alone keeps its first token, an empty one has none

        return [(start, end_of(start, end)) for start, end in spans]
