"""Attention by PyTorch's scaled_dot_product_attention: portable, with no T x T tensor and no work for padding.

A text that sees all of itself is attended whole: long ones alone, short ones together with others of the same
rounded length. A longer text in a local layer is cut into blocks of queries, each against the few blocks of keys
within its reach, which makes the work linear in the tokens. How a text is cut depends on that text alone, so its
numbers do not depend on its batch (docs/invariance.md).

Shapes: T tokens of all texts together, R rows of a piece, N texts or blocks, Q queries and K keys of each, H heads,
D head size.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from modernbert.nn.attention.contract import AttentionBackend, Reach
from modernbert.nn.attention.dense import dense_attention
from modernbert.nn.attention.layout import Layout, from_rows, lay_out, to_rows, way
from modernbert.nn.packing import Packing

_ALONE = 256  # texts longer than this are worth a call of their own
_ROUND = 16  # shorter ones share a call with those of the same length, rounded up to this


@dataclasses.dataclass(frozen=True)
class Whole:
    """N texts, each attended whole, or `causal`: no token sees those after it.

    Texts of one length need no bias; `bias_N1QK` hides the rows that round up, which causal texts never see.
    """

    texts: int
    width: int
    causal: bool = False
    bias_N1QK: Tensor | None = None

    def attend(self, q_RHD: Tensor, k_RHD: Tensor, v_RHD: Tensor, dropout: float) -> Tensor:
        """Rows of all the texts in, as many out."""
        q, k, v = (x.unflatten(0, (self.texts, self.width)).transpose(1, 2) for x in (q_RHD, k_RHD, v_RHD))
        out = dense_attention(q, k, v, self.bias_N1QK, dropout, self.causal)
        return out.transpose(1, 2).flatten(0, 1)


@dataclasses.dataclass(frozen=True)
class Windows:
    """Longer texts in a local layer, each cut into blocks of `size` queries.

    A block sees `left` blocks of keys before its own and `right` after it; `bias_N1QK` hides what of them is out
    of reach or of another text.
    """

    size: int
    left: int
    right: int
    bias_N1QK: Tensor

    def attend(self, q_RHD: Tensor, k_RHD: Tensor, v_RHD: Tensor, dropout: float) -> Tensor:
        """Rows of all the blocks in, as many out."""
        q = q_RHD.unflatten(0, (-1, self.size)).transpose(1, 2)
        k, v = (_Windowed.apply(x, self.size, self.left, self.right).transpose(1, 2) for x in (k_RHD, v_RHD))
        out = dense_attention(q, k, v, self.bias_N1QK, dropout)
        return out.transpose(1, 2).flatten(0, 1)


class _Windowed(torch.autograd.Function):
    """Blocks of keys (N * size, H, D) to overlapping windows (N, width, H, D): a view, so no key is copied.

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


@dataclasses.dataclass(frozen=True)
class SdpaPlan:
    """Pieces that together hold every token once.

    Attributes:
        pieces: what is attended in one call each.
        rows: how many rows each piece takes, those without a token included.
        gather: (all pieces' rows,) the token of each row, any token where there is none; None where the packed
            row is the pieces' rows already.
        order_T: (T,) the row of each token in the pieces' outputs; None likewise.
    """

    pieces: list[Whole | Windows]
    rows: list[int]
    gather: Tensor | None
    order_T: Tensor | None


class SdpaAttention(AttentionBackend):
    """`torch.nn.functional.scaled_dot_product_attention` on whole texts and on windows."""

    name = "sdpa"

    def plan(self, packing: Packing, reach: Reach, dtype: torch.dtype) -> SdpaPlan:
        """Sort the texts into those attended alone, together with others, and in windows."""
        causal = reach[1] == 0
        windowed, alone, shared = self._sort(packing, reach)
        pieces: list[Whole | Windows] = []
        layouts: list[Layout] = []
        for texts in alone:
            width = packing.lengths[texts[0]]
            pieces.append(Whole(len(texts), width, causal))
            layouts.append(lay_out(texts, [width] * len(texts), packing))
        for width, texts in shared.items():
            layout = lay_out(texts, [width] * len(texts), packing)
            bias_N1QK = None
            if not causal:
                bias_N1QK = _bias(layout.held.unflatten(0, (-1, width)), dtype)[:, None, None].expand(-1, 1, width, -1)
            pieces.append(Whole(len(texts), width, causal, bias_N1QK))
            layouts.append(layout)
        if windowed:
            left, right = reach
            assert left is not None
            assert right is not None
            windows, layout = _windows(windowed, packing, (left, right), dtype)
            pieces.append(windows)
            layouts.append(layout)
        rows = [len(layout.tokens) for layout in layouts]
        return SdpaPlan(pieces, rows, *way(layouts, packing))

    @staticmethod
    def _sort(packing: Packing, reach: Reach) -> tuple[list[int], list[list[int]], dict[int, list[int]]]:
        """Texts for windows, runs of texts of one length, and short texts by their rounded length."""
        lengths = packing.lengths
        left, right = reach
        spans = [length - 1 for length in lengths]
        if packing.gaps:
            spans = [int(p[-1]) if len(p) else 0 for p in packing.positions_T.split(lengths)]
        windowed: list[int] = []
        alone: list[list[int]] = []
        shared: dict[int, list[int]] = {}
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
        return windowed, alone, shared

    def attend(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, plan: SdpaPlan, dropout: float = 0.0) -> Tensor:
        """Attention outputs, piece by piece."""
        if not plan.pieces:
            return v_THD
        if plan.gather is not None:
            assert plan.order_T is not None
            q_THD, k_THD, v_THD = (to_rows(x, plan.gather, plan.order_T) for x in (q_THD, k_THD, v_THD))
        kernel = sdpa_kernel(SDPBackend.MATH) if self.deterministic and q_THD.is_cuda else contextlib.nullcontext()
        with kernel:
            outs = [
                piece.attend(q, k, v, dropout)
                for piece, q, k, v in zip(
                    plan.pieces, *(x.split(plan.rows) for x in (q_THD, k_THD, v_THD)), strict=True
                )
            ]
        out_THD = torch.cat(outs) if len(outs) > 1 else outs[0]
        return out_THD if plan.order_T is None else from_rows(out_THD, plan.order_T)


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def _windows(texts: list[int], packing: Packing, reach: tuple[int, int], dtype: torch.dtype) -> tuple[Windows, Layout]:
    # A block is about the reach: smaller ones visit fewer keys that are out of sight, larger ones run faster.
    size = min(max(-(-max(reach) // 16) * 16, 16), 128)
    left, right = (-(-r // size) for r in reach)
    layout = lay_out(texts, [-(-packing.lengths[i] // size) * size for i in texts], packing)
    # A query sees a key of its own text within reach. Rows that hold no token see each other, lest they be NaN.
    text = torch.where(layout.held, packing.text_T[layout.tokens], -1)
    position = packing.positions_T[layout.tokens]
    guard, width = (left * size, right * size), (left + 1 + right) * size
    text_NK, position_NK = (
        F.pad(text, guard, value=-2).unfold(0, width, size),
        F.pad(position, guard).unfold(0, width, size),
    )
    text_NQ, position_NQ = text.unflatten(0, (-1, size)), position.unflatten(0, (-1, size))
    ahead_NQK = position_NK[:, None, :] - position_NQ[:, :, None]
    seen_NQK = (text_NK[:, None, :] == text_NQ[:, :, None]) & (ahead_NQK >= -reach[0]) & (ahead_NQK <= reach[1])
    seen_NQK |= (text_NQ == -1)[:, :, None]
    return Windows(size, left, right, _bias(seen_NQK[:, None], dtype)), layout
