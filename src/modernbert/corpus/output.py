"""The folder that a job writes to: files appear whole or not at all, on a disk or wherever fsspec writes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import posixpath
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modernbert.errors import InputError, printable
from modernbert.io.files import parse_json
from modernbert.io.tables.reading import library

KEYS = ".keys-"  # how the name of a folder begins that holds the keys of a run
_UNFINISHED = ".tmp"  # how the name of a hidden file ends that is being written
_AT_ONCE = 64 * 2**20  # bytes that are sent in one piece


class CorpusError(RuntimeError):
    """A job ended before its corpus did; what is finished stays, and the same call continues after it."""


def filesystem(place: str) -> tuple[Any, str]:
    """What reads and writes a place, and the place's path there.

    Raises:
        InputError: the place names a protocol that fsspec does not know, or whose package is not installed.
    """
    library("fsspec", Path(place), "corpus")
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(place)
    except (ValueError, ImportError) as error:
        raise InputError(f"{place} cannot be opened: {printable(' '.join(str(error).split()), limit=200)}") from None
    return system, str(path)


class Output:
    """A folder for shards and what is known of them.

    - `data/NAME.parquet`: a row for each distinct text that was answered: `key`, the answer, `tokens`, `truncated`.
    - `errors/NAME.jsonl`: a line for each that was not: its key and the reason.
    - `shards/NAME.json`: what is known of a finished shard; a shard without it is not finished.
    - `rows/`: which row of which file has which key, and the columns that are kept.
    - `manifest.json`, `metrics.jsonl`.

    Args:
        place: a path, or an address that fsspec writes to.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self._open()

    def _open(self) -> None:
        self.system, self.root = filesystem(self.place)
        self.is_local = "file" in _protocols(self.system)
        if self.is_local:
            self.place = self.root  # workers may run elsewhere in the tree of folders

    def __getstate__(self) -> dict[str, Any]:
        return {"place": self.place}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.place = state["place"]
        self._open()

    def path(self, name: str) -> str:
        """The path of a file, for `system`."""
        return posixpath.join(self.root, name)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Any]:
        """Give a binary file that gets its name once it is written whole.

        For a place that is not of this machine, it is written to the folder of temporary files and copied in the end.

        Raises:
            CorpusError: it cannot be written, such as on a full disk.
        """
        path = self.path(name)
        if not self.is_local:
            with tempfile.TemporaryDirectory(prefix="modernbert-", ignore_cleanup_errors=True) as folder:
                made = Path(folder) / posixpath.basename(path)
                with _told(made), made.open("wb") as file:
                    yield file
                self._put(path, made)
            return
        other = Path(path).parent / f".{uuid.uuid4().hex}{_UNFINISHED}"
        try:
            with _told(path):
                other.parent.mkdir(parents=True, exist_ok=True)
                with other.open("wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())  # or a name may outlive a loss of power, and its content not
                other.replace(path)
        finally:
            with contextlib.suppress(OSError):
                other.unlink()

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Write a file whole or not at all."""
        if self.is_local:
            with self.writing(name) as file:
                file.write(content)
        else:
            self._put(self.path(name), content)

    def _put(self, path: str, content: bytes | memoryview | Path) -> None:
        """Have a file elsewhere, by another name until it is whole.

        Where nothing is renamed but copied, as in stores of objects, a file is there once it was sent whole: it has
        its own name at once.
        """
        place = f"{posixpath.dirname(path)}/.{uuid.uuid4().hex}{_UNFINISHED}" if self._renames else path
        try:
            self.system.makedirs(posixpath.dirname(path), exist_ok=True)
            if isinstance(content, Path) and content.stat().st_size > _AT_ONCE:
                self.system.put_file(str(content), place)
            else:
                self.system.pipe_file(place, content.read_bytes() if isinstance(content, Path) else bytes(content))
            if self._renames:
                self._rename(place, path)
        except Exception as error:  # each system has its own
            if self._renames:
                with contextlib.suppress(Exception):
                    self.system.rm_file(place)
            what = " ".join(str(error).split()) or type(error).__name__
            raise CorpusError(
                f"{path} cannot be written: {printable(what, limit=300)}; the same call continues"
            ) from error

    @property
    def _renames(self) -> bool:
        from fsspec import AbstractFileSystem

        return type(self.system).mv is not AbstractFileSystem.mv

    def _rename(self, place: str, path: str) -> None:
        """Give a file its name. Some systems refuse one that is taken, or do nothing and do not say so."""
        try:
            self.system.mv(place, path)
        except Exception:
            if not self.system.exists(path):
                raise
        if self.system.exists(place):
            before = f"{place}.before{_UNFINISHED}"
            self.system.mv(path, before)
            try:
                self.system.mv(place, path)
            except Exception:
                self.system.mv(before, path)
                raise
            self.system.rm_file(before)

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())

    def append(self, name: str, line: str) -> None:
        """Add a line to a file; elsewhere than on this machine, the file is written anew."""
        content = line.encode() + b"\n"
        if self.is_local:
            with _told(self.path(name)), Path(self.path(name)).open("ab", buffering=0) as file:
                before, rest = file.seek(0, os.SEEK_END), memoryview(content)
                try:
                    while rest:
                        rest = rest[file.write(rest) :]
                except OSError:
                    os.ftruncate(file.fileno(), before)
                    raise
        else:
            self.write(name, (self.read(name) or b"") + content)

    def read(self, name: str) -> bytes | None:
        """A file's content; None where there is none."""
        try:
            return bytes(self.system.cat_file(self.path(name)))
        except FileNotFoundError:
            return None

    def read_json(self, name: str) -> Any:
        """A file's JSON; None where there is none, or where it is damaged."""
        content = self.read(name)
        try:
            return None if content is None else parse_json(content)
        except ValueError:
            return None

    def names(self, folder: str) -> list[str]:
        """The names of the files in a folder, sorted, without hidden ones."""
        return list(self.sizes(folder))

    def sizes(self, folder: str) -> dict[str, int | None]:
        """The bytes of each file in a folder, where the system says them; sorted by name, without hidden ones."""
        try:
            found = self.system.ls(self.path(folder), detail=True, refresh=True)
        except FileNotFoundError:
            return {}
        except TypeError:  # of a system that caches nothing
            found = self.system.ls(self.path(folder), detail=True)
        sizes = {posixpath.basename(str(about["name"]).rstrip("/")): about.get("size") for about in found}
        return {name: sizes[name] for name in sorted(sizes) if name and not name.startswith(".")}

    def remove(self, name: str) -> None:
        """Remove a file or a folder, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.system.rm(self.path(name), recursive=True)

    def tidy(self) -> None:
        """Remove what a run that was killed left: files that it was writing, and its keys."""
        if self.is_local:
            for path in [*Path(self.root).glob(f"*/.*{_UNFINISHED}"), *Path(self.root).glob(f".*{_UNFINISHED}")]:
                path.unlink(missing_ok=True)
            for folder in Path(self.root).glob(f"{KEYS}*"):
                shutil.rmtree(folder, ignore_errors=True)
        elif self._renames:
            for path in list(self.system.find(self.root)):
                name = posixpath.basename(path)
                if name.startswith(".") and name.endswith(_UNFINISHED):
                    self.system.rm_file(path)

    def open(self, name: str) -> Any:
        """Open a file to read it."""
        return self.system.open(self.path(name), "rb")


@contextlib.contextmanager
def _told(path: str | Path) -> Iterator[None]:
    """Say in one line that a file of this machine cannot be written."""
    try:
        yield
    except OSError as error:
        what = error.strerror or " ".join(str(error).split())
        hint = "; make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise CorpusError(f"{path} cannot be written: {what}{hint}, and the same call continues") from error


def _protocols(system: Any) -> tuple[str, ...]:
    return (system.protocol,) if isinstance(system.protocol, str) else tuple(system.protocol)


def read_parquet(stream: Any, columns: list[str] | None = None) -> Any:
    """The table of a file that is open, or some of its columns.

    No thread of pyarrow reads ahead: one that still runs when Python ends would abort the process.
    """
    import pyarrow.parquet as pq

    return pq.ParquetFile(stream).read(columns=columns, use_threads=False)
