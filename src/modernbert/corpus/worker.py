"""A process of the engine `local`: it reads units from standard input, and answers with records."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import queue
import signal
import sys
import threading
from typing import Any

from modernbert.corpus.local import receive, send
from modernbert.corpus.output import CorpusError


def main() -> None:
    """Compute until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's goes to the process that started this one
    logging.getLogger("modernbert").setLevel(logging.ERROR)  # that one has given the warnings
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not stand between answers
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(messages,), daemon=True).start()
    work: Any = None
    while True:
        message = messages.get()
        try:
            if work is None:
                work = pickle.loads(message)
                answer = pickle.dumps(work.prepare())
            else:
                answer = pickle.dumps(work(pickle.loads(message)))
        except Exception as error:
            answer = _pickled(error)
        send(answers, answer)


def _listen(messages: queue.SimpleQueue[bytes]) -> None:
    """Pass messages on; once the other side is gone, end at once, whatever is being computed."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            messages.put(receive(sys.stdin.buffer))
    os._exit(1)


def _pickled(error: Exception) -> bytes:
    with contextlib.suppress(Exception):
        made = pickle.dumps(error)
        pickle.loads(made)
        return made
    return pickle.dumps(CorpusError(f"{type(error).__name__}: {' '.join(str(error).split())}"))


if __name__ == "__main__":
    main()
