"""The log of requests: lines of JSON in a file or on standard error, written by a thread, so that no request waits."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import threading
from typing import Any

from modernbert.errors import InputError
from modernbert.serving.metrics import Metrics

_WAITING = 10_000  # lines at the most; where the disk or the reader of a pipe is slower, further ones are dropped


class AccessLog:
    """Lines in the order in which requests ended. What cannot be written is dropped, counted, and said once.

    Args:
        path: of the file, which lines are added to; None is standard error.
        metrics: counts the lines that are lost.

    Raises:
        InputError: the file cannot be opened.
    """

    def __init__(self, path: str | None, metrics: Metrics) -> None:
        try:
            self._file = 2 if path is None else os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise InputError(f"log_file {path} cannot be written: {error.strerror}") from None
        self._own, self._metrics, self._failing, self._torn = path is not None, metrics, False, False
        self._lines: queue.Queue[bytes | None] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def put(self, line: dict[str, Any]) -> None:
        """Have a line written; never waits."""
        try:
            self._lines.put_nowait(json.dumps(line).encode() + b"\n")
        except queue.Full:
            self._lost("its lines come faster than they are written")

    def close(self, wait: float = 2.0) -> None:
        """Write what waits, for a while."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)
            self._thread.join(wait)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._write(b"\n" + line if self._torn else line)
                self._failing = self._torn = False
            except OSError as error:  # a full disk or a closed pipe ends no request
                self._lost(error.strerror or type(error).__name__)
        if self._own:
            os.close(self._file)

    def _write(self, line: bytes) -> None:
        while line:
            line = line[os.write(self._file, line) :]
            self._torn = bool(line)  # the next one begins a line of its own

    def _lost(self, why: str) -> None:
        self._metrics.lost_lines.inc()
        if not self._failing:
            self._failing = True
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(f"modernbert: lines of the log are lost: {why}\n")
