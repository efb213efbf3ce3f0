"""What training keeps weights in, and computes products in."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from torch import nn

from modernbert.nn.linear import multiplies_bfloat16

logger = logging.getLogger(__name__)


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 products where they are asked for, or where "auto" finds that the device has them."""
    enabled = products(precision, device) == "bfloat16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def products(precision: str, device: torch.device) -> str:
    """What products are computed in: "bfloat16" or "float32", as is asked for or as "auto" finds for the device."""
    if precision != "auto":
        return precision
    on_card = device.type == "cuda"
    native = torch.cuda.is_bf16_supported(including_emulation=False) if on_card else multiplies_bfloat16()
    return "bfloat16" if native else "float32"


def train_in_float32(model: nn.Module) -> None:
    """Convert trainable weights to float32, in place, with one warning: 16 bits would round most of a step away."""
    others = {p.dtype for p in model.parameters() if p.requires_grad and p.dtype in (torch.float16, torch.bfloat16)}
    if others:
        model.float()
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in others))
        logger.warning("the weights are %s; they are trained in float32", names)


def stored_in(dtype: object) -> str:
    """What to say of a checkpoint stored in 16 bits that is trained in float32; nothing of one that is not."""
    name = str(dtype).removeprefix("torch.")
    return f"weights are stored in {name} and trained in float32" if name in ("float16", "bfloat16") else ""
