"""A step of AdamW or StableAdamW over all weights, and the norm of all gradients, each as one call of the kernels."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from modernbert.engines.cpu import library as native
from modernbert.engines.cpu.operations import run_one


class Moments(NamedTuple):
    """A tensor of weights in a step of Adam.

    Attributes:
        weight, grad: which have one shape.
        mean, square: running ones of gradients and of their squares.
        lr, decay: of this step; each step shrinks the weight by `lr * decay`.
        corrections: 1 - beta ** steps of both running numbers.
    """

    weight: Tensor
    grad: Tensor
    mean: Tensor
    square: Tensor
    lr: float
    decay: float
    corrections: tuple[float, float]


def are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether the kernels can step by these tensors: float32, on the CPU, each in one piece and a class of PyTorch."""
    return native.library() is not None and all(
        type(x) in (Tensor, nn.Parameter) and x.dtype == torch.float32 and x.device.type == "cpu" and x.is_contiguous()
        for x in tensors
    )


def norm_of(tensors: Sequence[Tensor]) -> float:
    """The norm of all numbers of tensors that `are_plain`; the order of its sums is one, on any number of threads."""
    sums = _step(
        [native.Slice(grad=x.data_ptr(), count=x.numel(), of_mean=1, of_square=1) for x in tensors],
        native.Adam(kind=native.SQUARES, shrink=1),
    )
    return float(np.sqrt(sums.sum()))


def adam(moments: Sequence[Moments], betas: tuple[float, float], eps: float, shrink: float, stable: bool) -> None:
    """A step of AdamW, or of StableAdamW, by tensors that `are_plain`, in place.

    Args:
        moments: of each tensor.
        betas: decay of the running mean and of the running square.
        eps: added to the root of the square.
        shrink: what gradients are multiplied by, as clipping them would.
        stable: whether a tensor's step shrinks when its gradients outgrow their running square.
    """
    slices = [
        native.Slice(
            *(x.data_ptr() for x in (m.weight, m.grad, m.mean, m.square)), m.weight.numel(), 0, m.lr, m.decay,
            *m.corrections,
        )
        for m in moments
    ]  # fmt: skip
    kind = native.STABLE_ADAMW if stable else native.ADAMW
    shares = {"of_grad": 1 - betas[0], "of_square": betas[1], "of_new": 1 - betas[1]}
    _step(slices, native.Adam(kind=kind, **shares, eps=eps, shrink=shrink))


def _step(slices: Sequence[native.Slice], adam: native.Adam) -> npt.NDArray[np.float64]:
    """Run over the chunks of all tensors; a sum for each chunk."""
    chunks = [-(-s.count // native.CHUNK) for s in slices]
    for s, first in zip(slices, itertools.accumulate([0, *chunks]), strict=False):
        s.first = first
    table = (native.Slice * len(slices))(*slices)
    owners = np.repeat(np.arange(len(slices), dtype=np.int64), chunks)
    sums = np.zeros(len(owners))
    adam.chunks, adam.slices, adam.owners, adam.sums = (
        len(owners), ctypes.addressof(table), owners.ctypes.data, sums.ctypes.data
    )  # fmt: skip
    run_one(adam)
    return sums
