"""Labels, checked and packed, and losses in float32: a mean over labels, or their sum over `num_items` if given.

`num_items` counts the labels of a whole batch when a call sees a part of it, so that every label weighs the same.
Sums over positions are of one text alone (docs/invariance.md).

Shapes: B texts, T real tokens of all texts together, V classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from modernbert.config import Config
from modernbert.errors import InputError
from modernbert.nn.dispatch import kernel_for
from modernbert.nn.packing import PackedInputs

IGNORED = -100  # the label of what is not labelled


def check_classes(labels: Tensor, classes: int) -> Tensor:
    """Labels that are class numbers, or -100, as int64; raises `InputError` if one is neither."""
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
    if ignored != IGNORED:
        labels_T = labels_T.masked_fill(labels_T == ignored, IGNORED)
    return check_classes(labels_T, classes)


def pack_text_labels(labels: Tensor | None, inputs: PackedInputs, config: Config) -> Tensor | None:
    """Class numbers (B,) or values (B, V), as `text_loss` takes them; raises `InputError` if they do not fit."""
    if labels is None:
        return None
    assert config.num_labels is not None
    texts, classes, problem = len(inputs.packing.lengths), config.num_labels, problem_of(config, labels)
    one_each = problem == "single_label_classification" or (problem == "regression" and classes == 1)
    allowed: list[tuple[int, ...]] = [(texts,), (texts, 1)] if one_each else [(texts, classes)]
    if tuple(labels.shape) not in allowed:
        raise InputError(
            f"labels has shape {tuple(labels.shape)}; {problem} of {texts} texts with {classes} labels takes "
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
    check_scores(logits_BV, config)
    losses: dict[str, Callable[..., Tensor]] = {
        "regression": mean_squared_error,
        "single_label_classification": cross_entropy,
        "multi_label_classification": binary_cross_entropy,
    }
    return losses[problem_of(config, labels)](logits_BV, labels, num_items=num_items)


def check_scores(logits: Tensor, config: Config) -> None:
    """Raise `InputError` if there are not as many scores as `num_labels`, which may have been set later."""
    if logits.shape[-1] != config.num_labels:
        raise InputError(
            f"num_labels is {config.num_labels}, and the classifier gives {logits.shape[-1]} scores; put another in "
            "its place, or set num_labels"
        )


def cross_entropy(
    logits_TV: Tensor, labels_T: Tensor, *, ignore_index: int = IGNORED, num_items: Tensor | float | None = None
) -> Tensor:
    """Cross-entropy of what is labelled. No label at all gives NaN as a mean, as in PyTorch."""
    if (kernel := kernel_for("cross_entropy", logits_TV)) is not None:
        losses_T = kernel(logits_TV, labels_T.long(), ignore_index)
    else:
        losses_T = F.cross_entropy(logits_TV.float(), labels_T.long(), ignore_index=ignore_index, reduction="none")
    return _reduced(losses_T, (labels_T != ignore_index).sum(), num_items)


def mean_squared_error(predicted: Tensor, labels: Tensor, *, num_items: Tensor | float | None = None) -> Tensor:
    return _reduced((predicted.float() - labels.float()).square(), predicted.numel(), num_items)


def binary_cross_entropy(logits_BV: Tensor, labels_BV: Tensor, *, num_items: Tensor | float | None = None) -> Tensor:
    """Cross-entropy of each class for itself; labels are probabilities."""
    losses_BV = F.binary_cross_entropy_with_logits(logits_BV.float(), labels_BV.float(), reduction="none")
    return _reduced(losses_BV, losses_BV.numel(), num_items)


def position_cross_entropy(
    logits_T: Tensor,
    spans: Sequence[tuple[int, int]],
    right_B: Sequence[int | None],
    *,
    num_items: Tensor | float | None = None,
) -> Tensor:
    """Cross-entropy of the right token of each span, counted over all texts; spans without one do not count."""
    scores_T = logits_T.float()
    losses = [
        scores_T[start:end].logsumexp(0) - scores_T[right]
        for (start, end), right in zip(spans, right_B, strict=True)
        if right is not None
    ]
    total = torch.stack(losses) if losses else scores_T[:0]
    return _reduced(total, len(losses), num_items)


def _reduced(losses: Tensor, count: Tensor | int, num_items: Tensor | float | None) -> Tensor:
    divisor = count if num_items is None else num_items
    return losses.sum() / torch.as_tensor(divisor, device=losses.device)
