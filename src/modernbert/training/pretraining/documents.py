"""Raw text: documents of files, folders, datasets and standard input, some of them held out."""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from modernbert.errors import InputError
from modernbert.io.tables import parts_of, read_records, text_in
from modernbert.io.tables.reading import check_once, is_dataset

SUFFIXES = (".txt", ".jsonl", ".parquet")
STANDARD_INPUT = "-"


class Document(NamedTuple):
    """A text, the name of the source that it belongs to, and whether it is held out."""

    text: str
    source: str
    held_out: bool


class _Place(NamedTuple):
    """Where documents are: a file, or a folder of the `datasets` library.

    Documents of one group are held out by one share: those of a file, or of all .txt files of a folder.
    """

    source: str
    path: Path
    group: Path
    column: str


class Collection:
    """Documents of files; iterating gives them in the order of their paths, each time the same.

    A .txt file is one document; a row of another file is one, its text in `column`; so is a line of standard input.

    Of every file of rows and every folder of .txt files the same share is held out, rounded to whole documents:
    those whose texts hash lowest, which are the same ones at every run and on any machine.

    Args:
        paths: files; folders, which are searched for them; folders of the `datasets` library; "-" is standard input.
            `NAME=PATH` names the source that a path belongs to; else it is the path's own name.
        held_out: share of the documents to keep out of training; 1 keeps out all.
        column: where rows hold their text.

    Raises:
        InputError: a path does not exist or has another suffix, or a row of it holds no text.
    """

    def __init__(self, paths: Iterable[str | Path], held_out: float = 0.0, column: str = "text") -> None:
        if not 0 <= held_out <= 1:
            raise InputError(f"the held-out share is {held_out}; it must lie in [0, 1]")
        self.column = column
        self._spool: Path | None = None
        given = [(path, place) for path in map(str, paths) for place in self._places(path)]
        check_once((place.path, None, path) for path, place in given)
        unnamed: dict[str, str] = {}
        for path, place in given:
            source = place.source
            if not path.startswith(f"{source}=") and unnamed.setdefault(source, path) != path:
                raise InputError(f"{unnamed[source]} and {path} would both be called {source}; write NAME=PATH")
        self.places = [place for _, place in given]
        self.held_out = self._lowest(held_out)

    def __iter__(self) -> Iterator[Document]:
        for number, (text, place) in enumerate(self._texts()):
            yield Document(text, place.source, number in self.held_out)

    def _lowest(self, share: float) -> set[int]:
        groups: dict[Path, list[tuple[bytes, int]]] = {}
        self.documents = 0
        for number, (text, place) in enumerate(self._texts()):
            self.documents += 1
            if share:
                groups.setdefault(place.group, []).append((hashlib.sha256(text.encode()).digest(), number))
        return {number for group in groups.values() for _, number in sorted(group)[: round(len(group) * share)]}

    def _texts(self) -> Iterator[tuple[str, _Place]]:
        for place in self.places:
            if place.path.suffix == ".txt":
                yield place.path.read_text(encoding="utf-8-sig", errors="replace"), place
                continue
            parts: list[str | None] = [*parts_of(place.path)]
            for part in parts or [None]:
                for number, record in enumerate(read_records(place.path, part), 1):
                    yield text_in(record, place.column, f"{place.path}, row {number},"), place

    def _places(self, given: str) -> list[_Place]:
        name, named, rest = given.partition("=")
        if not named or Path(given).exists():
            name, rest = "", given
        if rest == STANDARD_INPUT:
            path = self._spooled()
            return [_Place(name or "standard input", path, path, "text")]
        path = Path(rest)
        if not path.exists():
            raise InputError(f"there is no file or folder {path}")
        if path.is_file() and path.suffix not in SUFFIXES:
            raise InputError(f"{path} is none of {', '.join(SUFFIXES)}")
        found = _inside(path) if path.is_dir() and not is_dataset(path) else [path]
        source = name or path.resolve().stem
        return [_Place(source, p, p.parent if p.suffix == ".txt" else p, self.column) for p in found]

    def _spooled(self) -> Path:
        """Standard input as a file: documents are read more than once."""
        if self._spool is not None:
            raise InputError("standard input is named twice; it can be read once")
        self._spool = Path(tempfile.mkdtemp(prefix="modernbert-"))
        weakref.finalize(self, shutil.rmtree, self._spool, ignore_errors=True)
        path = self._spool / "standard input"
        with path.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        return path


def _inside(folder: Path) -> list[Path]:
    datasets = {p.parent for p in folder.rglob("*.json") if is_dataset(p.parent)}
    files = {p for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file()}
    found = sorted(p for p in files | datasets if not datasets & set(p.parents))  # a dataset has files of its own
    if not found:
        raise InputError(f"{folder} holds no {', '.join(SUFFIXES)} file and no dataset")
    return found
