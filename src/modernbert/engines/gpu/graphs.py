"""Launches that are recorded once and then replayed as one: what makes short batches cost what their arithmetic does.

A recording has fixed shapes, so it is made for a bucket of sizes, over memory of its own; rows past what a batch has
are computed and not looked at.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

LARGEST = 16384  # tokens; a longer pass keeps the card busy while the next launches are made
MOST_TEXTS = 256
_KEPT = 96  # buckets; each holds memory, and a recording takes tens of milliseconds to make
_SHORTEST = 128  # rows that an attention kernel takes at once

_recording = threading.Lock()  # PyTorch records one at a time


class Bucket(NamedTuple):
    """Sizes that a recording is made for."""

    tokens: int  # how many there may be
    texts: int  # likewise
    longest: int  # tokens of a text

    @property
    def fillers(self) -> int:
        """Texts that it takes to hold the rows that are left over, whatever is."""
        return -(-_step(self.tokens) // self.longest)


def _step(tokens: int) -> int:
    return max(16, (1 << (tokens - 1).bit_length()) // 8)


def bucket(lengths: Sequence[int]) -> Bucket | None:
    """The smallest bucket that holds texts of these lengths; None where there is nothing, or too much to gain by it.

    Tokens are rounded up by a quarter at the most (but to 16 at the least), texts to a power of four, the longest one
    to a power of two.
    """
    tokens, texts = sum(lengths), len(lengths)
    if not 0 < tokens <= LARGEST or texts > MOST_TEXTS:
        return None
    step = _step(tokens)
    tokens = -(-tokens // step) * step
    longest = max(_SHORTEST, 1 << (max(lengths) - 1).bit_length())
    return Bucket(tokens, step_bucket(texts, 4), min(longest, max(tokens, _SHORTEST)))


def step_bucket(texts: int, factor: int = 2) -> int:
    """The number of texts that a step of generation is recorded for: a power of two, or of `factor`."""
    size = 1
    while size < texts:
        size *= factor
    return size


Recorded = Callable[[], None]  # what is recorded: a function over memory of its own


@dataclasses.dataclass
class _Entry:
    recorded: Any
    replay: Recorded
    uses: int = 0


class Graphs:
    """Recordings by their bucket, the latest used of them kept.

    A bucket is recorded when it is used for the second time; the first time the function itself runs, which gives the
    same bits. So it does anywhere but on a card, and where the card has no memory for a recording.

    Args:
        device: where they run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lock = threading.Lock()
        self._kept: collections.OrderedDict[Hashable, _Entry] = collections.OrderedDict()
        self._pool: Any = None
        self._stream: Any = None
        self._last: Any = None

    def __len__(self) -> int:
        """How many buckets there are."""
        return len(self._kept)

    def run(
        self, key: Hashable, make: Callable[[], Any], take: Callable[[Any], None], read: Callable[[Any], Tensor]
    ) -> Tensor:
        """Run what is kept for a bucket.

        Args:
            key: the bucket.
            make: makes what runs, where nothing is kept.
            take: writes a batch into its memory.
            read: copies the result out of it.
        """
        with self.lock:
            entry = self._entry(key, make)
            if self._last is not None:  # whoever ran last, on whatever stream, has to have read the result
                torch.cuda.current_stream(self.device).wait_event(self._last)
            take(entry.recorded)  # before anything is recorded too: that runs it, on what it holds
            entry.uses += 1
            if entry.uses == 2 and self.device.type == "cuda":
                with torch.inference_mode(False), torch.no_grad():
                    entry.replay = self._record(entry.recorded)
            entry.replay()
            result = read(entry.recorded)
            if self.device.type == "cuda":
                self._last = torch.cuda.current_stream(self.device).record_event()
        return result

    def _entry(self, key: Hashable, make: Callable[[], Any]) -> _Entry:
        if key not in self._kept:
            while len(self._kept) >= _KEPT:
                self._kept.popitem(last=False)
            with torch.inference_mode(False), torch.no_grad():  # what is recorded is written to in any mode
                recorded = make()
            self._kept[key] = _Entry(recorded, recorded)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _record(self, function: Recorded) -> Recorded:
        with _recording, torch.cuda.device(self.device):
            if self._stream is None:
                self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)
            here = torch.cuda.current_stream()
            self._stream.wait_stream(here)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.stream(here), _no_collection():  # back to this stream, however it ends
                    with torch.cuda.stream(self._stream):  # once more: nothing is set up while it is recorded
                        function()
                    where = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
                    with torch.cuda.graph(graph, **where):
                        function()
            except RuntimeError as error:
                if "out of memory" not in str(error):
                    raise
                logger.warning("no memory on %s to record launches in; they are made one by one", self.device)
                return function
            finally:
                here.wait_stream(self._stream)
        replay: Recorded = graph.replay
        return replay


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Python's collector may end a model whose recordings nobody holds, which is not allowed while one is made."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
