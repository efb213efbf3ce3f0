"""Labels of tokens and of texts: checked, packed, and compared with logits.

Shapes: B texts, T real tokens of all texts together, V classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modernbert.config import Config
from modernbert.errors import InputError
from modernbert.nn.losses import IGNORED, binary_cross_entropy, cross_entropy, mean_squared_error
from modernbert.nn.packing import PackedInputs


def check_classes(labels: Tensor, classes: int) -> Tensor:
    """Labels that are class numbers, or -100, as int64.

    Raises:
        InputError: a label is no class and not -100.
    """
    if labels.is_floating_point() or labels.dtype.is_complex:
        raise InputError(f"labels has dtype {labels.dtype}; the numbers of classes are whole numbers")
    labels = labels.long()
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= classes))]
    if wrong.numel():
        raise InputError(f"labels holds {int(wrong[0])}; it must hold 0 to {classes - 1}, or {IGNORED}")
    return labels


def pack_token_labels(
    labels: Tensor | None, inputs: PackedInputs, classes: int, ignored: int = IGNORED
) -> Tensor | None:
    """One class number a real token, (T,), -100 where the caller's is `ignored`."""
    if labels is None:
        return None
    labels_T = inputs.pack("labels", labels)
    return check_classes(
        labels_T if ignored == IGNORED else labels_T.masked_fill(labels_T == ignored, IGNORED), classes
    )


def pack_text_labels(labels: Tensor | None, inputs: PackedInputs, config: Config) -> Tensor | None:
    """Class numbers (B,) or values (B, V), in the shape that `text_loss` takes.

    Raises:
        InputError: the shape does not fit the problem, or a class does not exist.
    """
    if labels is None:
        return None
    assert config.num_labels is not None
    shape, texts, classes = tuple(labels.shape), len(inputs.packing.lengths), config.num_labels
    problem = problem_of(config, labels)
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


def problem_of(config: Config, labels: Tensor) -> str:
    """The kind of problem that labels of texts pose: what the configuration says, or what they look like."""
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    whole = not labels.is_floating_point() and labels.dtype != torch.bool
    return "single_label_classification" if whole else "multi_label_classification"


def text_loss(
    logits_BV: Tensor, labels: Tensor | None, config: Config, num_items: Tensor | float | None
) -> Tensor | None:
    """The loss of the problem that labels of texts pose, a scalar."""
    if labels is None:
        return None
    problem = problem_of(config, labels)
    if problem == "single_label_classification":
        return cross_entropy(logits_BV, labels, num_items=num_items)
    if problem == "regression":
        return mean_squared_error(logits_BV, labels, num_items=num_items)
    return binary_cross_entropy(logits_BV, labels, num_items=num_items)
