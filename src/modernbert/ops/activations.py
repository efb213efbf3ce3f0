"""Activations by the names that configurations use."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_tanh_gelu = functools.partial(F.gelu, approximate="tanh")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,  # the exact one, by erf
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def activation(name_or_function: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function that a configuration names, or the function itself."""
    return name_or_function if callable(name_or_function) else ACTIVATIONS[name_or_function]
