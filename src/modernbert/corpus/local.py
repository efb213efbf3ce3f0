"""The engine of one machine: processes that are started once, each with its share of the cores."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import IO, Any

from modernbert.checks import Options, option
from modernbert.corpus.contract import ATTEMPTS, PATIENCE, Record, Unit, Units
from modernbert.corpus.output import CorpusError
from modernbert.errors import printable
from modernbert.training.threads import cores, quota

_HEAD = struct.Struct("<Q")  # bytes of a message
_SMALL = 100 * 2**20  # bytes of weights of a model that threads speed up little, beside what is done around it
_THREADS = 4  # of a process with a larger one
_STARTS = 3  # of a process that dies before it has loaded the model


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalOptions(Options):
    """Options of the engine `local`."""

    processes: int | None = option(
        None,
        "Processes that compute; 0 computes in this one.",
        least=0,
        otherwise="one a GPU; else one a core for weights below 100 MiB, and one for 4 cores above",
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
        self.processes, self.threads = processes, threads
        self.workers: list[int] = []

    def run(self, units: Iterator[Unit], work: Callable[[Unit], Record]) -> Generator[Record, None, None]:
        """See `modernbert.corpus.contract.Engine`."""
        if self.processes == 0:
            yield from map(work, units)
            return
        gpus = _gpus(getattr(work, "device", None))
        usable = max(1, min(cores(), int(quota() or cores())))
        processes = self.processes or gpus or processes_for(usable, getattr(work, "weights", 0))
        threads_each = self.threads or max(1, usable // processes)
        done: queue.SimpleQueue[Record | BaseException | None] = queue.SimpleQueue()
        feed = units if isinstance(units, Units) else Units(units)
        pool = [_Worker(work, threads_each, i % gpus if gpus > 1 else None) for i in range(processes)]
        threads = [threading.Thread(target=_drive, args=(worker, feed, done), daemon=True) for worker in pool]
        running = 0
        try:
            for thread in threads:
                thread.start()
                running += 1
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
            feed.end()
            for worker in pool:
                worker.end()
            until = time.monotonic() + PATIENCE
            for thread in [thread for thread in threads if thread.ident is not None]:
                thread.join(max(0.0, until - time.monotonic()))
            self.workers = []


def processes_for(usable: int, weights: int) -> int:
    """How many processes share these cores by default, for a model with so many bytes of weights."""
    return usable if 0 < weights <= _SMALL else max(1, usable // _THREADS)


def _gpus(device: str | None) -> int:
    """How many GPUs there are to share out; 0 where none is wanted, or one that is named."""
    if device not in ("cuda", "gpu"):
        return 0
    import torch

    return torch.cuda.device_count()


class _EndedError(Exception):
    """The job ended while a process was to be started."""


class _Worker:
    """A process that computes units one after another, and is started again if it dies."""

    def __init__(self, work: Callable[[Unit], Record], threads: int, gpu: int | None) -> None:
        self._work, self._ended = pickle.dumps(work), False
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "passive",
            "RAYON_NUM_THREADS": str(threads),
        }
        if gpu is not None:
            seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            self._environment["CUDA_VISIBLE_DEVICES"] = seen[gpu] if seen != [""] else str(gpu)

    @property
    def number(self) -> int:
        process = self._process
        return process.pid if process is not None else 0

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
        self.close()
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def close(self) -> None:
        """End the process and let go of it; for the thread that asks it."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    if stream is not None:
                        stream.close()

    def end(self) -> None:
        """Have the process end, whatever it does; for other threads."""
        with self._lock:
            self._ended = True
            process = self._process
            if process is not None:
                process.kill()


def _drive(worker: _Worker, feed: Units, done: queue.SimpleQueue[Any]) -> None:
    """Let one worker compute units until there are no more."""
    try:
        for unit in feed:
            done.put(_tried(worker, unit))
        done.put(None)
    except _EndedError:
        done.put(None)
    except BaseException as error:  # of the reader of the corpus, or of the work
        done.put(error)
    finally:
        worker.close()


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
