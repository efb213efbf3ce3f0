"""How far a job is: a line on a terminal, one a minute elsewhere, and `metrics.jsonl` in the output."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from typing import Any, Self

from modernbert.corpus.contract import Record
from modernbert.corpus.machine import memory_of
from modernbert.corpus.output import CorpusError, Output
from modernbert.corpus.plan import Met

_A_MINUTE = 60.0
_BETWEEN = 10.0  # seconds between lines of metrics


class Progress:
    """Tells how far a job is.

    Args:
        output: which gets `metrics.jsonl`.
        met: what was read so far.
        engine: that runs; its `workers`, where it has any, are processes of this machine.
        is_shown: whether anything goes to standard error.
    """

    def __init__(self, output: Output, met: Met, engine: Any, is_shown: bool) -> None:
        self.output, self.met, self.engine, self.is_shown = output, met, engine, is_shown
        self.on_terminal = is_shown and sys.stderr.isatty()
        self.texts = self.tokens = self.failed = self.shards = 0
        self.begun = self.shown = self.noted = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.on_terminal and self.shards:
            sys.stderr.write("\r\x1b[K")
        if self.shards:
            with contextlib.suppress(*[CorpusError] * (error[0] is not None)):  # such as of a full disk
                self._note()

    def tell(self, record: Record) -> None:
        """A unit is finished."""
        self.texts += record["texts"]
        self.failed += record["failed"]
        self.tokens += record["tokens"]
        self.shards += 1
        now = time.monotonic()
        if self.on_terminal or (self.is_shown and now - self.shown >= _A_MINUTE):
            self.shown = now
            sys.stderr.write(f"\r\x1b[K{self}" if self.on_terminal else f"{self}\n")
            sys.stderr.flush()
        if now - self.noted >= _BETWEEN or self.shards == 1:
            self._note()

    def __str__(self) -> str:
        seconds = max(1e-9, time.monotonic() - self.begun)
        failed = f", {self.failed:,} failed" if self.failed else ""
        left = "" if self.left is None else f", {_clock(self.left)} left"
        per = f"{self.texts / seconds:,.0f} texts/s, {self.tokens / seconds:,.0f} tokens/s"
        return f"{self.texts:,} texts in {_clock(seconds)}{failed} ({per}{left})"

    @property
    def left(self) -> float | None:
        """Seconds that the rest takes, if it is as what was read; None while nothing is known."""
        done = self.texts + self.failed
        if not done or not self.met.new or not self.met.size:
            return None
        expected = self.met.new * max(1.0, self.met.total / self.met.size)  # new texts of all files
        return max(0.0, expected - done) / done * (time.monotonic() - self.begun)

    def _note(self) -> None:
        now = time.monotonic()
        self.noted = now
        seconds = max(1e-9, now - self.begun)
        line = {
            "time": round(time.time(), 3),
            "seconds": round(seconds, 3),
            "shards": self.shards,
            "texts": self.texts,
            "failed": self.failed,
            "tokens": self.tokens,
            "texts_per_second": round(self.texts / seconds, 3),
            "tokens_per_second": round(self.tokens / seconds, 3),
            "rows": self.met.rows,
            "duplicates": self.met.duplicates,
            "seconds_left": None if self.left is None else round(self.left, 1),
            "memory": memory_of(os.getpid()),
            "memory_of_workers": [memory_of(number) for number in getattr(self.engine, "workers", [])],
        }
        self.output.append("metrics.jsonl", json.dumps(line))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
