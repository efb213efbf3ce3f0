"""What an engine is: it moves units of work to workers that are alive, and hands back what they say of them.

Which texts are computed, what a unit is called, where it is written, and what becomes of texts that fail is the same
code for all engines (`job`, `work`), so that the result cannot depend on the engine.
"""

from __future__ import annotations

import dataclasses
import importlib
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, Protocol

from modernbert.checks import Options
from modernbert.errors import InputError

ATTEMPTS = 24  # of a unit whose worker dies; the work itself makes sure that it ends before (see `work`)
PATIENCE = 10.0  # seconds for what was asked to end
Record = dict[str, Any]  # what is known of a finished unit, plain values


@dataclasses.dataclass(frozen=True)
class Unit:
    """Texts that are computed by one worker and written as one shard.

    Attributes:
        name: made from the keys, so that the same unit has the same name whoever makes it.
        table: `key` (32 bytes) and the fields of the task, an Arrow table.
    """

    name: str
    table: Any


class Units(Iterator[Unit]):
    """Units for threads: one is made at a time, and any thread ends them, also while another one waits for the next.

    Args:
        units: what makes them.
        stop: has it give up a unit that it is making.
    """

    def __init__(self, units: Iterator[Unit], stop: Callable[[], None] = lambda: None) -> None:
        self._units, self._stop = units, stop
        self._lock, self._ended = threading.Lock(), False

    def __next__(self) -> Unit:
        with self._lock:
            if self._ended:
                raise StopIteration
            return next(self._units)

    def end(self) -> None:
        """Give no more."""
        self._ended = True
        self._stop()

    def close(self) -> None:
        """Give no more, and let go of what was open to make them, unless a thread hangs in it."""
        self.end()
        if self._lock.acquire(timeout=PATIENCE):
            try:
                if isinstance(self._units, Generator):
                    self._units.close()
            finally:
                self._lock.release()


class Engine(Protocol):
    """What runs units.

    An engine is made with its options as keyword arguments, which its class names in `options`.
    """

    options: type[Options]

    def run(self, units: Iterator[Unit], work: Callable[[Unit], Record]) -> Generator[Record, None, None]:
        """Give the record of each unit, in any order, as units are finished.

        - `work` is picklable, and so are units and records. A worker keeps its copy of `work` as long as it lives: the
          model is loaded with the first unit.
        - `units` is taken from lazily: it reads the corpus as it goes. An engine keeps as many units as its workers
          need to be busy, and no more. One that takes them from several threads does so through `Units`, which a job
          gives it already.
        - A unit whose worker dies is run again as it is, by a new worker, up to `ATTEMPTS` times; then
          `modernbert.corpus.CorpusError` is raised. A unit may be run twice: the second run writes the same files.
        - What `work` raises ends the job: it is raised here, as itself or as `CorpusError` with its message.
        - When the generator is closed, workers are ended.
        """


ENGINES = {"local": "corpus.local.LocalEngine", "ray": "corpus.ray.RayEngine"}


def make_engine(name: str, given: Mapping[str, Any]) -> Engine:
    """An engine with these options; raises `InputError` for one that is not known, or whose packages are missing."""
    if name not in ENGINES:
        raise InputError(f"engine is {name!r}; choose one of {', '.join(ENGINES)}")
    module, _, cls = ENGINES[name].rpartition(".")
    engine: type[Any] = getattr(importlib.import_module(f"modernbert.{module}"), cls)
    made: Engine = engine(**engine.options.of(given, f"the engine {name}").__dict__)
    return made
