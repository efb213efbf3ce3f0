"""Launches that are recorded once and then replayed as one: what makes short batches cost what their arithmetic does.

A recording has fixed shapes, so it is made for a bucket of sizes, over memory of its own; rows past what a batch has
are computed and not looked at.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol

import torch

LARGEST = 8192  # tokens; a longer pass keeps the card busy while the next launches are made
MOST_TEXTS = 256
_KEPT = 64  # recordings; each holds memory and takes tens of milliseconds to make


class Bucket(NamedTuple):
    """Sizes that a recording is made for."""

    tokens: int
    texts: int


def bucket(tokens: int, texts: int) -> Bucket | None:
    """The smallest bucket that holds a batch; None where it has nothing, or is too large to gain by it.

    Tokens are rounded up by a quarter at the most (but to 16 at the least), texts to a power of four.
    """
    if not 0 < tokens <= LARGEST or not 0 < texts <= MOST_TEXTS:
        return None
    step = max(16, (1 << (tokens - 1).bit_length()) // 8)
    return Bucket(-(-tokens // step) * step, step_bucket(texts, 4))


def step_bucket(texts: int, factor: int = 2) -> int:
    """The number of texts that a step of generation is recorded for: a power of two, or of `factor`."""
    size = 1
    while size < texts:
        size *= factor
    return size


class Recorded(Protocol):
    """What is recorded: a function of no arguments over memory of its own."""

    def __call__(self) -> None:
        """Compute."""


class Graphs:
    """Recordings by their bucket, the latest used of them kept.

    Args:
        device: where they run. Anywhere but on a card nothing is recorded: the function itself runs again.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lock = threading.Lock()
        self._kept: collections.OrderedDict[Hashable, tuple[Any, Callable[[], None]]] = collections.OrderedDict()
        self._pool: Any = None
        self._last: Any = None

    def __len__(self) -> int:
        """How many recordings there are."""
        return len(self._kept)

    def find(self, key: Hashable, make: Callable[[], Recorded]) -> tuple[Any, Callable[[], None]]:
        """What was made for a key, and its replay; made now where there is none. Hold `lock` until it is read."""
        if key not in self._kept:
            with torch.inference_mode(False), torch.no_grad():  # what is recorded is written to in any mode
                recorded = make()
                self._kept[key] = recorded, self._record(recorded)
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def begin(self) -> None:
        """Wait, on the card, until whoever replayed last has read the result, whatever stream that was on."""
        if self._last is not None:
            torch.cuda.current_stream(self.device).wait_event(self._last)

    def end(self) -> None:
        """The result has been read, as far as this stream goes."""
        if self.device.type == "cuda":
            self._last = torch.cuda.current_stream(self.device).record_event()

    def _record(self, function: Recorded) -> Callable[[], None]:
        if self.device.type != "cuda":
            return function
        with torch.cuda.device(self.device):
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            aside, here = torch.cuda.Stream(), torch.cuda.current_stream()
            aside.wait_stream(here)
            with torch.cuda.stream(aside):  # kernels are compiled and libraries set up before anything is recorded
                for _ in range(2):
                    function()
            here.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                function()
        replay: Callable[[], None] = graph.replay
        return replay
