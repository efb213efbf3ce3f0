"""One forward pass with a cache: which texts begin, which go on by one token or by several, and how each attends.

Shapes: T new tokens of all texts together, R rows of storage, H heads, D head size, B texts.
"""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from modernbert.config import Reach
from modernbert.decoding.cached import Continued, Extended, Fresh, Gathered, Piece, Stretch, Windowed
from modernbert.nn.attention.contract import AttentionBackend
from modernbert.nn.attention.eager import EagerAttention
from modernbert.nn.execution import Weights
from modernbert.nn.linear import products_dtype
from modernbert.nn.packing import Packing, on_device

if TYPE_CHECKING:
    from modernbert.decoding.cache import Storage


class Pass:
    """What the layers of all kinds share.

    Args:
        packing: the new tokens.
        past: tokens of each text before them.
        ends: the position of each text's next token.
    """

    def __init__(self, packing: Packing, past: list[int], ends: list[int]) -> None:
        self.packing = packing
        self.past = past
        self.offsets_B = on_device(ends, packing.positions_T.device)
        self.positions_T = packing.positions_T + self.offsets_B[packing.text_T]
        new = list(enumerate(packing.lengths))
        self.fresh = [i for i, n in new if n and not past[i]]
        self.steps = [i for i, n in new if n == 1 and past[i]]
        self.later = [i for i, n in new if n > 1 and past[i]]

    def rows_of(self, texts: list[int]) -> Tensor | None:
        """The new rows of these texts; None where they are all rows, in order."""
        if len(texts) == len(self.packing.lengths) and texts == sorted(texts):
            return None
        spans = self.packing.spans
        parts = [torch.arange(*spans[i]) for i in texts]
        rows = torch.cat([torch.empty(0, dtype=torch.int64), *parts]).to(self.positions_T.device)
        return None if len(rows) == self.packing.tokens and texts == sorted(texts) else rows

    def of(self, texts: list[int]) -> Packing:
        """The packing of these texts' new tokens alone, each from position 0."""
        if len(texts) == len(self.packing.lengths):
            return self.packing
        rows = self.rows_of(texts)
        packing = Packing.from_lengths([self.packing.lengths[i] for i in texts], self.positions_T.device)
        if self.packing.gaps:
            taken = self.packing.positions_T if rows is None else self.packing.positions_T[rows]
            packing = Packing(packing.lengths, taken, packing.text_T, gaps=True)
        return packing


class Steps(NamedTuple):
    """One new token each of N texts.

    Attributes:
        of_N: which of the new tokens they are; None where they are all of them.
        rows_N: the row of storage that each goes to.
        first_N: the first row that each attends to.
        length_N: how many rows that is, free ones of a ring included.
        most: the largest of them.
        positions_N: of the tokens.
        storage: where keys and values lie.
        left: how far back a token sees; None is all of its text, whose rows then hold nothing else.
    """

    of_N: Tensor | None
    rows_N: Tensor
    first_N: Tensor
    length_N: Tensor
    most: int
    positions_N: Tensor
    storage: Storage
    left: int | None


class Continuation:
    """How the layers of one kind attend in one forward pass: some pieces, the new tokens' rows, and the way back.

    Args:
        shared: the forward pass.
        storage: where the layers' keys and values lie.
        reach: how far the layers attend.
        backend: serves what attends to new tokens alone.
        dtype: of q, k and v.
        gather: attend in the slow, obvious way, which gives weights and lets gradients pass.
        weights: where attention weights go, if they are wanted.
    """

    def __init__(
        self,
        shared: Pass,
        storage: Storage,
        reach: Reach,
        backend: AttentionBackend,
        dtype: torch.dtype,
        gather: bool,
        weights: Weights | None = None,
    ) -> None:
        self.storage, self.weights = storage, weights
        self.shared = shared
        self.before: list[Piece] = []
        self.gathered: Gathered | None = None
        lengths, past = shared.packing.lengths, shared.past
        if gather:
            self.gathered = self._gather(reach)
        else:
            if shared.fresh:
                plan = backend.plan(shared.of(shared.fresh), reach, dtype)
                self.before.append(Fresh(shared.rows_of(shared.fresh), backend, plan))
            if shared.later and reach.left is not None:
                self.before.append(self._extend(reach, backend, dtype))
        new = [(i, max(past[i], storage.kept(i, past[i] + n)), past[i] + n) for i, n in enumerate(lengths)]
        self.rows = storage.rows(new)
        self.of_T: Tensor | None = None
        if len(self.rows) < shared.packing.tokens:
            spans = shared.packing.spans
            parts = [
                torch.arange(end - (last - first), end) for (_, end), (_, first, last) in zip(spans, new, strict=True)
            ]
            self.of_T = torch.cat(parts).to(self.rows.device)
        written = shared.positions_T if self.of_T is None else shared.positions_T[self.of_T]
        storage.positions_R.index_copy_(0, self.rows, written)
        self.reach, self.dtype = reach, dtype

    @functools.cached_property
    def after(self) -> list[Piece]:
        """What attends to stored rows, once the new ones are among them."""
        shared, storage = self.shared, self.storage
        if self.gathered is not None:
            return []
        if self.reach.left is not None:
            return [self._windows(self.reach, self.dtype)] if shared.steps else []
        later = [Continued(shared.rows_of([i]), storage.starts[i], shared.past[i]) for i in shared.later]
        return [*self._stretches(), *later]

    @functools.cached_property
    def back(self) -> Tensor | None:
        """Where each new token's output stands among the pieces' outputs; None where they are in order."""
        pieces: list[Piece] = [*self.before, *self.after]
        if len(pieces) > 1:
            rows = torch.cat([piece.rows_P for piece in pieces if piece.rows_P is not None])
            return torch.empty_like(rows).index_copy_(0, rows, torch.arange(len(rows), device=rows.device))
        if pieces and pieces[0].rows_P is not None:
            return torch.argsort(pieces[0].rows_P)
        return None

    def as_steps(self) -> Steps | None:
        """What our own kernels need for the texts that go on by one token; None where there are none."""
        shared, storage = self.shared, self.storage
        if self.gathered is not None or not shared.steps:
            return None
        of_N = shared.rows_of(shared.steps) if shared.fresh or shared.later else None
        rows_N = (
            self.rows if of_N is None else storage.rows([(i, shared.past[i], shared.past[i] + 1) for i in shared.steps])
        )
        lengths = [storage.ring or shared.past[i] + 1 for i in shared.steps]
        first_N, length_N = (torch.tensor(x) for x in ([storage.starts[i] for i in shared.steps], lengths))
        positions_N = shared.positions_T if of_N is None else shared.positions_T[of_N]
        return Steps(of_N, rows_N, first_N, length_N, max(lengths), positions_N, storage, self.reach.left)

    def __call__(self, layer: int, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, dropout: float = 0.0) -> Tensor:
        """Attention outputs (T, H, D) of a layer's new tokens, which are added to the cache."""
        stored = self.storage.layers.get(layer)
        if self.gathered is not None:
            out_THD, of_texts = self.gathered.attend_with_weights(q_THD, k_THD, v_THD, stored)
            if self.weights is not None:
                self.weights[layer] = of_texts
            self.storage.write(layer, k_THD, v_THD, self.rows, self.of_T)
            return out_THD
        outs = [piece.attend(q_THD, k_THD, v_THD, stored) for piece in self.before]
        self.storage.write(layer, k_THD, v_THD, self.rows, self.of_T)
        outs += [piece.attend(q_THD, k_THD, v_THD, self.storage.layers[layer]) for piece in self.after]
        if not outs:
            return v_THD
        out_THD = torch.cat(outs) if len(outs) > 1 else outs[0]
        return out_THD if self.back is None else out_THD.index_select(0, self.back)

    def _join(self, texts: list[int], tails: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor, Packing, Tensor]:
        """Rows of the tails, the order of tails and new rows text by text, its packing, and what of it is new."""
        shared = self.shared
        tail_rows = self.storage.rows(tails)
        kept = [last - first for _, first, last in tails]
        new = [shared.packing.lengths[i] for i in texts]
        tail_starts, new_starts = ([0, *itertools.accumulate(n)] for n in (kept, new))
        order, is_new = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.bool)]
        for i in range(len(texts)):
            order += [
                torch.arange(tail_starts[i], tail_starts[i + 1]),
                torch.arange(new_starts[i], new_starts[i + 1]) + tail_starts[-1],
            ]
            is_new.append(torch.arange(kept[i] + new[i]) >= kept[i])
        device = shared.positions_T.device
        order_T, new_T = torch.cat(order).to(device), torch.cat(is_new).to(device).nonzero().squeeze(1)
        rows = shared.rows_of(texts)
        mine = shared.positions_T if rows is None else shared.positions_T[rows]
        positions = torch.cat([self.storage.positions_R[tail_rows], mine])[order_T]
        lengths = tuple(a + b for a, b in zip(kept, new, strict=True))
        packing = Packing.from_lengths(lengths, device)
        return tail_rows, order_T, Packing(lengths, positions, packing.text_T, gaps=True), new_T

    def _gather(self, reach: Reach) -> Gathered:
        shared = self.shared
        texts = list(range(len(shared.past)))
        tails = [(i, self.storage.kept(i, shared.past[i]), shared.past[i]) for i in texts]
        tail_rows, order, keys, _ = self._join(texts, tails)
        queries = Packing(shared.packing.lengths, shared.positions_T, shared.packing.text_T)
        plan = EagerAttention().plan(queries, reach, torch.float32, keys)
        return Gathered(tail_rows, order, plan, [first for _, first, _ in tails])

    def _extend(self, reach: Reach, backend: AttentionBackend, dtype: torch.dtype) -> Extended:
        shared, texts = self.shared, self.shared.later
        assert reach.left is not None
        tails = [(i, max(0, shared.past[i] - reach.left), shared.past[i]) for i in texts]
        tail_rows, order, joined, new_P = self._join(texts, tails)
        # A plan counts positions from each text's first token.
        first_B = torch.stack([p[0] for p in joined.positions_T.split(joined.lengths)])
        packing = Packing(joined.lengths, joined.positions_T - first_B[joined.text_T], joined.text_T, gaps=True)
        plan = backend.plan(packing, reach, dtype)
        return Extended(shared.rows_of(texts), backend, tail_rows, order, new_P, plan)

    def _windows(self, reach: Reach, dtype: torch.dtype) -> Windowed:
        """All texts that go on by one token, in the order of storage."""
        storage, shared = self.storage, self.shared
        width = storage.ring
        assert width is not None
        assert reach.left is not None
        texts = sorted(shared.steps, key=lambda i: storage.starts[i])
        everything = [storage.starts[i] for i in texts] == list(range(0, len(storage.positions_R), width))
        slots = None if everything else torch.cat([torch.arange(width) + storage.starts[i] for i in texts])
        slots = None if slots is None else slots.to(storage.positions_R.device)
        rows = shared.rows_of(texts)
        at_NW = (storage.positions_R if slots is None else storage.positions_R[slots]).unflatten(0, (-1, width))
        behind_NW = (shared.positions_T if rows is None else shared.positions_T[rows])[:, None] - at_NW
        seen = (behind_NW >= 0) & (behind_NW <= reach.left)
        dtype = products_dtype(dtype, seen.device)
        bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
        return Windowed(rows, slots, width, bias[:, None, None])

    def _stretches(self) -> list[Stretch]:
        """Texts that go on by one token, those together that are of one length and lie one after another."""
        storage, shared = self.storage, self.shared
        groups: list[list[int]] = []
        for i in sorted(shared.steps, key=lambda i: storage.starts[i]):
            last = groups[-1][-1] if groups else None
            if (
                last is not None
                and shared.past[last] == shared.past[i]
                and storage.capacities[last] == storage.capacities[i]
                and storage.starts[last] + storage.capacities[last] == storage.starts[i]
            ):
                groups[-1].append(i)
            else:
                groups.append([i])
        return [
            Stretch(
                shared.rows_of(group),
                storage.starts[group[0]],
                len(group),
                storage.capacities[group[0]],
                shared.past[group[0]] + 1,
            )
            for group in groups
        ]
