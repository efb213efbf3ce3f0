"""Activations by the names that configurations use.

PyTorch's own sigmoid, SiLU and tanh-GELU compute the last few values of each thread's share by another formula than
the rest, so that a row's bits depend on how many rows there are. Its tanh does not, nor does its exact GELU by oneDNN;
the others are written by way of tanh, and the exact GELU without oneDNN goes piece by piece (docs/invariance.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from modernbert.nn.linear import multiplies_bfloat16, onednn_serves, planned_rows

_PIECE = 1 << 13  # values, fewer than PyTorch shares out to threads


def _gelu(x: Tensor) -> Tensor:
    """The exact one, by erf. On a CPU oneDNN computes it, which keeps a plan for every shape that it has seen."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.gelu(x)
    if x.dtype == torch.bfloat16 and not multiplies_bfloat16():  # nor does oneDNN have its GELU then
        return _gelu(x.float()).to(x.dtype)
    if not onednn_serves(x) and not x.requires_grad and x.numel():
        # Pieces that one thread computes each, and that end with a whole vector: no value is at an end.
        flat = F.pad(x.flatten(), (0, -x.numel() % _PIECE))
        return torch.cat([F.gelu(piece) for piece in flat.split(_PIECE)])[: x.numel()].view(x.shape)
    extra = planned_rows(len(x)) - len(x) if x.dim() == 2 else 0
    return F.gelu(F.pad(x, (0, 0, 0, extra)))[: len(x)] if extra else F.gelu(x)


def _sigmoid(x: Tensor) -> Tensor:
    return (0.5 + 0.5 * torch.tanh(0.5 * x.float())).to(x.dtype)


def _silu(x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * (0.5 + 0.5 * torch.tanh(0.5 * wide))).to(x.dtype)


def _tanh_gelu(x: Tensor) -> Tensor:
    wide = x.float()
    inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide * wide * wide)
    return (0.5 * wide * (1 + torch.tanh(inner))).to(x.dtype)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": _gelu,
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "relu": F.relu,
    "silu": _silu,
    "swish": _silu,
    "tanh": torch.tanh,
    "sigmoid": _sigmoid,
}


def activation(name_or_function: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function that a configuration names, or the function itself."""
    return name_or_function if callable(name_or_function) else ACTIVATIONS[name_or_function]
