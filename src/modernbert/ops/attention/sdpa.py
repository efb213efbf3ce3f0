"""Attention by PyTorch's scaled_dot_product_attention: portable, with no T x T tensor and no work for padding.

A text that sees all of itself is attended whole: long ones alone, short ones together with others of the same
rounded length. A longer text in a local layer is cut into blocks of queries, each against the few blocks of keys
within its reach, which makes the work linear in the tokens. How a text is cut depends on that text alone, so its
numbers do not depend on its batch.

Shapes: T tokens of all texts together, N texts or blocks, Q queries and K keys of each, H heads, D head size.
"""

from __future__ import annotations

import contextlib
import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from modernbert.ops.attention.base import AttentionBackend
from modernbert.ops.packing import Packing

_ALONE = 256  # texts longer than this are worth a call of their own
_ROUND = 16  # shorter ones share a call with those of the same length, rounded up to this


@dataclasses.dataclass(frozen=True)
class Span:
    """A run of equally long texts that lie end to end and are attended whole, without a copy."""

    start: int
    texts: int
    length: int


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Short texts of about one length. `rows_NQ` are their tokens (0 where there is none), `bias_N1QK` hides those."""

    rows_NQ: Tensor
    bias_N1QK: Tensor
    filled: Tensor  # the places of `rows_NQ`, flattened, that hold a token


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Longer texts in a local layer, each cut into blocks of `size` queries; `left` blocks of keys come before."""

    size: int
    left: int
    right: int
    rows: Tensor  # (N * size,) the token of each query, 0 where there is none
    bias_N1QK: Tensor
    filled: Tensor


@dataclasses.dataclass(frozen=True)
class SdpaPlan:
    """Pieces that together hold every token once, and where each token's row is in their outputs laid end to end."""

    pieces: list[Span | Bucket | Blocks]
    order_T: Tensor | None  # None where the pieces' outputs are in order already


class SdpaAttention(AttentionBackend):
    """`torch.nn.functional.scaled_dot_product_attention` on whole texts and on windows."""

    name = "sdpa"

    def plan(self, packing: Packing, reach: tuple[int, int] | None, dtype: torch.dtype) -> SdpaPlan:
        """Sort the texts into spans, buckets and blocks."""
        device = packing.positions_T.device
        starts, lengths = packing.starts, packing.lengths
        windowed = self._windowed(packing, reach)
        shorts: dict[int, list[int]] = {}
        alone: list[int] = []
        for i, length in enumerate(lengths):
            if length and not windowed[i]:
                if length > _ALONE:
                    alone.append(i)
                else:
                    shorts.setdefault(-(-length // _ROUND) * _ROUND, []).append(i)

        pieces: list[Span | Bucket | Blocks] = []
        tokens: list[Tensor] = []  # for each piece the tokens of its output, in order
        for span in _runs(alone, starts, lengths):
            pieces.append(span)
            tokens.append(torch.arange(span.start, span.start + span.texts * span.length, device=device))
        for width, texts in shorts.items():
            bucket, filled_tokens = _bucket(width, texts, starts, lengths, dtype, device)
            pieces.append(bucket)
            tokens.append(filled_tokens)
        if any(windowed):
            assert reach is not None
            blocks, filled_tokens = _blocks([i for i, w in enumerate(windowed) if w], packing, reach, dtype)
            pieces.append(blocks)
            tokens.append(filled_tokens)
        order = torch.cat(tokens) if tokens else torch.empty(0, dtype=torch.int64, device=device)
        in_order = bool((order[1:] > order[:-1]).all())
        return SdpaPlan(pieces, None if in_order else order.argsort())

    @staticmethod
    def _windowed(packing: Packing, reach: tuple[int, int] | None) -> list[bool]:
        """Which texts are longer than what a token at either end sees."""
        if reach is None:
            return [False] * len(packing.lengths)
        if not packing.gaps:
            return [length - 1 > min(reach) for length in packing.lengths]
        last = [int(p[-1]) if len(p) else 0 for p in packing.positions_T.split(packing.lengths)]
        return [position > min(reach) for position in last]

    def attend(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, plan: SdpaPlan, dropout: float = 0.0) -> Tensor:
        """Attention outputs, piece by piece."""
        outs = [v_THD[:0]]
        kernel = sdpa_kernel(SDPBackend.MATH) if self.deterministic and q_THD.is_cuda else contextlib.nullcontext()
        with kernel:
            for piece in plan.pieces:
                outs.append(_attend_piece(piece, q_THD, k_THD, v_THD, dropout))
        out_THD = torch.cat(outs) if len(outs) > 2 else outs[-1]
        return out_THD if plan.order_T is None else out_THD.index_select(0, plan.order_T)


def _attend_piece(piece: Span | Bucket | Blocks, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, dropout: float) -> Tensor:
    if isinstance(piece, Span):
        rows = slice(piece.start, piece.start + piece.texts * piece.length)
        q, k, v = (x[rows].unflatten(0, (piece.texts, piece.length)).transpose(1, 2) for x in (q_THD, k_THD, v_THD))
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(0, 1)
    if isinstance(piece, Bucket):
        rows = piece.rows_NQ.flatten()
        q, k, v = (
            x.index_select(0, rows).unflatten(0, piece.rows_NQ.shape).transpose(1, 2) for x in (q_THD, k_THD, v_THD)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=piece.bias_N1QK, dropout_p=dropout)
        return out.transpose(1, 2).flatten(0, 1).index_select(0, piece.filled)
    q = q_THD.index_select(0, piece.rows).unflatten(0, (-1, piece.size)).transpose(1, 2)
    width = (piece.left + 1 + piece.right) * piece.size
    guard = (0, 0, 0, 0, piece.left * piece.size, piece.right * piece.size)
    # Neighbouring windows overlap: `unfold` is a view, so no key is copied for each window that sees it.
    k, v = (
        F.pad(x.index_select(0, piece.rows), guard).unfold(0, width, piece.size).permute(0, 1, 3, 2)
        for x in (k_THD, v_THD)
    )
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=piece.bias_N1QK, dropout_p=dropout)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, piece.filled)


def _runs(texts: list[int], starts: tuple[int, ...], lengths: tuple[int, ...]) -> list[Span]:
    """Join neighbours of equal length."""
    spans: list[Span] = []
    for i in texts:
        last = spans[-1] if spans else None
        if last and last.length == lengths[i] and last.start + last.texts * last.length == starts[i]:
            spans[-1] = Span(last.start, last.texts + 1, last.length)
        else:
            spans.append(Span(starts[i], 1, lengths[i]))
    return spans


def _layout(
    texts: list[int], widths: list[int], starts: tuple[int, ...], lengths: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Lay texts out one after another in `widths` rows each: the token of each row, and which rows hold one."""
    width_N = torch.tensor(widths)
    owner = torch.arange(len(texts)).repeat_interleave(width_N)
    place = torch.arange(int(width_N.sum())) - (width_N.cumsum(0) - width_N)[owner]
    held = place < torch.tensor([lengths[i] for i in texts])[owner]
    rows = torch.where(held, torch.tensor([starts[i] for i in texts])[owner] + place, 0)
    return rows.to(device), held.to(device)


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def _bucket(
    width: int,
    texts: list[int],
    starts: tuple[int, ...],
    lengths: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Bucket, Tensor]:
    rows, held = _layout(texts, [width] * len(texts), starts, lengths, device)
    held_NK = held.unflatten(0, (-1, width))
    bias_N1QK = _bias(held_NK, dtype)[:, None, None, :].expand(-1, 1, width, -1)
    filled = held.nonzero().squeeze(1)
    return Bucket(rows.unflatten(0, (-1, width)), bias_N1QK, filled), rows[filled]


def _blocks(
    texts: list[int], packing: Packing, reach: tuple[int, int], dtype: torch.dtype
) -> tuple[Blocks, Tensor]:
    # The block is about the reach: smaller ones visit fewer keys that are out of sight, larger ones run faster.
    size = min(max(-(-max(reach) // 16) * 16, 16), 128)
    left, right = (-(-r // size) for r in reach)
    device = packing.positions_T.device
    starts, lengths = packing.starts, packing.lengths
    rows, held = _layout(texts, [-(-lengths[i] // size) * size for i in texts], starts, lengths, device)
    # A query sees a key of its own text within reach. Rows that hold no token belong to a text of their own.
    text = torch.where(held, packing.text_T[rows], -1)
    guard = (left * size, right * size)
    width = (left + 1 + right) * size
    text_NK = F.pad(text, guard, value=-2).unfold(0, width, size)
    position = packing.positions_T[rows]
    ahead_NQK = F.pad(position, guard).unfold(0, width, size)[:, None, :] - position.unflatten(0, (-1, size))[:, :, None]
    seen_NQK = text_NK[:, None, :] == text.unflatten(0, (-1, size))[:, :, None]
    seen_NQK &= (ahead_NQK >= -reach[0]) & (ahead_NQK <= reach[1])
    seen_NQK |= (text.unflatten(0, (-1, size)) == -1)[:, :, None]  # a row of no token must see something: no NaN
    filled = held.nonzero().squeeze(1)
    return Blocks(size, left, right, rows, _bias(seen_NQK[:, None], dtype), filled), rows[filled]
