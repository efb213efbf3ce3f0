"""What one kind of layer keeps of the texts so far, and how a forward pass goes on from it.

New tokens attend in one of three ways: joined with what precedes them and handed to an attention backend, to keys in
place, where they are stored, or, slowly, with every pair of tokens. Which it is follows from the text alone, so that
its numbers do not depend on its batch (docs/invariance.md). Storage may be of a wider dtype than the new tokens, whose
results are then rounded to theirs.

Shapes: R slots of storage, T new tokens of all texts together, P of them in a part, N texts of a part, J tokens that
are joined, Q queries and K keys of a text, W slots of a window, H heads, D head size.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from modernbert.config import Reach
from modernbert.errors import InputError
from modernbert.nn.attention.contract import AttentionBackend
from modernbert.nn.attention.eager import EagerAttention
from modernbert.nn.attention.sdpa import dense_attention
from modernbert.nn.execution import AttentionWeights
from modernbert.nn.linear import products_dtype
from modernbert.nn.packing import Packing, on_device, send

_ROOM = 128  # free slots that a growing region gets; it is copied whenever they are full
_MOST_RESERVED = 4096  # free slots that may be asked for ahead
_NOWHERE = -(2**40)  # position of a slot that holds no token: out of everyone's reach
_CHUNK = 256  # queries a call where the mask is a tensor

Pair = tuple[Tensor, Tensor]  # keys and values of a layer, each (R, H, D)


class Region(NamedTuple):
    """The slots of one text, token i in slot `start + i % capacity`."""

    start: int
    capacity: int
    first: int = 0  # the first token that is held, where a crop left fewer than there is room for

    def kept(self, length: int) -> int:
        """The first token that is held once the text has this length."""
        return max(self.first, length - self.capacity)


class Storage:
    """Slots for keys and values of all layers of one kind, a region of them for each text."""

    def __init__(self, reach: Reach, slack: int) -> None:
        self.reach = reach
        self.ring = None if reach.left is None else reach.left + 1 + slack  # a text's last tokens are kept; None: all
        self.room_ahead = _ROOM
        self.regions: list[Region] = []
        self.positions_R = torch.empty(0, dtype=torch.int64)  # of the token in each slot
        self.layers: dict[int, Pair] = {}  # by their numbers, once they have written

    @property
    def nbytes(self) -> int:
        return self.positions_R.nbytes + sum(k.nbytes + v.nbytes for k, v in self.layers.values())

    def check(self, lengths: Sequence[int], shapes: Mapping[int, tuple[int, int]]) -> None:
        """Refuse tables that do not fit each other or the layers, as a damaged file may hold; raises `InputError`."""
        slots = len(self.positions_R)
        inside = len(lengths) == len(self.regions) and all(
            at.start >= 0 and at.start + at.capacity <= slots and 0 <= at.first <= length
            and (at.capacity == self.ring if self.ring else length <= at.capacity)
            for at, length in zip(self.regions, lengths, strict=True)
        )  # fmt: skip
        whole = self.positions_R.dtype == torch.int64 and self.positions_R.dim() == 1
        stored = all(
            x.shape == (slots, *shapes[layer]) and x.is_floating_point()
            for layer, pair in self.layers.items() for x in pair
        )  # fmt: skip
        if not (inside and whole and stored):
            raise InputError("the saved cache holds rows that do not fit its texts or the model; it is damaged")

    def slots(self, spans: Iterable[tuple[Region, int, int]]) -> Tensor:
        """For each (region, first, last) the slots of tokens first to last - 1, one text after another."""
        parts = [at.start + torch.arange(first, last) % at.capacity for at, first, last in spans if first < last]
        return send(torch.cat([torch.empty(0, dtype=torch.int64), *parts]), self.positions_R.device)

    def reserve(self, tokens: int) -> None:
        """Have regions grow by this many tokens at once, within limits; what is held already stays."""
        self.room_ahead = min(max(tokens, _ROOM), _MOST_RESERVED)

    def extend(self, texts: int) -> None:
        """Add texts without tokens; the next pass makes room for them."""
        if self.regions:
            self.regions = [*self.regions, *[Region(0, 0)] * texts]

    def make_room(self, lengths: Sequence[int], new: Sequence[int]) -> None:
        """Let each text, which has this length, hold this many tokens more."""
        wanted = [length + n for length, n in zip(lengths, new, strict=True)]
        held = list(zip(self.regions or [Region(0, 0)] * len(wanted), lengths, strict=True))
        full = (min(n, self.ring or n) > at.capacity for n, (at, _) in zip(wanted, held, strict=True))
        if not self.regions or any(full):
            self._lay_out(held, wanted)

    def _lay_out(self, held: Sequence[tuple[Region, int]], wanted: Sequence[int]) -> None:
        """Make regions for texts of the lengths `wanted` out of what present ones hold of each, and its length now."""
        capacities = [self.ring or -(-n // 16) * 16 + self.room_ahead for n in wanted]
        spans = [(at, at.kept(length), length) for at, length in held]
        source, total = self.slots(spans), sum(capacities)
        starts = [0, *itertools.accumulate(capacities)][:-1]
        firsts = [first for _, first, _ in spans]
        self.regions = [Region(*at) for at in zip(starts, capacities, firsts, strict=True)]
        target = self.slots((at, first, last) for at, (_, first, last) in zip(self.regions, spans, strict=True))
        with torch.inference_mode(False), torch.no_grad():
            positions_R = self.positions_R.new_full((total,), _NOWHERE)
            self.positions_R = positions_R.index_copy_(0, target, self.positions_R[source])
            for layer, pair in self.layers.items():
                # Slots without a token are zero: they are multiplied by a weight of zero, which NaN would survive.
                k, v = (old.new_zeros((total, *old.shape[1:])).index_copy_(0, target, old[source]) for old in pair)
                self.layers[layer] = (k, v)

    def select(self, texts: Sequence[int], lengths: Sequence[int]) -> None:
        """Keep these texts, in this order; one may be named several times. `lengths` are those of the present texts."""
        if list(texts) == list(range(len(lengths))):
            return
        held = [(self.regions[t], lengths[t]) for t in texts]
        regions = self._reused(texts, lengths)
        if regions is None or 2 * sum(at.capacity for at in regions) < len(self.positions_R):
            self._lay_out(held, [length for _, length in held])
            return
        copies = [(old, new, n) for (old, n), new in zip(held, regions, strict=True) if old != new]
        source = self.slots((old, old.kept(n), n) for old, _, n in copies)
        target = self.slots((new, old.kept(n), n) for old, new, n in copies)
        if self.ring is not None:
            for _, new, _ in copies:
                self.positions_R[new.start : new.start + new.capacity] = _NOWHERE
        for stored in (self.positions_R, *itertools.chain.from_iterable(self.layers.values())):
            stored.index_copy_(0, target, stored[source])
        self.regions = regions

    def _reused(self, texts: Sequence[int], lengths: Sequence[int]) -> list[Region] | None:
        """For each of the chosen texts its own region, or for a copy one that no chosen text has.

        None where there are too few, and for rings of another number, which are best without gaps between them.
        """
        if self.ring is not None and len(texts) != len(lengths):
            return None
        chosen = set(texts)
        free = [at for i, at in enumerate(self.regions) if i not in chosen]
        regions: dict[Region, None] = {}
        for text in texts:
            at = self.regions[text]
            if at in regions:
                fitting = [other for other in free if other.capacity >= min(lengths[text], at.capacity)]
                if not fitting:
                    return None
                free.remove(fitting[0])
                at = fitting[0]._replace(first=at.first)
            regions[at] = None
        return list(regions)

    def forget(self, lengths: Sequence[int], wanted: Sequence[int]) -> None:
        """Forget all but the first `wanted` tokens of each text, which has a length of `lengths`."""
        held = list(zip(self.regions, lengths, wanted, strict=True))
        self.positions_R[self.slots((at, max(to, at.kept(n)), n) for at, n, to in held)] = _NOWHERE
        self.regions = [at._replace(first=min(at.kept(n), to)) for at, n, to in held]

    def write(self, layer: int, k_THD: Tensor, v_THD: Tensor, slots: Tensor, of_T: Tensor | None) -> None:
        """Put new keys and values, or those of the tokens `of_T`, into these slots."""
        if layer not in self.layers:
            with torch.inference_mode(False), torch.no_grad():
                shape = (len(self.positions_R), *k_THD.shape[1:])
                dtype = products_dtype(k_THD.dtype, k_THD.device)
                self.layers[layer] = (k_THD.new_zeros(shape, dtype=dtype), v_THD.new_zeros(shape, dtype=dtype))
        for stored, new in zip(self.layers[layer], (k_THD, v_THD), strict=True):
            new = new.detach().to(stored.dtype)
            stored.index_copy_(0, slots, new if of_T is None else new.index_select(0, of_T))

    def to(self, device: torch.device) -> None:
        if self.positions_R.device == device:
            return
        with torch.inference_mode(False):
            self.positions_R = self.positions_R.to(device)
            self.layers = {layer: (k.to(device), v.to(device)) for layer, (k, v) in self.layers.items()}


def _take(x: Tensor, where: slice | Tensor) -> Tensor:
    return x[where] if isinstance(where, slice) else x.index_select(0, where)


class Pass:
    """What the layers of all kinds share in a forward pass: new tokens, after `past` ones of each text, from `ends` on.

    The other arguments are those of `nn.execution.Cache.begin`.

    Args:
        one_by_one: compute several new tokens of a text as if each had come by itself. Our own kernels alone can.
    """

    def __init__(
        self, packing: Packing, past: list[int], ends: list[int], backend: AttentionBackend, dtype: torch.dtype,
        gather: bool, weights: AttentionWeights | None, one_by_one: bool = False,
    ) -> None:  # fmt: skip
        self.packing, self.past, self.device = packing, past, packing.positions_T.device
        self.backend, self.dtype, self.gather, self.weights = backend, dtype, gather, weights
        self.positions_T = packing.positions_T + on_device(ends, self.device)[packing.text_T]
        new = list(enumerate(packing.lengths))
        self.fresh = [i for i, n in new if n and not past[i]]
        self.steps = [i for i, n in new if past[i] and (n == 1 or (n and one_by_one))]
        self.later = [i for i, n in new if n > 1 and past[i] and not one_by_one]

    def of(self, texts: list[int]) -> slice | Tensor:
        """Which of the T tokens are those of these texts, one text after another."""
        if sum(self.packing.lengths[i] for i in texts) == self.packing.tokens and texts == sorted(texts):
            return slice(None)
        spans = self.packing.spans
        return send(torch.cat([torch.arange(*spans[i]) for i in texts]), self.device)

    def packing_of(self, texts: list[int]) -> Packing:
        """The packing of these texts' new tokens alone, each from position 0."""
        if len(texts) == len(self.packing.lengths):
            return self.packing
        packing = Packing.from_lengths([self.packing.lengths[i] for i in texts], self.device)
        positions_P = _take(self.packing.positions_T, self.of(texts))
        return dataclasses.replace(packing, positions_T=positions_P, gaps=self.packing.gaps)


class Steps(NamedTuple):
    """New tokens that each go on from what is stored, for kernels of our own: N of them, usually one a text."""

    of_N: Tensor | None  # which of the new tokens they are; None where they are all of them
    slots_N: Tensor  # that each goes to
    first_N: Tensor  # the first slot of its text
    length_N: Tensor  # how many slots may hold what it attends to, free ones of a ring included
    most: int  # the largest of them
    skip_N: Tensor  # how many slots after the first that it attends to lies; then they follow in the order of tokens
    held_N: Tensor  # how many tokens it attends to, at the most
    ring: int  # after so many slots the first one of the text follows; 0 where that does not happen
    in_order: bool  # some are of one text, and attend to those before them
    positions_N: Tensor
    storage: Storage
    left: int | None  # how far back a token sees; None is all of its text, whose slots then hold nothing else


class Joined(NamedTuple):
    """Texts as what they attend to before their new tokens, their tails, and the new tokens."""

    of_P: slice | Tensor  # which of the new tokens they have
    plan: Any  # of a backend, for the joined texts
    tail_slots: Tensor
    order_J: Tensor | None = None  # for each joined token its place in all tails followed by the P new tokens
    new_P: Tensor | None = None  # which of the joined tokens are new; None, as is the order, without tails

    def join(self, new_THD: Tensor, stored: Tensor | None) -> Tensor:
        """(J, H, D), text by text. Queries are not stored: their tails are zeros, and nobody reads their outputs."""
        new_PHD = _take(new_THD, self.of_P)
        if self.order_J is None:
            return new_PHD
        if stored is None:
            tails = new_PHD.new_zeros((len(self.tail_slots), *new_PHD.shape[1:]))
        else:
            tails = stored.index_select(0, self.tail_slots).to(new_PHD.dtype)
        return torch.cat([tails, new_PHD]).index_select(0, self.order_J)


class InPlace(NamedTuple):
    """N texts with Q new tokens each, which attend to keys where they are stored."""

    of_P: slice | Tensor  # which of the new tokens they have
    texts: int
    slots: slice | Tensor  # one text after another, as many of each
    keys: int  # K, how many of its slots a text attends to; its queries are the last of them, and see none after
    bias_N11K: Tensor | None = None  # of a single query, hides slots that are out of reach or hold nothing

    def attend(self, q_THD: Tensor, stored: Pair) -> Tensor:
        """(T, H, D) to (P, H, D), some queries at a time."""
        q = _take(q_THD, self.of_P).unflatten(0, (self.texts, -1)).transpose(1, 2)
        k, v = (_take(x, self.slots).unflatten(0, (self.texts, -1)).transpose(1, 2) for x in stored)
        outs, queries = [], q.shape[2]
        for first in range(0, queries, _CHUNK):
            last = min(first + _CHUNK, queries)
            past = self.keys - queries
            bias = self.bias_N11K
            if queries > 1:
                bias = k.new_full((last - first, past + last), float("-inf")).triu_(past + first + 1)
            outs.append(dense_attention(q[:, :, first:last], k[:, :, : past + last], v[:, :, : past + last], bias))
        return (torch.cat(outs, 2) if len(outs) > 1 else outs[0]).transpose(1, 2).flatten(0, 1)


class Continuation:
    """How the layers of one kind attend in one forward pass with a cache; see `nn.execution.Attend`.

    Texts without a past attend to themselves, as without a cache. In a local layer several new tokens are joined with
    the window before them, as their own keys may overwrite it. All others attend in place, once they are stored. To
    `gather` is the oracle of all that: everything is joined, and every pair of tokens is scored.
    """

    def __init__(self, new: Pass, storage: Storage) -> None:
        self.new, self.storage = new, storage
        joined = [new.fresh, [] if storage.reach.left is None else new.later]
        if new.gather:
            joined = [list(range(len(new.past)))]
        self.joined = [self._join(texts) for texts in joined if texts or new.gather]
        grown = zip(storage.regions, new.past, new.packing.lengths, strict=True)
        spans = [(at, max(old, at.kept(old + n)), old + n) for at, old, n in grown]
        self.slots = storage.slots(spans)
        self.of_T: Tensor | None = None  # the new tokens that are kept, where a ring has no room for all
        if len(self.slots) < new.packing.tokens:
            ends = new.packing.starts[1:]
            parts = [torch.arange(end - last + first, end) for end, (_, first, last) in zip(ends, spans, strict=True)]
            self.of_T = torch.cat(parts).to(new.device)
        written = new.positions_T if self.of_T is None else new.positions_T[self.of_T]
        storage.positions_R.index_copy_(0, self.slots, written)

    def __call__(self, layer: int, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, dropout: float = 0.0) -> Tensor:
        """Attention outputs (T, H, D) of a layer's new tokens, which are added to the cache."""
        stored_k, stored_v = self.storage.layers.get(layer, (None, None))
        outs = []
        for part in self.joined:
            k_JHD, v_JHD = part.join(k_THD, stored_k), part.join(v_THD, stored_v)
            if self.new.gather:
                out_THD, found = EagerAttention().attend_with_weights(q_THD, k_JHD, v_JHD, part.plan)
                if self.new.weights is not None:
                    held = zip(self.storage.regions, self.new.past, found, strict=True)
                    self.new.weights[layer] = [F.pad(weights, (at.kept(n), 0)) for at, n, weights in held]
            else:
                out_THD = self.new.backend.attend(part.join(q_THD, None), k_JHD, v_JHD, part.plan)
                out_THD = out_THD if part.new_P is None else out_THD.index_select(0, part.new_P)
            outs.append(out_THD)
        self.storage.write(layer, k_THD, v_THD, self.slots, self.of_T)
        outs += [part.attend(q_THD, self.storage.layers[layer]) for part in self.in_place]
        if not outs:
            return v_THD
        out_THD = torch.cat(outs) if len(outs) > 1 else outs[0]
        return out_THD if self.back is None else out_THD.index_select(0, self.back)

    def as_steps(self) -> Steps | None:
        """What our own kernels need for the texts that go on by single tokens; None where there are none."""
        new, storage = self.new, self.storage
        if new.gather or not new.steps:
            return None
        of, slots_N, regions = new.of(new.steps), self.slots, storage.regions
        counts = [new.packing.lengths[i] for i in new.steps]
        if isinstance(of, Tensor):
            grown = zip(new.steps, counts, strict=True)
            slots_N = storage.slots((regions[i], new.past[i], new.past[i] + n) for i, n in grown)
        tokens = [(regions[i], new.past[i] + k) for i, n in zip(new.steps, counts, strict=True) for k in range(n)]
        lengths = [storage.ring or at + 1 for _, at in tokens]
        left = storage.reach.left
        begins = [0 if left is None else max(0, region.first, at - left) for region, at in tokens]
        skips = [begin % region.capacity for (region, _), begin in zip(tokens, begins, strict=True)]
        held = [at + 1 - begin for (_, at), begin in zip(tokens, begins, strict=True)]
        starts = [region.start for region, _ in tokens]
        first_N, length_N, skip_N, held_N = torch.tensor([starts, lengths, skips, held])
        of_N, positions_N = None if isinstance(of, slice) else of, _take(new.positions_T, of)
        return Steps(
            of_N, slots_N, first_N, length_N, max(lengths), skip_N, held_N, storage.ring or 0, max(counts) > 1,
            positions_N, storage, left,
        )  # fmt: skip

    @functools.cached_property
    def in_place(self) -> list[InPlace]:
        """What attends in place once the new tokens are stored. Our own kernels do without."""
        if self.new.gather:
            return []
        if self.storage.reach.left is None:
            return self._whole_texts()
        return [self._windows(self.storage.reach.left)] if self.new.steps else []

    @functools.cached_property
    def back(self) -> Tensor | None:
        """Where each new token's output stands among those of the parts; None where they are in order."""
        parts = [part.of_P for part in self.joined] + [part.of_P for part in self.in_place]
        several = [part for part in parts if isinstance(part, Tensor)]
        return torch.cat(several).argsort() if several else None

    def _join(self, texts: list[int]) -> Joined:
        """Texts with what is held of them, or what is within reach."""
        new, storage = self.new, self.storage
        of_P, packing, order_J, new_P = new.of(texts), new.packing_of(texts), None, None
        tails = []
        for at, past in ((storage.regions[i], new.past[i]) for i in texts):
            tails.append((at, at.kept(past) if new.gather else max(0, past - (storage.reach.left or 0)), past))
        tail_slots = storage.slots(tails)
        if len(tail_slots):
            lengths_2N = torch.tensor([[last - first for _, first, last in tails], packing.lengths])
            text = torch.arange(len(texts)).repeat(2).repeat_interleave(lengths_2N.flatten())
            order = text.argsort(stable=True)
            lengths_N = lengths_2N.sum(0)
            start = (lengths_N.cumsum(0) - lengths_N)[text[order]]
            is_new = (order >= len(tail_slots)).nonzero().squeeze(1)
            order_J, new_P, start_J, text_J = (send(x, new.device) for x in (order, is_new, start, text[order]))
            at_J = torch.cat([storage.positions_R[tail_slots], _take(new.positions_T, of_P)])[order_J]
            # A plan counts positions from each text's first token.
            packing = Packing(tuple(lengths_N.tolist()), at_J - at_J[start_J], text_J, gaps=True)
        if self.new.gather:
            positions_T = packing.positions_T if new_P is None else packing.positions_T[new_P]
            queries = Packing(new.packing.lengths, positions_T, new.packing.text_T)
            plan: Any = EagerAttention().plan(queries, storage.reach, torch.float32, packing)
        else:
            plan = new.backend.plan(packing, storage.reach, new.dtype)
        return Joined(of_P, plan, tail_slots, order_J, new_P)

    def _windows(self, left: int) -> InPlace:
        """All texts that go on by one token, in the order of storage."""
        new, storage = self.new, self.storage
        width = storage.ring
        assert width is not None
        texts = sorted(new.steps, key=lambda i: storage.regions[i].start)
        starts = [storage.regions[i].start for i in texts]
        slots: slice | Tensor = slice(starts[0], starts[-1] + width)
        if starts[-1] - starts[0] != (len(starts) - 1) * width:
            slots = send(torch.cat([torch.arange(start, start + width) for start in starts]), new.device)
        of_P = new.of(texts)
        at_NW = _take(storage.positions_R, slots).unflatten(0, (-1, width))
        behind_NW = _take(new.positions_T, of_P)[:, None] - at_NW
        seen = (behind_NW >= 0) & (behind_NW <= left)
        bias = torch.zeros(seen.shape, dtype=products_dtype(new.dtype, new.device), device=new.device)
        return InPlace(of_P, len(texts), slots, width, bias.masked_fill_(~seen, float("-inf"))[:, None, None])

    def _whole_texts(self) -> list[InPlace]:
        """Texts that see all before them, those together that are of one length and lie one after another."""
        new, regions, found = self.new, self.storage.regions, []

        def alike(ranked: tuple[int, int]) -> tuple[int, ...]:
            rank, i = ranked
            start, capacity, _ = regions[i]
            return new.past[i], new.packing.lengths[i], capacity, start - rank * capacity

        texts = sorted([*new.steps, *new.later], key=lambda i: regions[i].start)
        for (past, added, capacity, _), group in itertools.groupby(enumerate(texts), alike):
            together = [i for _, i in group]
            start = regions[together[0]].start
            slots = slice(start, start + len(together) * capacity)
            found.append(InPlace(new.of(together), len(together), slots, past + added))
        return found
