"""A process of the engine `local`: it reads units from standard input, and answers with records."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
from typing import Any

from modernbert.corpus.local import receive, send
from modernbert.corpus.output import CorpusError


def main() -> None:
    """Compute until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's goes to the process that started this one
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not stand between answers
    with contextlib.suppress(EOFError, BrokenPipeError):
        work: Any = None
        while True:
            message = receive(sys.stdin.buffer)
            try:
                if work is None:
                    work = pickle.loads(message)
                    answer = pickle.dumps(work.prepare())
                else:
                    answer = pickle.dumps(work(pickle.loads(message)))
            except Exception as error:
                answer = _pickled(error)
            send(answers, answer)


def _pickled(error: Exception) -> bytes:
    with contextlib.suppress(Exception):
        made = pickle.dumps(error)
        pickle.loads(made)
        return made
    return pickle.dumps(CorpusError(f"{type(error).__name__}: {' '.join(str(error).split())}"))


if __name__ == "__main__":
    main()
