"""Losses over packed rows, in float32.

Shapes: T rows, V classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(
    logits_TV: Tensor, labels_T: Tensor, *, ignore_index: int = -100, num_items: Tensor | float | None = None
) -> Tensor:
    """Cross-entropy of the labelled rows: their mean, or their sum over `num_items` where given.

    No labelled row at all gives NaN as a mean, as in PyTorch.
    """
    reduction = "mean" if num_items is None else "sum"
    loss = F.cross_entropy(logits_TV.float(), labels_T.long(), ignore_index=ignore_index, reduction=reduction)
    return loss if num_items is None else loss / torch.as_tensor(num_items, device=loss.device)
