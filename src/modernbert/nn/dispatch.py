"""Kernels that an engine brings for functions of this room: registered from outside, asked for by name.

Nothing here knows an engine. Without one the functions compute by PyTorch alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Serves = Callable[[torch.dtype, torch.device], bool]

_KERNELS: dict[str, tuple[Serves, Callable[..., Any]]] = {}


def register_kernel(name: str, serves: Serves, kernel: Callable[..., Any]) -> None:
    """Have a kernel compute a function wherever `serves` says so of a dtype and a device.

    Names are "rotate" (see `rotary`), "cross_entropy" (see `losses`) and "geglu" (see `layers.MLP`).
    """
    _KERNELS[name] = serves, kernel


def kernel_for(name: str, x: Tensor) -> Callable[..., Any] | None:
    """The kernel of this name for numbers like these; None where PyTorch serves, as while it compiles."""
    serves, kernel = _KERNELS.get(name, (None, None))
    if serves is None or torch.compiler.is_compiling() or not serves(x.dtype, x.device):
        return None
    return kernel
