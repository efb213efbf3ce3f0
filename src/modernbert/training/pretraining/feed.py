"""What each step of pretraining trains on: passes of the stream, more of them as the batch grows."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from modernbert.training.contract import Step
from modernbert.training.pretraining.options import PretrainOptions
from modernbert.training.pretraining.stream import Cursor, PassStream, Text
from modernbert.training.pretraining.texts import Ids


@dataclasses.dataclass(frozen=True)
class StoredText:
    """A text of the stream; its ids are read when a process computes with them."""

    stream: PassStream
    text: Text

    @property
    def rows(self) -> list[Ids]:
        return [self.stream[self.text]]

    @property
    def tokens(self) -> int:
        return self.stream.length(self.text)

    @property
    def record(self) -> str:
        source, shard, number = self.text
        return f"{self.stream.names[source]}, shard {shard}, text {number}"


class PretrainFeed:
    """Steps of a pretraining run; see `modernbert.training.contract.Feed`.

    Args:
        stream: of passes of `options.micro_tokens`.
        options: how many of them a step has, and how long the run is.
        data: a digest of the data.
    """

    def __init__(self, stream: PassStream, options: PretrainOptions, data: str) -> None:
        self.stream, self.options = stream, options
        tokens = options.epochs * sum(stream.sizes)
        sizes = self._sizes()
        # The number of the first pass of each step, and one more.
        self.first = [0]
        while len(self.first) <= (options.max_steps or 0) or (
            options.max_steps is None and self.first[-1] * options.micro_tokens < tokens
        ):
            self.first.append(self.first[-1] + next(sizes))
        self.total = len(self.first) - 1
        self.between = self.total
        order = [data, options.seed, options.micro_tokens, options.batch_tokens, options.batch_start]
        order += [options.batch_warmup, sorted(options.weights.items())]
        self.fingerprint = hashlib.sha256(json.dumps(order).encode()).hexdigest()

    def _sizes(self) -> Iterator[int]:
        """Passes of each step, without end."""
        options, seen = self.options, 0
        start, end = options.batch_start or options.batch_tokens, options.batch_tokens
        while True:
            done = min(1.0, seen / options.batch_warmup) if options.batch_warmup else 1.0
            passes = max(1, round((start + (end - start) * done) / options.micro_tokens))
            yield passes
            seen += passes * options.micro_tokens

    def steps(self, first: int, place: Mapping[str, Any] | None) -> Iterator[Step]:
        near = None if place is None else Cursor.of(place)  # which saves going through the windows before it
        passes = self.stream.passes(self.first[first], near)
        for step in range(first, self.total):
            chosen = list(itertools.islice(passes, self.first[step + 1] - self.first[step]))
            cursor = chosen[-1][0]
            items = [[StoredText(self.stream, text) for text in texts] for _, texts in chosen]
            epoch = self.first[step + 1] * self.options.micro_tokens / sum(self.stream.sizes)
            yield Step(items, epoch, dataclasses.asdict(cursor))
