"""Linear layers whose every row comes out the same, bit for bit, whatever the number of rows.

A matrix product of general libraries picks its kernel, and so the order of its sums, by the number of rows: one
text alone and the same text in a batch then differ in the last bits. oneDNN's inner product keeps one order for
every number of rows but one, on any number of threads, so it serves wherever PyTorch carries it; a single row is
computed as two, and many rows as a round number of them. Elsewhere blocks of a fixed size give the same guarantee. On a
card products are left to PyTorch, which picks by the number of rows (docs/invariance.md).

Shapes: T rows, I inputs, O outputs.
"""

from __future__ import annotations

import functools
import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)
# Where oneDNN is missing:
_BLOCK = 64  # rows a call; a fixed shape is a fixed order of sums
_LINE = 16  # inputs are padded to a multiple of this, so that a row begins a cache line


def onednn_serves(x: Tensor) -> bool:
    """Whether PyTorch has oneDNN for rows of this dtype on their device."""
    return x.device.type == "cpu" and bool(torch.backends.mkldnn.enabled) and onednn_computes(x.dtype) is not None


@functools.cache
def onednn_computes(dtype: torch.dtype) -> torch.dtype | None:
    """What oneDNN's inner product computes rows of a dtype in on this CPU; None if this build lacks it.

    A CPU without bfloat16 products takes bfloat16 values as float32, which is faster there than imitating them.
    """
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return None
    if dtype == torch.bfloat16 and multiplies_bfloat16():
        return torch.bfloat16
    return torch.float32 if dtype in (torch.float32, torch.bfloat16) else None


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether PyTorch multiplies bfloat16 values on this CPU by instructions made for them; oneDNN also imitates them.

    `ONEDNN_MAX_CPU_ISA` can forbid oneDNN instructions that the CPU has, so one product is tried.
    """
    if platform.machine() in ("x86_64", "AMD64"):
        made_for_it = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        made_for_it = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if not made_for_it:
        return False
    x = torch.ones(2, 16, dtype=torch.bfloat16)
    try:
        torch.ops.mkldnn._linear_pointwise(x, x, None, "none", [], "")
    except RuntimeError:
        return False
    return True


def products_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that products of values of a dtype are best computed in: float32 for what a CPU would imitate."""
    imitated = dtype == torch.bfloat16 and device.type == "cpu" and not multiplies_bfloat16()
    return torch.float32 if imitated else dtype


def planned_rows(rows: int) -> int:
    """The number of rows to compute for this many: one of a few, so that oneDNN keeps few plans; at least two.

    Up to 64 rows a product takes as long as reading its weight, so that more rows cost little. Above, eight numbers
    between each power of two and the next cost an eighth at the most.
    """
    if rows <= 16:
        return next(planned for planned in (2, 4, 8, 12, 16) if rows <= planned)
    step = 8 if rows <= 64 else 1 << (rows - 1).bit_length() - 4
    return -(-rows // step) * step


def product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, reordered: Tensor | None = None) -> Tensor:
    """`linear` of (T, I) without gradients; `reordered` is the weight in oneDNN's layout, if it has one."""
    rows = x_TI.shape[0]
    if rows == 0:
        return x_TI.new_zeros((0, weight_OI.shape[0]))
    if onednn_serves(x_TI):
        dtype, planned = onednn_computes(x_TI.dtype), planned_rows(rows)
        assert dtype is not None
        same = dtype == x_TI.dtype
        x = x_TI if same else x_TI.to(dtype)
        # oneDNN keeps a plan, megabytes large, for every number of rows that it has seen; few numbers keep memory flat.
        if rows == 1:
            x = torch.cat((x, x))
        elif rows != planned:
            x = F.pad(x, (0, 0, 0, planned - rows))
        weight = weight_OI.to(dtype).contiguous() if reordered is None else reordered
        bias = None if bias_O is None else bias_O.to(dtype)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
        out = out if rows == planned else out[:rows]
        return out if same else out.to(x_TI.dtype)
    if x_TI.device.type != "cpu":
        return F.linear(x_TI, weight_OI, bias_O)
    # The sums of a row depend on where in memory it begins: here each row begins a cache line.
    extra = -x_TI.shape[1] % _LINE
    padded = F.pad(x_TI, (0, extra, 0, -rows % _BLOCK))
    padded = padded.clone() if padded.data_ptr() == x_TI.data_ptr() else padded
    weight_OI = F.pad(weight_OI, (0, extra)) if extra else weight_OI
    return torch.cat([F.linear(block, weight_OI, bias_O) for block in padded.split(_BLOCK)])[:rows]


class _Linear(torch.autograd.Function):
    """oneDNN's forward has no derivative in PyTorch; the backward is three ordinary products."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TI, weight_OI)
        return product(x_TI, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad_TO,) = grads
        x_TI, weight_OI = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            grad_TO @ weight_OI if need_x else None,
            grad_TO.mT @ x_TI if need_weight else None,
            grad_TO.sum(0) if need_bias else None,
        )


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, each row independent, bit for bit, of the others on a CPU; x may have any dimensions."""
    if type(weight_OI) not in _PLAIN:  # a class of its own brings its own product, as torchao's do
        return F.linear(x_TI, weight_OI, bias_O)
    if torch.is_autocast_enabled(x_TI.device.type):
        dtype = torch.get_autocast_dtype(x_TI.device.type)
        x_TI, weight_OI = x_TI.to(dtype), weight_OI.to(dtype)
        bias_O = None if bias_O is None else bias_O.to(dtype)
    if torch.compiler.is_compiling():  # the compiler plans its own products, and gives up the guarantee
        return F.linear(x_TI, weight_OI, bias_O)
    if x_TI.dim() == 1:
        return linear(x_TI[None], weight_OI, bias_O)[0]
    if x_TI.dim() != 2:
        return linear(x_TI.flatten(0, -2), weight_OI, bias_O).unflatten(0, x_TI.shape[:-1])
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x_TI, weight_OI, bias_O))
    if needs_grad and onednn_serves(x_TI):
        return _Linear.apply(x_TI, weight_OI, bias_O)
    return product(x_TI, weight_OI, bias_O)
