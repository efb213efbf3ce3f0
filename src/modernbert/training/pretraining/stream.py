"""The order of training: texts of weighted sources, packed into passes of a token budget with next to no waste.

Every pass follows from the seed and its number alone. A `Cursor` says where a window of passes begins, so that a run
continues at any pass without going through those before it.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from modernbert.errors import InputError
from modernbert.training.pretraining.texts import Corpus, Ids

_WINDOW = 64  # passes that texts are chosen for together
_FULL = 0.99  # of its budget: a pass that is filled less waits for more texts


class Text(NamedTuple):
    """A text: source, shard of it, and place in that."""

    source: int
    shard: int
    number: int


@dataclasses.dataclass(frozen=True)
class Cursor:
    """Where a window of passes begins.

    Attributes:
        passes: number of its first pass.
        texts, tokens: drawn from each source so far, over all its epochs.
        waiting: texts that were drawn and found no room.
    """

    passes: int
    texts: tuple[int, ...]
    tokens: tuple[int, ...]
    waiting: tuple[Text, ...] = ()

    @classmethod
    def of(cls, place: Mapping[str, Any]) -> Cursor:
        """A cursor that was written as JSON."""
        waiting = tuple(Text(*text) for text in place["waiting"])
        return cls(place["passes"], tuple(place["texts"]), tuple(place["tokens"]), waiting)


class PassStream:
    """Passes of texts, without end.

    Each source is gone through in epochs, shuffled anew each time: shards, and texts inside a shard. The source to
    draw from next is the one that is furthest behind its share of the tokens.

    Args:
        sources: by name, the shards of each.
        budget: tokens of a pass; a longer text is a pass by itself.
        seed: of the order.
        weights: share of the tokens that each named source gets, in any unit; 0 leaves it out. Without any, every
            source gives as many tokens as it has.

    Raises:
        InputError: a weight is of no source, or negative, or nothing is left.
    """

    def __init__(
        self,
        sources: Mapping[str, Sequence[Corpus]],
        budget: int,
        seed: int,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        sizes = {name: sum(len(shard.tokens) for shard in shards) for name, shards in sources.items()}
        chosen = sizes if not weights else {name: weights.get(name, 0.0) for name in sources}
        unknown = sorted(set(weights or ()) - set(sources))
        if unknown:
            raise InputError(f"weight is given for {unknown[0]}; the data has {', '.join(sources)}")
        forgotten = [name for name in sources if weights and name not in weights]
        if forgotten:
            raise InputError(f"weight is not given for {forgotten[0]}; give one for every source, 0 leaves one out")
        if any(weight < 0 for weight in chosen.values()):
            raise InputError(f"weights are {dict(chosen)}; they must not be negative")
        names = [name for name in sources if chosen[name] > 0 and sizes[name]]
        if not names:
            raise InputError("no source with a weight above 0 holds any text")
        self.names, self.budget, self.seed = names, budget, seed
        self.sources = [list(sources[name]) for name in names]
        self.sizes = [sizes[name] for name in names]
        self.weights = [float(chosen[name]) for name in names]
        self.counts = [sum(len(shard) for shard in shards) for shards in self.sources]
        self.lengths = [[shard.lengths for shard in shards] for shards in self.sources]
        self._order = functools.lru_cache(maxsize=2 * len(names))(self._shuffled)

    @property
    def start(self) -> Cursor:
        nothing = (0,) * len(self.sources)
        return Cursor(0, nothing, nothing)

    def __getitem__(self, text: Text) -> Ids:
        return self.sources[text.source][text.shard][text.number]

    def length(self, text: Text) -> int:
        return int(self.lengths[text.source][text.shard][text.number])

    def window(self, cursor: Cursor) -> tuple[list[list[Text]], Cursor]:
        """The passes of a window, and where the next one begins."""
        texts = list(cursor.waiting)
        size = sum(self.length(text) for text in texts)
        drawn, tokens = list(cursor.texts), list(cursor.tokens)
        sources = range(len(self.sources))
        while size < _WINDOW * self.budget:
            source = min(sources, key=lambda s: tokens[s] / self.weights[s])
            text = self._draw(source, drawn[source])
            length = self.length(text)
            drawn[source] += 1
            tokens[source] += length
            size += length
            texts.append(text)
        lengths = [self.length(text) for text in texts]
        bins = best_fit(lengths, self.budget)
        filled = [sum(lengths[i] for i in some) for some in bins]
        full = [some for some, size in zip(bins, filled, strict=True) if size >= _FULL * self.budget]
        if 2 * len(full) < len(bins):  # texts of no fitting lengths: waiting would not help
            rest = [min(range(len(bins)), key=filled.__getitem__)]
            full = [some for i, some in enumerate(bins) if i not in rest or len(bins) == 1]
        kept = {i for some in full for i in some}
        waiting = tuple(text for i, text in enumerate(texts) if i not in kept)
        order = np.random.default_rng((self.seed, 1, cursor.passes)).permutation(len(full))
        passes = [[texts[i] for i in sorted(full[o])] for o in order]
        return passes, Cursor(cursor.passes + len(passes), tuple(drawn), tuple(tokens), waiting)

    def passes(self, first: int = 0, near: Cursor | None = None) -> Iterator[tuple[Cursor, list[Text]]]:
        """Passes from a number on, each with the cursor of its window.

        Args:
            first: number of the first pass to give.
            near: a cursor at or before it; the start if not given.
        """
        cursor = near or self.start
        while True:
            passes, following = self.window(cursor)
            for number, texts in enumerate(passes, cursor.passes):
                if number >= first:
                    yield cursor, texts
            cursor = following

    def _draw(self, source: int, number: int) -> Text:
        """The text of a source that is drawn after `number` others."""
        epoch, place = divmod(number, self.counts[source])
        ends, shards, orders = self._order(source, epoch)
        i = bisect.bisect_right(ends, place)
        before = ends[i - 1] if i else 0
        return Text(source, shards[i], int(orders(i)[place - before]))

    def _shuffled(self, source: int, epoch: int) -> tuple[list[int], list[int], functools._lru_cache_wrapper[Order]]:
        """An epoch's shards in order, where each ends, and the order of the texts of each."""
        shards = np.random.default_rng((self.seed, 2, source, epoch)).permutation(len(self.sources[source])).tolist()
        ends = np.cumsum([len(self.sources[source][shard]) for shard in shards]).tolist()

        @functools.lru_cache(maxsize=1)
        def order(i: int) -> Order:
            rng = np.random.default_rng((self.seed, 3, source, epoch, shards[i]))
            return rng.permutation(len(self.sources[source][shards[i]]))

        return ends, shards, order


Order = npt.NDArray[np.int64]


def best_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Best fit decreasing: the longest first, each into the fullest bin that it fits in, else into a new one.

    Returns:
        Numbers of the lengths in each bin, whose sum is at most `budget`; a length over it is a bin by itself.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect.bisect_left(rooms, (lengths[i], -1))
        if place < len(rooms):
            room, chosen = rooms.pop(place)
        else:
            room, chosen = budget, len(bins)
            bins.append([])
        bins[chosen].append(i)
        if room > lengths[i]:
            bisect.insort(rooms, (room - lengths[i], chosen))
    return bins
