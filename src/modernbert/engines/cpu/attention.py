"""Attention by our own kernels, for inference on a CPU; where gradients or dropout are wanted, sdpa serves.

Shapes: T tokens of all texts together, H heads, D head size.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from modernbert.engines.cpu.library import library, serving
from modernbert.engines.cpu.operations import attention
from modernbert.errors import BackendError
from modernbert.nn.attention.contract import AttentionBackend, Reach
from modernbert.nn.attention.sdpa import SdpaAttention, SdpaPlan
from modernbert.nn.packing import Packing


class NativePlan:
    """Where the texts lie and how far their tokens see."""

    def __init__(self, packing: Packing, reach: Reach, dtype: torch.dtype) -> None:
        self.packing, self.reach, self.dtype = packing, reach, dtype
        self.starts = torch.tensor(packing.starts, dtype=torch.int64, device="cpu")
        self.positions_T = packing.positions_T

    @functools.cached_property
    def sdpa(self) -> SdpaPlan:
        """The same for the backend that gradients pass."""
        return SdpaAttention().plan(self.packing, self.reach, self.dtype)


class NativeAttention(AttentionBackend):
    """Each text by itself, blocks of keys after blocks of keys within reach, with a running softmax."""

    name = "native"

    def __init__(self, deterministic: bool = False) -> None:
        super().__init__(deterministic)
        if library() is None:
            raise BackendError("attn_implementation 'native' needs the compiled kernels, which this installation lacks")

    def plan(self, packing: Packing, reach: Reach, dtype: torch.dtype) -> NativePlan:
        """Starts and positions."""
        return NativePlan(packing, reach, dtype)

    def attend(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, plan: NativePlan, dropout: float = 0.0) -> Tensor:
        """Attention outputs of tokens that are rotated already."""
        wanted = torch.is_grad_enabled() and (q_THD.requires_grad or k_THD.requires_grad or v_THD.requires_grad)
        if wanted or dropout or torch.compiler.is_compiling() or serving(q_THD.dtype, q_THD.device) is None:
            return SdpaAttention(self.deterministic).attend(q_THD, k_THD, v_THD, plan.sdpa, dropout)
        q, k, v = (x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in (q_THD, k_THD, v_THD))
        out_THD = q.new_empty(q.shape)
        return attention(q, k, v, out_THD, plan.starts, reach=plan.reach, positions_T=plan.positions_T)
