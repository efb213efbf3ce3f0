"""Losses over packed rows, in float32. Each is a mean, or a sum over `num_items` where given.

`num_items` counts the labels of a whole batch when a call sees a part of it, so that every label weighs the same.
Sums over positions are of one text alone (docs/invariance.md).

Shapes: T rows, V classes, B texts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from modernbert.nn.dispatch import kernel_for

IGNORED = -100  # the label of what is not labelled


def cross_entropy(
    logits_TV: Tensor, labels_T: Tensor, *, ignore_index: int = IGNORED, num_items: Tensor | float | None = None
) -> Tensor:
    """Cross-entropy of the labelled rows. None at all gives NaN as a mean, as in PyTorch."""
    if (kernel := kernel_for("cross_entropy", logits_TV)) is not None:
        losses_T = kernel(logits_TV, labels_T.long(), ignore_index)
    else:
        losses_T = F.cross_entropy(logits_TV.float(), labels_T.long(), ignore_index=ignore_index, reduction="none")
    return _reduced(losses_T, (labels_T != ignore_index).sum(), num_items)


def mean_squared_error(predicted: Tensor, labels: Tensor, *, num_items: Tensor | float | None = None) -> Tensor:
    """Squared differences of two tensors of one shape."""
    return _reduced((predicted.float() - labels.float()).square(), predicted.numel(), num_items)


def binary_cross_entropy(logits_BV: Tensor, labels_BV: Tensor, *, num_items: Tensor | float | None = None) -> Tensor:
    """Cross-entropy of each class for itself; labels are probabilities."""
    losses_BV = F.binary_cross_entropy_with_logits(logits_BV.float(), labels_BV.float(), reduction="none")
    return _reduced(losses_BV, losses_BV.numel(), num_items)


def position_cross_entropy(
    logits_T: Tensor,
    spans: Sequence[tuple[int, int]],
    rows_B: Sequence[int | None],
    *,
    num_items: Tensor | float | None = None,
) -> Tensor:
    """Cross-entropy of one row out of each span: which token of its text is the right one.

    Args:
        logits_T: one score a token.
        spans: first row and the row after the last one of each text.
        rows_B: the right row of each text, counted over all texts; None is not counted.
    """
    scores_T = logits_T.float()
    losses = [
        scores_T[start:end].logsumexp(0) - scores_T[row]
        for (start, end), row in zip(spans, rows_B, strict=True)
        if row is not None
    ]
    total = torch.stack(losses) if losses else scores_T[:0]
    return _reduced(total, len(losses), num_items)


def _reduced(losses: Tensor, count: Tensor | int, num_items: Tensor | float | None) -> Tensor:
    divisor = count if num_items is None else num_items
    return losses.sum() / torch.as_tensor(divisor, device=losses.device)
