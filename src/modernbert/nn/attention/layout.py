"""Where tokens go when a backend wants them in rows of its own, and the way back.

Shapes: T tokens of all texts together, R rows, H heads, D head size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from modernbert.nn.packing import Packing


class Layout(NamedTuple):
    """The token of each row of a piece, and which rows hold one at all."""

    tokens: Tensor
    held: Tensor


def lay_out(texts: list[int], widths: list[int], packing: Packing) -> Layout:
    """Lay texts out one after another in `widths` rows each."""
    starts, device = packing.starts, packing.positions_T.device
    width_N = torch.tensor(widths)
    owner = torch.arange(len(texts)).repeat_interleave(width_N)
    place = torch.arange(int(width_N.sum())) - (width_N.cumsum(0) - width_N)[owner]
    held = place < torch.tensor([packing.lengths[i] for i in texts])[owner]
    tokens = torch.where(held, torch.tensor([starts[i] for i in texts])[owner] + place, 0)
    return Layout(tokens.to(device), held.to(device))


def way(layouts: list[Layout], packing: Packing) -> tuple[Tensor | None, Tensor | None]:
    """The token of each row of all pieces, and the row of each token; None twice where rows are tokens, in order."""
    empty = packing.positions_T[:0]
    gather = torch.cat([empty, *(layout.tokens for layout in layouts)])
    held = torch.cat([empty.bool(), *(layout.held for layout in layouts)])
    if bool(held.all()) and bool((gather[1:] > gather[:-1]).all()):
        return None, None
    order_T = torch.empty_like(packing.positions_T)
    filled = held.nonzero().squeeze(1)
    order_T[gather[filled]] = filled
    return gather, order_T


class _ToRows(torch.autograd.Function):
    """Tokens to the pieces' rows. Rows that hold no token take any, and give no gradient: nobody sees them."""

    @staticmethod
    def forward(ctx: Any, x_THD: Tensor, gather: Tensor, order_T: Tensor) -> Tensor:
        ctx.save_for_backward(order_T)
        return x_THD.index_select(0, gather)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None


class _FromRows(torch.autograd.Function):
    """The pieces' rows back to tokens, each of which is in one row."""

    @staticmethod
    def forward(ctx: Any, x_RHD: Tensor, order_T: Tensor) -> Tensor:
        ctx.save_for_backward(order_T)
        ctx.rows = len(x_RHD)
        return x_RHD.index_select(0, order_T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_THD,) = grads
        rows = grad_THD.new_zeros((ctx.rows, *grad_THD.shape[1:]))
        return rows.index_copy_(0, ctx.saved_tensors[0], grad_THD), None


def to_rows(x_THD: Tensor, gather: Tensor, order_T: Tensor) -> Tensor:
    """Tokens to the pieces' rows, by what `way` gives."""
    if torch.compiler.is_compiling() or not x_THD.requires_grad:
        return x_THD.index_select(0, gather)
    rows: Tensor = _ToRows.apply(x_THD, gather, order_T)
    return rows


def from_rows(x_RHD: Tensor, order_T: Tensor) -> Tensor:
    """The pieces' rows back to tokens."""
    if torch.compiler.is_compiling() or not x_RHD.requires_grad:
        return x_RHD.index_select(0, order_T)
    tokens: Tensor = _FromRows.apply(x_RHD, order_T)
    return tokens
