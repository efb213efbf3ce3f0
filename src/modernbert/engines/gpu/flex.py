"""Attention by PyTorch's flex attention: for cards that FlashAttention's kernels are not made for.

Every text begins at a block of its own, so that which numbers are summed together, and with that a text's bits, does
not follow from its batch. Blocks out of reach are not visited; blocks that are seen whole are not masked.

Shapes: T tokens of all texts together, R rows of a piece, Q blocks of queries, K blocks of keys, H heads, D head size.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib.util
import logging
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from modernbert.errors import BackendError
from modernbert.nn.attention.contract import AttentionBackend, Reach
from modernbert.nn.attention.sdpa import Layout, SdpaAttention, SdpaPlan, lay_out, reorder, way
from modernbert.nn.packing import Packing

logger = logging.getLogger(__name__)

BLOCK = 128  # rows; what the generated kernels are cut for
# Blocks of a call, but for a longer text. On a card the mask of blocks is square; on a CPU, where PyTorch computes
# every score of a call, each text has a call of its own.
_PIECE = {"cpu": 0}
_PIECE_ON_CARD = 256
_FAR = 2**40  # a position that nothing has
_KEPT = 16  # masks that are kept for batches of the same lengths


@dataclasses.dataclass(frozen=True)
class FlexPlan:
    """Pieces that together hold every token once."""

    masks: list[BlockMask]  # one a piece
    rows: list[int]  # how many rows each piece takes, those without a token included
    gather: Tensor | None  # this and the next are of `nn.attention.sdpa.way`
    order_T: Tensor | None
    packing: Packing
    reach: Reach
    dtype: torch.dtype

    @functools.cached_property
    def sdpa(self) -> SdpaPlan:
        """The same for the backend that takes what this one does not."""
        return SdpaAttention().plan(self.packing, self.reach, self.dtype)


class FlexAttention(AttentionBackend):
    """`torch.nn.attention.flex_attention`, compiled on a card, as it is on a CPU.

    What it has not (dropout, gradients on a CPU) sdpa serves.
    """

    name = "flex_attention"

    def __init__(self, deterministic: bool = False) -> None:
        super().__init__(deterministic)
        reason = why_not()
        if reason:
            raise BackendError(f"attn_implementation 'flex_attention' cannot run here: {reason}")
        self._kept: collections.OrderedDict[Any, FlexPlan] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:  # a copy plans anew
        return FlexAttention, (self.deterministic,)

    def plan(self, packing: Packing, reach: Reach, dtype: torch.dtype) -> FlexPlan:
        """Which blocks of keys each block of queries visits; the last plan for the same lengths, where there is one."""
        # What was made in inference mode cannot be saved for a backward pass.
        where = packing.positions_T.device, torch.is_inference_mode_enabled()
        key = None if packing.gaps else (packing.lengths, tuple(reach), dtype, where)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        pieces = [
            lay_out(texts, [_blocks(packing.lengths[i]) * BLOCK for i in texts], packing) for texts in _pieces(packing)
        ]
        masks = [_mask(layout, packing, reach) for layout in pieces]
        plan = FlexPlan(masks, [len(layout.tokens) for layout in pieces], *way(pieces, packing), packing, reach, dtype)
        if key is not None:
            with self._lock:
                self._kept[key] = plan
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
        return plan

    def attend(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, plan: FlexPlan, dropout: float = 0.0) -> Tensor:
        wanted = torch.is_grad_enabled() and (q_THD.requires_grad or k_THD.requires_grad or v_THD.requires_grad)
        without = wanted and (q_THD.device.type == "cpu" or self.deterministic)
        if dropout or without or not plan.masks:
            return SdpaAttention(self.deterministic).attend(q_THD, k_THD, v_THD, plan.sdpa, dropout)
        if plan.gather is not None and plan.order_T is not None:
            q_THD, k_THD, v_THD = (reorder(x, plan.gather, plan.order_T) for x in (q_THD, k_THD, v_THD))
        pieces = zip(plan.masks, *(x.split(plan.rows) for x in (q_THD, k_THD, v_THD)), strict=True)
        outs = [_attend(q, k, v, mask) for mask, q, k, v in pieces]
        out_THD = torch.cat(outs) if len(outs) > 1 else outs[0]
        return out_THD if plan.order_T is None else reorder(out_THD, plan.order_T)


def why_not() -> str:
    """Why it cannot run on this machine; nothing where it can."""
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
        return "on a card it is compiled by Triton, which is not installed; choose 'sdpa', which is as exact"
    return ""


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True)


def _attend(q_RHD: Tensor, k_RHD: Tensor, v_RHD: Tensor, mask: BlockMask) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q_RHD, k_RHD, v_RHD))
    if q.device.type != "cpu":
        return _compiled()(q, k, v, block_mask=mask)[0].transpose(0, 1)
    with warnings.catch_warnings():  # it says that it is slow, which is known
        warnings.simplefilter("ignore")
        out: Tensor = flex_attention(q, k, v, block_mask=mask)
    return out[0].transpose(0, 1)


def _blocks(length: int) -> int:
    return -(-length // BLOCK)


def _pieces(packing: Packing) -> list[list[int]]:
    """Texts that are attended in one call."""
    pieces: list[list[int]] = []
    most, room = _PIECE.get(packing.positions_T.device.type, _PIECE_ON_CARD), 0
    for text, length in enumerate(packing.lengths):
        if not length:
            continue
        if _blocks(length) > room:
            pieces.append([])
            room = most
        pieces[-1].append(text)
        room -= _blocks(length)
    return pieces


def _mask(layout: Layout, packing: Packing, reach: Reach) -> BlockMask:
    """The mask of a piece: which blocks are visited, which of them whole, and what is seen in the others."""
    position_R = packing.positions_T[layout.tokens]
    held_R = layout.held
    text_R = torch.where(held_R, packing.text_T[layout.tokens], -1)  # rows without a token are seen by their like
    held_QB = held_R.unflatten(0, (-1, BLOCK))
    position_QB = position_R.unflatten(0, (-1, BLOCK))
    low_Q = torch.where(held_QB, position_QB, _FAR).amin(1)
    high_Q = torch.where(held_QB, position_QB, -1).amax(1)
    text_Q = packing.text_T[layout.tokens[::BLOCK]]  # every block begins with a token
    nearest_QK, farthest_QK = low_Q[None, :] - high_Q[:, None], high_Q[None, :] - low_Q[:, None]  # key minus query
    left, right = (-_FAR if reach[0] is None else -reach[0]), (_FAR if reach[1] is None else reach[1])
    visited_QK = (text_Q[None, :] == text_Q[:, None]) & (farthest_QK >= left) & (nearest_QK <= right)
    whole_QK = held_QB.all(1)[None, :] & (nearest_QK >= left) & (farthest_QK <= right)

    # A tensor and no branches: one compiled kernel serves every window.
    ends_2 = torch.tensor([left, right]).to(position_R)

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        ahead = position_R[key] - position_R[query]
        return (text_R[key] == text_R[query]) & (ahead >= ends_2[0]) & (ahead <= ends_2[1])

    count_Q, order_QK = _numbers(visited_QK & ~whole_QK)
    whole_Q, whole_order_QK = _numbers(visited_QK & whole_QK)
    rows = len(held_R)
    return BlockMask.from_kv_blocks(
        count_Q, order_QK, whole_Q, whole_order_QK, BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(rows, rows)
    )


def _numbers(chosen_QK: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys are chosen for each block of queries, and their numbers, rising; then the others'."""
    order_QK = torch.argsort(~chosen_QK, dim=1, stable=True).to(torch.int32)
    return chosen_QK.sum(1, dtype=torch.int32)[None, None], order_QK[None, None]
