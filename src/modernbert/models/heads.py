"""What the encoder's heads share: one forward pass from the caller's batch to the head and back.

A head is a class in a file of its own: a constructor, what its labels are, and `apply_head`.

Shapes: B texts, S columns, T real tokens of all texts together, M hidden size.
"""

from __future__ import annotations

import abc
from typing import Any

from torch import Tensor, nn

from modernbert.config import ModernBertConfig
from modernbert.errors import InputError
from modernbert.models.base import PreTrainedModel
from modernbert.models.encoder import ModernBertModel
from modernbert.nn.backbone import check_kwargs
from modernbert.nn.inputs import PackedInputs
from modernbert.nn.layers import Linear, PredictionHead
from modernbert.nn.losses import IGNORED
from modernbert.nn.pooling import pool


class EncoderWithHead(PreTrainedModel, abc.ABC):
    """The encoder with a prediction head on top.

    Args:
        config: the architecture.
        attn_implementation: see `PreTrainedModel`.
    """

    config: ModernBertConfig
    config_class = ModernBertConfig

    def __init__(self, config: ModernBertConfig, attn_implementation: str | None = "auto") -> None:
        super().__init__(config, attn_implementation)
        self.model = ModernBertModel(config, attn_implementation)
        self.head = PredictionHead(config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        sliding_window_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
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
    ) -> Any:
        """Encode a batch and apply the head; the class says what comes out.

        Arguments not listed are those of `ModernBertModel.forward`.

        Args:
            labels: what the head should have said, in the form that the class describes; the output then has a
                loss.
            num_items_in_batch: labels of the whole batch when this call sees a part of it; the loss is then the
                sum over the labels divided by this.

        Raises:
            InputError: arguments contradict each other or have the wrong shape.
        """
        check_kwargs(kwargs)
        inputs = self.model.pack_inputs(
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
        packed_labels = None if labels is None else self.pack_labels(inputs, labels)
        encoded = self.model.encode(inputs, output_attentions, output_hidden_states)
        output = self.apply_head(encoded.last_TM, inputs, packed_labels, num_items_in_batch)
        output.hidden_states = encoded.states or None
        output.attentions = encoded.weights or None
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def pack_labels(self, inputs: PackedInputs, labels: Any) -> Any:
        """Check the caller's labels and bring them into the form that `apply_head` takes: here one a real token."""
        return inputs.pack("labels", labels)

    @abc.abstractmethod
    def apply_head(self, x_TM: Tensor, inputs: PackedInputs, labels: Any, num_items: Tensor | float | None) -> Any:
        """The output of packed hidden states (T, M), with a loss where there are labels."""


class EncoderClassifier(EncoderWithHead):
    """The encoder with a prediction head, dropout and a linear classifier.

    `classifier_bias` is the head's; the classifier itself always has a bias, as checkpoints hold it.

    Args:
        config: the architecture.
        attn_implementation: see `PreTrainedModel`.
    """

    def __init__(self, config: ModernBertConfig, attn_implementation: str | None = "auto") -> None:
        super().__init__(config, attn_implementation)
        self.drop = nn.Dropout(config.classifier_dropout)
        self.classifier = Linear(config.hidden_size, self.scores_per_row())
        self._finish()

    def scores_per_row(self) -> int:
        """How many scores the classifier gives; the configuration's number of labels."""
        assert self.config.num_labels is not None
        return self.config.num_labels

    def classify(self, x: Tensor) -> Tensor:
        """Scores of rows (N, M): (N, labels)."""
        return self.classifier(self.drop(self.head(x)))

    def classify_texts(self, x_TM: Tensor, inputs: PackedInputs) -> Tensor:
        """Scores of texts, pooled as `classifier_pooling` says: (T, M) to (B, labels)."""
        return self.classify(pool(x_TM, inputs.packing.spans, self.config.classifier_pooling))


def check_classes(labels: Tensor, classes: int, ignored: int = IGNORED) -> Tensor:
    """Labels that are class numbers, as int64.

    Raises:
        InputError: a label is no class and not `ignored`.
    """
    if labels.is_floating_point() or labels.dtype.is_complex:
        raise InputError(f"labels has dtype {labels.dtype}; the numbers of classes are whole numbers")
    labels = labels.long()
    wrong = labels[(labels != ignored) & ((labels < 0) | (labels >= classes))]
    if wrong.numel():
        raise InputError(f"labels holds {int(wrong[0])}; it must hold 0 to {classes - 1}, or {ignored}")
    return labels
