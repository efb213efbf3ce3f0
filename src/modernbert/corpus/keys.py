"""Which texts are known: a set of keys on the disk, so that memory does not grow with the corpus."""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from modernbert.corpus.output import KEYS, CorpusError
from modernbert.corpus.settings import Key

_CACHE = 32 * 1024  # KiB of memory for pages; the system keeps more of the file where it has room
NEW, KNOWN, AGAIN = "new", "known", "again"


class KeySet:
    """Keys of texts, in a file of its own of about 70 bytes a key.

    Args:
        folder: where the file is; it is removed in the end. By default the system's folder of temporary files.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._place = str(folder or tempfile.gettempdir())
        with self._writing():
            self._folder = tempfile.TemporaryDirectory(prefix=KEYS, dir=folder, ignore_cleanup_errors=True)
            self._database = sqlite3.connect(
                Path(self._folder.name) / "keys", isolation_level=None, check_same_thread=False
            )
            run = self._database.execute
            for line in ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE", f"cache_size=-{_CACHE}"):
                run(f"PRAGMA {line}")
            # `seen`: whether a row of this run has had the key.
            run("CREATE TABLE keys (key BLOB PRIMARY KEY, seen INTEGER) WITHOUT ROWID")
            run("BEGIN")

    def add_known(self, keys: Iterable[Key]) -> None:
        """Add the keys of texts that are computed already."""
        with self._writing():
            self._database.executemany("INSERT OR IGNORE INTO keys VALUES (?, 0)", ((key,) for key in keys))

    def meet(self, keys: Sequence[Key]) -> list[str]:
        """Of each key of a row: "new", "known" from before, or met "again" in this run."""
        out = []
        run = self._database.execute
        with self._writing():
            for key in keys:
                if run("INSERT OR IGNORE INTO keys VALUES (?, 1)", (key,)).rowcount:
                    out.append(NEW)
                elif run("UPDATE keys SET seen = 1 WHERE key = ? AND seen = 0", (key,)).rowcount:
                    out.append(KNOWN)
                else:
                    out.append(AGAIN)
        return out

    def close(self) -> None:
        """Remove the file."""
        with contextlib.suppress(sqlite3.Error):
            self._database.close()
        self._folder.cleanup()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise CorpusError(
                f"the keys of texts cannot be kept in {self._place}: {error}; make room there, and the same call "
                "continues"
            ) from error
