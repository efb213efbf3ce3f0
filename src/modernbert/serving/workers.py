"""Running a server in one process, or in several that share its address and a CPU's cores. Nothing here imports torch.

Of several, the process that starts them holds the sockets and no model. It passes signals on, starts a process anew
that was lost, and ends when all of them have.
"""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import tempfile
import threading
from typing import Any

from modernbert.serving.options import ServeOptions
from modernbert.serving.sockets import listening


def run(options: dict[str, Any]) -> int:
    """Serve until a signal comes; the exit code.

    Args:
        options: of `ServeOptions`. Each of several processes has its share of the cores (`OMP_NUM_THREADS`, unless that
            is set), and all count together for `/metrics`.

    Raises:
        InputError: an option is not allowed, or the server cannot listen there.
        NotFoundError, CheckpointError: a model cannot be loaded.
    """
    chosen = ServeOptions.of(options, "serve")
    with listening(chosen) as sockets:
        if chosen.workers == 1:
            return _serve(chosen, sockets)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // chosen.workers)))
        with tempfile.TemporaryDirectory(prefix="modernbert-metrics-") as folder:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
            return _Workers(chosen, sockets).run()


class _Workers:
    def __init__(self, options: ServeOptions, sockets: list[socket.socket]) -> None:
        self.options, self.sockets = options, sockets
        self.context = multiprocessing.get_context("spawn")
        self.ending = threading.Event()
        self.served = [self.context.Event() for _ in range(options.workers)]
        self.running: list[Any] = [None] * options.workers

    def run(self) -> int:
        for kind in (signal.SIGTERM, signal.SIGINT):
            signal.signal(kind, self._pass_on)
        for number in range(self.options.workers):
            self._start(number)
        failed = False
        while alive := [process for process in self.running if process.is_alive()]:
            multiprocessing.connection.wait([process.sentinel for process in alive], 1.0)
            for number, process in enumerate(self.running):
                if process.is_alive() or self.ending.is_set():
                    continue
                if not self.served[number].is_set():  # another one would be lost, too
                    failed = True
                    self._pass_on(signal.SIGTERM, None)
                    break
                sys.stderr.write(f"worker {number} was lost (exit code {process.exitcode}); another one starts\n")
                self._start(number)
        in_order = (0, -signal.SIGTERM)  # the second of one that was still loading its models
        return 1 if failed or any(process.exitcode not in in_order for process in self.running) else 0

    def _start(self, number: int) -> None:
        self.served[number].clear()
        given = (self.options, self.sockets, number, self.served[number])
        self.running[number] = self.context.Process(target=_work, args=given, name=f"worker {number}")
        self.running[number].start()

    def _pass_on(self, kind: int, frame: Any) -> None:
        self.ending.set()
        for process in self.running:
            if process is not None and process.is_alive():
                process.terminate()


def _serve(options: ServeOptions, sockets: list[socket.socket], **how: Any) -> int:
    gc.disable()  # imports make a million objects and no garbage; to look for it takes a fifth of the start
    try:
        from modernbert.serving.server import serve

        return serve(options, sockets, **how)
    finally:
        gc.enable()


def _work(options: ServeOptions, sockets: list[socket.socket], number: int, served: Any) -> None:
    """One of the processes; errors, and where it serves, are said by the first alone."""
    try:
        code = _serve(options, sockets, says=number == 0, started=served.set)
    except (ValueError, OSError) as error:
        if number == 0:
            sys.stderr.write(f"modernbert: {' '.join(str(error).split())}\n")
        code = 2
    sys.exit(code)
