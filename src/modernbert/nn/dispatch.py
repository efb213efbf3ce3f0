"""Kernels that an engine brings for functions of `nn`: registered from outside, asked for by name.

Nothing here knows an engine. Without one the functions compute by PyTorch alone. There is one kernel of each name:

- "rotate" (`rotary`), called as kernel(q_THD, k_THD, v_THD, cos_T1D, sin_T1D, back=False): queries and keys rotated by
  their tokens' angles, or back, and values, as one tensor (T, 3, H, D). Outside of autograd.
- "geglu" (`layers.MLP`), called as kernel(x_T2I): gelu(first half) * second half, with gradients.
- "cross_entropy" (`losses`), called as kernel(logits_TV, labels_T, ignored): a float32 loss for each token, 0 where the
  label is `ignored`, with gradients.
- "layer" (`layers.Layer`), called as kernel(layer, x_TM, shared, rows): what a layer in training gives, of all tokens
  or of some rows, with gradients; None where its modules must. It attends by the plan of the "native" backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Serves = Callable[[torch.dtype, torch.device], bool]
_KERNELS: dict[str, tuple[Serves, Callable[..., Any]]] = {}


def register_kernel(name: str, serves: Serves, kernel: Callable[..., Any]) -> None:
    """Have a kernel compute a function wherever `serves` says so of a dtype and a device."""
    if name in _KERNELS and _KERNELS[name][1] is not kernel:
        raise ValueError(f"there is a kernel for {name!r} already")
    _KERNELS[name] = serves, kernel


def kernel_for(name: str, x: Tensor) -> Callable[..., Any] | None:
    """The kernel of this name for a tensor like x; None where PyTorch serves, as it does while it compiles."""
    serves, kernel = _KERNELS.get(name, (None, None))
    if serves is None or torch.compiler.is_compiling() or not serves(x.dtype, x.device):
        return None
    return kernel
