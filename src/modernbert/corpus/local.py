"""The engine of one machine: processes that are started once, each with its share of the cores."""

from __future__ import annotations

import collections
import dataclasses
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import IO, Any

from modernbert.checks import Options, option
from modernbert.corpus.contract import ATTEMPTS, Record, Unit
from modernbert.corpus.output import CorpusError
from modernbert.errors import printable
from modernbert.training.threads import cores, quota

_HEAD = struct.Struct("<Q")  # bytes of a message
_STARTS = 3  # of a process that dies before it has loaded the model


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalOptions(Options):
    """Options of the engine `local`."""

    processes: int | None = option(
        None, "Processes that compute; 0 computes in this one.", least=0, otherwise="one a GPU, else one for 4 cores"
    )
    threads: int | None = option(None, "Threads of each process.", least=1, otherwise="the cores shared out")


class LocalEngine:
    """Runs units in processes of this machine; one that dies is replaced.

    Args:
        processes, threads: see `LocalOptions`.

    Attributes:
        workers: numbers of the processes that run at present.
    """

    options = LocalOptions

    def __init__(self, processes: int | None = None, threads: int | None = None) -> None:
        usable = min(cores(), int(quota() or cores()) or 1)
        self.processes = max(1, usable // 4) if processes is None else processes
        self.threads = threads or max(1, usable // max(1, self.processes))
        self.workers: list[int] = []

    def run(self, units: Iterator[Unit], work: Callable[[Unit], Record]) -> Iterator[Record]:
        """See `modernbert.corpus.contract.Engine`."""
        if self.processes == 0:
            yield from map(work, units)
            return
        done: queue.SimpleQueue[Record | BaseException | None] = queue.SimpleQueue()
        feed = _Feed(units)
        pool = [_Worker(work, self.threads, i, self.processes) for i in range(self.processes)]
        threads = [threading.Thread(target=_drive, args=(worker, feed, done), daemon=True) for worker in pool]
        for thread in threads:
            thread.start()
        running = len(threads)
        try:
            while running:
                found = done.get()
                self.workers = [worker.number for worker in pool if worker.number]
                if found is None:
                    running -= 1
                elif isinstance(found, BaseException):
                    raise found
                else:
                    yield found
        finally:
            feed.stop()
            for worker in pool:
                worker.end()
            self.workers = []


class _EndedError(Exception):
    """The job ended while a process was to be started."""


class _Feed:
    """Units, taken by several threads, one at a time."""

    def __init__(self, units: Iterator[Unit]) -> None:
        self._units, self._lock, self._ended = units, threading.Lock(), False

    def next(self) -> Unit | None:
        with self._lock:
            return None if self._ended else next(self._units, None)

    def stop(self) -> None:
        self._ended = True


class _Worker:
    """A process that computes units one after another, and is started again if it dies."""

    def __init__(self, work: Callable[[Unit], Record], threads: int, index: int, of: int) -> None:
        self._work, self._index, self._ended = pickle.dumps(work), index, False
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "passive",
            "RAYON_NUM_THREADS": str(threads),
            "MODERNBERT_CORPUS_WORKER": f"{index}/{of}",
        }

    @property
    def number(self) -> int:
        return self._process.pid if self._process is not None else 0

    def ask(self, unit: Unit) -> Record:
        """The record of a unit; raises `EOFError` if the process died."""
        self._start()
        record: Record = self._exchange(pickle.dumps(unit))
        return record

    def _start(self) -> None:
        """Have a process that has loaded its model."""
        words = ""
        for _ in range(_STARTS):
            if self._process is not None:
                return
            try:
                self._made()
                self._exchange(self._work)
            except EOFError as error:
                words = str(error)
        if self._process is None:
            raise CorpusError(
                f"a process that loads the model {printable(words)}, {_STARTS} times; the memory may not be enough: "
                "take fewer processes, and the same call continues"
            )

    def _exchange(self, message: bytes) -> Any:
        """Send a message and take what it is answered by; raises `EOFError` if the process died."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            send(process.stdin, message)
            answer = pickle.loads(receive(process.stdout))
        except (OSError, EOFError, ValueError):
            raise EOFError(self._last_words(process)) from None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _made(self) -> None:
        with self._lock:
            if self._ended:
                raise _EndedError
            if self._process is None:
                command = [sys.executable, "-P", "-m", "modernbert.corpus.worker"]
                pipe = subprocess.PIPE
                self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=self._environment)

    def _last_words(self, process: subprocess.Popen[bytes]) -> str:
        code = process.wait()
        self._process = None
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def end(self) -> None:
        with self._lock:
            self._ended = True
            if self._process is not None:
                self._process.kill()


def _drive(worker: _Worker, feed: _Feed, done: queue.SimpleQueue[Any]) -> None:
    """Let one worker compute units until there are no more."""
    try:
        while (unit := feed.next()) is not None:
            done.put(_tried(worker, unit))
        worker.end()
        done.put(None)
    except _EndedError:
        done.put(None)
    except BaseException as error:  # of the reader of the corpus, or of the work
        done.put(error)


def _tried(worker: _Worker, unit: Unit) -> Record:
    words: collections.deque[str] = collections.deque(maxlen=1)
    for _ in range(ATTEMPTS):
        try:
            return worker.ask(unit)
        except EOFError as error:
            words.append(str(error))
    raise CorpusError(
        f"the processes that computed {unit.name} died {ATTEMPTS} times; the last one {printable(words[0])}. "
        "The memory may not be enough for the model: take fewer processes, and the same call continues"
    )


def send(stream: IO[bytes], content: bytes) -> None:
    """Write a message."""
    stream.write(_HEAD.pack(len(content)))
    stream.write(content)
    stream.flush()


def receive(stream: IO[bytes]) -> bytes:
    """Read a message; raises `EOFError` if the other side is gone."""
    head = stream.read(_HEAD.size)
    if len(head) < _HEAD.size:
        raise EOFError
    (size,) = _HEAD.unpack(head)
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return content
