"""Attention by FlashAttention's kernels for texts of various lengths: PyTorch's own, or those of an installed package.

Shapes: T tokens of all texts together, H heads, D head size, B texts.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.attention
from torch import Tensor

from modernbert.errors import BackendError
from modernbert.nn.attention.contract import AttentionBackend, Reach
from modernbert.nn.attention.sdpa import SdpaAttention, SdpaPlan
from modernbert.nn.packing import Packing

logger = logging.getLogger(__name__)

DTYPES = (torch.float16, torch.bfloat16)
_LARGEST_HEAD = 256

# q, k, v, cu_seqlens (B + 1,) int32, tokens of the longest text, window (left, right) with -1 for no end, and whether
# gradients have to be the same at every run.
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, tuple[int, int], bool], Tensor]


class FlashPlan:
    """Where the texts lie, as the kernels take it, and how far their tokens see.

    `cu_seqlens`, (B + 1,) int32 on the device, may be others than those of `packing`; texts may then be empty.
    """

    def __init__(self, packing: Packing, reach: Reach, dtype: torch.dtype, cu_seqlens: Tensor | None = None) -> None:
        self.packing, self.dtype = packing, dtype
        self.reach: Reach = (reach[0], reach[1])
        self.cu_seqlens = packing.cu_seqlens if cu_seqlens is None else cu_seqlens
        self.longest = max(packing.lengths, default=0)
        self.window = (-1 if reach[0] is None else reach[0], -1 if reach[1] is None else reach[1])

    @property
    def counts_rows(self) -> bool:
        """Whether distances in rows are those in positions, as the kernels take them to be."""
        return not self.packing.gaps or self.reach in ((None, None), (None, 0))

    @functools.cached_property
    def sdpa(self) -> SdpaPlan:
        """The same for the backend that takes what the kernels do not."""
        return SdpaAttention().plan(self.packing, self.reach, self.dtype)


class FlashAttention(AttentionBackend):
    """Variable-length attention on a card: packed rows in, packed rows out, no mask, windows skipped by block.

    What the kernels have not (float32, dropout, positions with gaps in a window) sdpa serves.
    """

    name = "flash_attention_2"

    def __init__(self, deterministic: bool = False) -> None:
        super().__init__(deterministic)
        reason = why_not()
        if reason:
            raise BackendError(f"attn_implementation 'flash_attention_2' cannot run here: {reason}")

    def plan(self, packing: Packing, reach: Reach, dtype: torch.dtype) -> FlashPlan:
        return FlashPlan(packing, reach, dtype)

    def attend(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, plan: FlashPlan, dropout: float = 0.0) -> Tensor:
        if dropout or not plan.counts_rows or not serves(q_THD.dtype, q_THD.shape[-1]) or not q_THD.numel():
            return SdpaAttention(self.deterministic).attend(q_THD, k_THD, v_THD, plan.sdpa, dropout)
        q_THD, k_THD, v_THD = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_THD, k_THD, v_THD))
        attend = kernel(q_THD.device)
        return attend(q_THD, k_THD, v_THD, plan.cu_seqlens, plan.longest, plan.window, self.deterministic)


def _make_deterministic(node: torch.autograd.graph.Node) -> None:
    """Have a backward sum in one order, which PyTorch's kernels choose by a global setting when it runs."""
    before: list[tuple[bool, bool]] = []

    def begin(grads: Any) -> None:
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        before.append((torch.are_deterministic_algorithms_enabled(), warn_only))
        torch.use_deterministic_algorithms(True)

    def end(got: Any, grads: Any) -> None:
        enabled, warn_only = before.pop()
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)

    node.register_prehook(begin)
    node.register_hook(end)


# Which kernels there are, and what they take


def serves(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernels take numbers of this dtype in heads of this size."""
    return dtype in DTYPES and head_dim % 8 == 0 and head_dim <= _LARGEST_HEAD


def why_not() -> str:
    """Why no kernel can run on this machine; nothing where one can."""
    if not torch.cuda.is_available():
        return "it needs a CUDA device, and there is none; choose 'sdpa', which is as exact"
    if torch.version.hip is not None:
        return "it is for NVIDIA's cards; choose 'flex_attention' or 'sdpa', which are as exact"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return (
            f"it needs a card of compute capability 8.0 or later, and this one has {capability[0]}.{capability[1]}; "
            "choose 'sdpa', which is as exact"
        )
    if not (_varlen() or _has("flash_attn_interface") or _has("flash_attn")):
        return f"PyTorch {torch.__version__} has no kernels with windows for it (2.11 has), nor is flash-attn installed"
    return ""


@functools.cache
def kernel(device: torch.device) -> Kernel:
    """The kernels for a device: FlashAttention 3 on Hopper where installed, PyTorch's own, the flash-attn package."""
    if device.type != "cuda":
        raise BackendError(f"flash_attention_2 runs on CUDA devices; these numbers are on {device}")
    if torch.cuda.get_device_capability(device)[0] == 9 and _has("flash_attn_interface"):
        logger.info("flash attention by flash_attn_interface (FlashAttention 3)")
        return _of_package("flash_attn_interface", num_splits=1)
    if _varlen():
        logger.info("flash attention by torch.nn.attention.varlen of PyTorch %s", torch.__version__)
        return _pytorch
    logger.info("flash attention by the flash-attn package")
    return _of_package("flash_attn")


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@functools.cache
def _varlen() -> Callable[..., Any] | None:
    """PyTorch's own variable-length attention, where it has windows."""
    if not _has("torch.nn.attention.varlen"):
        return None
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn if "window_size" in inspect.signature(varlen_attn).parameters else None


@functools.cache
def _may_be_asked_for_splits() -> bool:
    varlen = _varlen()
    return varlen is not None and "num_splits" in inspect.signature(varlen).parameters


def _pytorch(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, window: tuple[int, int], deterministic: bool
) -> Tensor:
    varlen = _varlen()
    assert varlen is not None
    # Keys in one piece, so that a text's sums do not follow from its batch. PyTorch's own kernels never split them
    # for texts that lie packed, and in some versions refuses the question; kernels that replace it may.
    current = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    splits = {"num_splits": 1} if current is not None and _may_be_asked_for_splits() else {}
    out: Tensor = varlen(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=window, **splits)
    if deterministic and out.grad_fn is not None:
        _make_deterministic(out.grad_fn)
    return out


def _of_package(module: str, **options: int) -> Kernel:
    function = importlib.import_module(module).flash_attn_varlen_func

    def attend(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, window: tuple[int, int], deterministic: bool
    ) -> Tensor:
        out = function(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=window == (-1, 0), window_size=window,
            deterministic=deterministic, **options,
        )  # fmt: skip
        first: Tensor = out[0] if isinstance(out, tuple) else out
        return first

    return attend
