"""Classification and regression of whole texts on the encoder.

Shapes: B texts, T real tokens of all texts together, M hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modernbert.config import Config
from modernbert.errors import InputError
from modernbert.models.heads import EncoderClassifier, check_classes
from modernbert.models.outputs import SequenceClassifierOutput
from modernbert.nn.inputs import PackedInputs, check_tensors
from modernbert.nn.losses import binary_cross_entropy, cross_entropy, mean_squared_error


class ModernBertForSequenceClassification(EncoderClassifier):
    """The encoder with a classifier of whole texts.

    A text is pooled as `classifier_pooling` says, its first real token or the mean of its real tokens, and logits are
    (B, `num_labels`). The loss follows `problem_type`, or where that is silent the labels: one label is regression
    (squared error), whole numbers are one class a text (cross-entropy, -100 ignored), anything else is several classes
    a text (binary cross-entropy). Labels are (B,) class numbers or values, or (B, `num_labels`).

    Args:
        config: the architecture.
        attn_implementation: see `PreTrainedModel`.

    Source: ModernBERT, arXiv:2412.13663, and the reference's head.
    """

    def pack_labels(self, inputs: PackedInputs, labels: Tensor) -> Tensor:
        """Labels (B,) or (B, labels), checked."""
        texts = len(inputs.packing.lengths)
        return check_text_labels(labels, texts, problem_of(self.config, labels), self.scores_per_row())

    def apply_head(
        self, x_TM: Tensor, inputs: PackedInputs, labels: Tensor | None, num_items: Tensor | float | None
    ) -> SequenceClassifierOutput:
        """Scores of each text."""
        logits = self.classify_texts(x_TM, inputs)
        loss = None
        if labels is not None:
            loss = text_loss(logits, labels, problem_of(self.config, labels), num_items)
        return SequenceClassifierOutput(loss, logits)


def problem_of(config: Config, labels: Tensor) -> str:
    """The kind of problem that labels pose: what the configuration says, or what they look like."""
    check_tensors(labels=labels)
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    whole = not labels.is_floating_point() and labels.dtype != torch.bool
    return "single_label_classification" if whole else "multi_label_classification"


def check_text_labels(labels: Tensor, texts: int, problem: str, classes: int) -> Tensor:
    """Labels of texts in the shape that `text_loss` takes.

    Raises:
        InputError: the shape does not fit the problem, or a class does not exist.
    """
    shape = tuple(labels.shape)
    one_each = problem == "single_label_classification" or (problem == "regression" and classes == 1)
    allowed: tuple[tuple[int, ...], ...] = ((texts,), (texts, 1)) if one_each else ((texts, classes),)
    if shape not in allowed:
        raise InputError(
            f"labels has shape {shape}; {problem} of {texts} texts with {classes} labels takes "
            f"{' or '.join(map(str, allowed))}"
        )
    if problem == "single_label_classification":
        return check_classes(labels.flatten(), classes)
    return labels.reshape(texts, classes)


def text_loss(logits_BV: Tensor, labels: Tensor, problem: str, num_items: Tensor | float | None) -> Tensor:
    """The loss of a problem, a scalar."""
    if problem == "single_label_classification":
        return cross_entropy(logits_BV, labels, num_items=num_items)
    if problem == "regression":
        return mean_squared_error(logits_BV, labels, num_items=num_items)
    return binary_cross_entropy(logits_BV, labels, num_items=num_items)
