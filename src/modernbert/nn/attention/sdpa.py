"""Attention by PyTorch's scaled_dot_product_attention: portable, with no T x T tensor and no work for padding.

A text that sees all of itself is attended whole: long ones alone, short ones together with others of the same
rounded length. A longer text in a local layer is cut into blocks of queries, each against the few blocks of keys
within its reach, which makes the work linear in the tokens. How a text is cut depends on that text alone, so its
results do not depend on its batch (docs/invariance.md).

Shapes: T tokens of all texts together, N texts or blocks of a piece, R = N x width slots of a piece (some hold no
token), Q queries and K keys of each text or block, H heads, D head size.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from modernbert.nn.attention.contract import AttentionBackend, Reach
from modernbert.nn.packing import Packing

_ALONE = 256  # texts longer than this are worth a call of their own
_ROUND = 16  # shorter ones share a call with those of the same length, rounded up to this
_LINE = 64  # bytes of a cache line, which is also the widest vector
_TOGETHER = 4  # queries; fewer are computed by instructions of another kind


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one call attends: N texts as a whole, or blocks of queries of longer texts in a local layer."""

    width: int  # slots of each text or block
    causal: bool = False  # whether no token sees those after it
    bias_N1QK: Tensor | None = None  # hides empty slots, and keys of another text or out of reach
    left: int = 0  # how many blocks of keys a block of queries sees before its own
    right: int = 0  # and after it

    def attend(self, q_RHD: Tensor, k_RHD: Tensor, v_RHD: Tensor, dropout: float) -> Tensor:
        q, k, v = (x.unflatten(0, (-1, self.width)) for x in (q_RHD, k_RHD, v_RHD))
        if self.left or self.right:
            k, v = (_Windows.apply(x, self.width, self.left, self.right) for x in (k_RHD, v_RHD))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return dense_attention(q, k, v, self.bias_N1QK, dropout, self.causal).transpose(1, 2).flatten(0, 1)


@dataclasses.dataclass(frozen=True)
class SdpaPlan:
    """Pieces that together hold every token once, the R of each, and what `way` gives."""

    pieces: list[Piece]
    slots: list[int]
    gather: Tensor | None
    order_T: Tensor | None


class SdpaAttention(AttentionBackend):
    """`torch.nn.functional.scaled_dot_product_attention` on whole texts and on windows."""

    name = "sdpa"

    def plan(self, packing: Packing, reach: Reach, dtype: torch.dtype) -> SdpaPlan:
        lengths, (left, right) = packing.lengths, reach
        spans = [length - 1 for length in lengths]
        if packing.gaps:
            spans = [int(p[-1]) if len(p) else 0 for p in packing.positions_T.split(lengths)]
        windowed: list[int] = []
        alone: list[list[int]] = []  # runs of texts of one length
        shared: dict[int, list[int]] = {}  # by their rounded length
        for i, length in enumerate(lengths):
            if (left is not None and spans[i] > left) or (right and spans[i] > right):  # more than an end sees
                windowed.append(i)
            elif length > _ALONE:
                if alone and lengths[alone[-1][0]] == length and alone[-1][-1] == i - 1:
                    alone[-1].append(i)
                else:
                    alone.append([i])
            elif length:
                shared.setdefault(-(-length // _ROUND) * _ROUND, []).append(i)
        pieces: list[Piece] = []
        layouts: list[Layout] = []
        for width, texts in [*((lengths[texts[0]], texts) for texts in alone), *shared.items()]:
            layout, bias_N1QK = lay_out(texts, [width] * len(texts), packing), None
            if width <= _ALONE and right != 0:
                bias_N1QK = _bias(layout.held.unflatten(0, (-1, width)), dtype)[:, None, None].expand(-1, 1, width, -1)
            pieces.append(Piece(width, right == 0, bias_N1QK))
            layouts.append(layout)
        if windowed:
            assert left is not None
            assert right is not None
            piece, layout = _windows(windowed, packing, (left, right), dtype)
            pieces.append(piece)
            layouts.append(layout)
        return SdpaPlan(pieces, [len(layout.tokens) for layout in layouts], *way(layouts, packing))

    def attend(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, plan: SdpaPlan, dropout: float = 0.0) -> Tensor:
        if not plan.pieces:
            return v_THD
        if plan.gather is not None:
            assert plan.order_T is not None
            q_THD, k_THD, v_THD = (reorder(x, plan.gather, plan.order_T) for x in (q_THD, k_THD, v_THD))
        parts = zip(plan.pieces, *(x.split(plan.slots) for x in (q_THD, k_THD, v_THD)), strict=True)
        kernel = sdpa_kernel(SDPBackend.MATH) if self.deterministic and q_THD.is_cuda else contextlib.nullcontext()
        with kernel:
            outs = [piece.attend(q, k, v, dropout) for piece, q, k, v in parts]
        out_THD = torch.cat(outs) if len(outs) > 1 else outs[0]
        return out_THD if plan.order_T is None else reorder(out_THD, plan.order_T)


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def _windows(texts: list[int], packing: Packing, reach: tuple[int, int], dtype: torch.dtype) -> tuple[Piece, Layout]:
    # A block is about the reach: smaller ones visit fewer keys that are out of sight, larger ones run faster.
    size = min(max(-(-max(reach) // 16) * 16, 16), 128)
    left, right = (-(-r // size) for r in reach)
    layout = lay_out(texts, [-(-packing.lengths[i] // size) * size for i in texts], packing)
    # A query sees a key of its own text within reach. Slots without a token see each other: otherwise they were NaN.
    text = torch.where(layout.held, packing.text_T[layout.tokens], -1)
    position = packing.positions_T[layout.tokens]
    guard, width = (left * size, right * size), (left + 1 + right) * size
    text_NK, position_NK = (F.pad(x, guard, value=-2).unfold(0, width, size) for x in (text, position))
    text_NQ, position_NQ = text.unflatten(0, (-1, size)), position.unflatten(0, (-1, size))
    ahead_NQK = position_NK[:, None, :] - position_NQ[:, :, None]
    seen_NQK = (text_NK[:, None, :] == text_NQ[:, :, None]) & (ahead_NQK >= -reach[0]) & (ahead_NQK <= reach[1])
    seen_NQK |= (text_NQ == -1)[:, :, None]
    return Piece(size, False, _bias(seen_NQK[:, None], dtype), left, right), layout


class _Windows(torch.autograd.Function):
    """Keys (N * size, H, D) to overlapping windows (N, width, H, D) of the blocks around each: a view, without a copy.

    The backward adds each block's gradients up from the windows that see it; PyTorch's own for views that overlap
    goes element by element.
    """

    @staticmethod
    def forward(ctx: Any, x_RHD: Tensor, size: int, left: int, right: int) -> Tensor:
        ctx.blocks = (size, left, right)
        padded = F.pad(x_RHD, (0, 0, 0, 0, left * size, right * size))
        return padded.unfold(0, (left + 1 + right) * size, size).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        size, left, right = ctx.blocks
        parts = grads[0].unflatten(1, (left + 1 + right, size))
        number = parts.shape[0]
        total = parts.new_zeros((left + number + right, *parts.shape[2:]))
        for i in range(left + 1 + right):
            total[i : i + number] += parts[:, i]
        return total[left : left + number].flatten(0, 1), None, None, None


# Where tokens go when a backend wants them in slots of its own, and the way back


class Layout(NamedTuple):
    """The token of each slot of a piece, and which slots hold one at all."""

    tokens: Tensor
    held: Tensor


def lay_out(texts: list[int], widths: list[int], packing: Packing) -> Layout:
    """Lay texts out one after another in `widths` slots each."""
    starts, device = packing.starts, packing.positions_T.device
    width_N = torch.tensor(widths)
    owner = torch.arange(len(texts)).repeat_interleave(width_N)
    place = torch.arange(int(width_N.sum())) - (width_N.cumsum(0) - width_N)[owner]
    held = place < torch.tensor([packing.lengths[i] for i in texts])[owner]
    tokens = torch.where(held, torch.tensor([starts[i] for i in texts])[owner] + place, 0)
    return Layout(tokens.to(device), held.to(device))


def way(layouts: list[Layout], packing: Packing) -> tuple[Tensor | None, Tensor | None]:
    """The token of each slot of all pieces, and the slot of each token; None twice where slots are tokens, in order."""
    empty = packing.positions_T[:0]
    gather = torch.cat([empty, *(layout.tokens for layout in layouts)])
    held = torch.cat([empty.bool(), *(layout.held for layout in layouts)])
    if bool(held.all()) and bool((gather[1:] > gather[:-1]).all()):
        return None, None
    order_T = torch.empty_like(packing.positions_T)
    filled = held.nonzero().squeeze(1)
    order_T[gather[filled]] = filled
    return gather, order_T


def reorder(x: Tensor, index: Tensor, back: Tensor | None = None) -> Tensor:
    """x[index], which takes tokens to slots (with `back`, the slot of each token), or slots to tokens.

    Slots that hold no token take any, and give no gradient: nothing sees them.
    """
    if torch.compiler.is_compiling() or not x.requires_grad:
        return x.index_select(0, index)
    out: Tensor = _Reorder.apply(x, index, back)
    return out


class _Reorder(torch.autograd.Function):
    """Each token is in one slot, so that the backward adds nothing up, as PyTorch's own would."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor | None) -> Tensor:
        ctx.save_for_backward(index if back is None else back)
        ctx.size = len(x) if back is None else None
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (index,) = grads, ctx.saved_tensors
        if ctx.size is None:
            return grad.index_select(0, index), None, None
        return grad.new_zeros((ctx.size, *grad.shape[1:])).index_copy_(0, index, grad), None, None


def dense_attention(
    q_NHQD: Tensor,
    k_NHKD: Tensor,
    v_NHKD: Tensor,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
) -> Tensor:
    """Softmax attention of every query to every key, scores scaled by D**-0.5: (N, H, Q, D), in the queries' dtype.

    On a CPU the order of PyTorch's sums depends on three things that have nothing to do with the text: where in memory
    a row begins (also a row of each thread's own scores), whether a single head of a single text is all that there is
    (several threads then share each product), and in bfloat16 the number of threads. So calls made here have whole
    cache lines for rows, queries in fours, at least two heads, and float32 values (docs/invariance.md).

    Keys and values are of the queries' dtype or a wider one, in which all is then computed. The bias is added to the
    scores, dropout falls on the weights, and with `causal` query i sees keys 0 to i alone.
    """
    dtype, size = q_NHQD.dtype, q_NHQD.shape[-1]
    q, k, v = q_NHQD.to(k_NHKD.dtype), k_NHKD, v_NHKD
    exact = q.device.type == "cpu" and not torch.compiler.is_compiling()
    texts, heads, queries = q.shape[:3]
    if exact:
        wants_gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        if k.dtype in (torch.bfloat16, torch.float16) and not wants_gradient:
            q, k, v = q.float(), k.float(), v.float()
        q, k, v = _on_lines(q), _on_lines(k), _on_lines(v)
        if missing := -queries % _TOGETHER:
            q = F.pad(q, (0, 0, 0, missing))
            bias = bias if bias is None or bias.shape[-2] == 1 else F.pad(bias, (0, 0, 0, missing))
        if texts * heads == 1:
            q, k, v = (x.expand(2, -1, -1, -1) for x in (q, k, v))
    bias = None if bias is None else bias.to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, is_causal=causal, scale=size**-0.5)
    return (out[:texts, :, :queries, :size] if exact else out).to(dtype)


def _on_lines(x_NHLD: Tensor) -> Tensor:
    """The same values, each row at the beginning of a cache line; zeros are added at the rows' ends where needed."""
    if missing := -x_NHLD.shape[-1] % (_LINE // 4):
        return F.pad(x_NHLD, (0, missing))
    return x_NHLD if x_NHLD.data_ptr() % _LINE == 0 else x_NHLD.clone()
