"""The texts of a corpus: files found and read as a stream, wherever fsspec opens them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import itertools
import lzma
import os
import posixpath
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from modernbert.corpus.output import CorpusError, filesystem
from modernbert.errors import InputError, printable
from modernbert.io.tables.columns import Field, choose_columns, value_in
from modernbert.io.tables.reading import library, read_stream

_LINES = (".txt", ".text", ".md", ".jsonl", ".csv", ".tsv")
_PACKED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
READ = (*_LINES, ".parquet")
_BROKEN = (OSError, EOFError, ValueError, NotImplementedError, ImportError, zlib.error, lzma.LZMAError)
_ROWS, _BYTES = 1024, 4 * 2**20  # of a batch, at the most


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a corpus.

    Attributes:
        name: its full path, or its address; bytes of it that are not UTF-8 are escaped.
        system, path: what opens it.
        size: its bytes.
    """

    name: str
    system: Any
    path: str
    size: int

    @property
    def suffix(self) -> str:
        """What it is read as."""
        stem, suffix = posixpath.splitext(self.path.lower())
        return posixpath.splitext(stem)[1] if suffix in _PACKED else suffix

    @contextlib.contextmanager
    def open(self) -> Iterator[tuple[Any, Any]]:
        """Its bytes, as they are stored and unpacked."""
        from fsspec.compression import compr

        packed = _PACKED.get(posixpath.splitext(self.path.lower())[1])
        if packed is not None and packed not in compr:
            raise InputError(f"{self.name} needs a package that unpacks {packed}: pip install zstandard")
        with self.system.open(self.path, "rb") as raw:
            if packed is None:
                yield raw, raw
            else:
                with compr[packed](raw, mode="rb") as stream:
                    yield raw, stream


class Batch(NamedTuple):
    """Rows of a file.

    Attributes:
        first: the number of the first one in the file, from 0; blank lines do not count.
        rows: of each its fields, or why it cannot be read.
        kept: columns to keep, as Arrow arrays or lists.
        size: bytes of the file up to here, about.
    """

    first: int
    rows: list[tuple[Any, ...] | InputError]
    kept: Mapping[str, Any]
    size: int


def find_files(places: Sequence[str], without: str | None = None) -> list[File]:
    """The files of folders, globs and names, each once, in the order of their names.

    Args:
        places: paths or addresses.
        without: a folder that is left out, the output's.

    Raises:
        InputError: a place is not there or holds no file that is read.
    """
    found: dict[str, File] = {}
    for place in places:
        system, path = filesystem(place)
        try:
            names = _below(system, path)
        except (OSError, ImportError) as error:
            raise InputError(f"{place} cannot be listed: {_line(error)}") from None
        outside = _outside(system, without)
        files = {
            _full(system, name): File(_full(system, name), system, name, int(about.get("size") or 0))
            for name, about in names.items()
            if outside(name)
        }
        wrong = [name for name, file in files.items() if file.suffix not in READ]
        if names and len(names) == 1 and wrong and path in names:
            raise InputError(
                f"{place} ends with {posixpath.splitext(path)[1] or 'nothing'}; read are {', '.join(READ)}"
            )
        files = {name: file for name, file in files.items() if file.suffix in READ}
        if not files:
            there = "holds no file that is read" if names else "is not there"
            raise InputError(f"{place} {there}; give folders, globs or files: {', '.join(READ)}, or these with .gz")
        found |= files
    return [found[name] for name in sorted(found)]


def _below(system: Any, path: str) -> dict[str, dict[str, Any]]:
    """What is at a path: itself, all files below it, or what a glob matches."""
    if any(sign in path for sign in "*?[") and not system.exists(path):
        matched = system.glob(path, detail=True)
        inside = [_below(system, name) for name, about in matched.items() if about["type"] == "directory"]
        return {n: about for some in inside for n, about in some.items()} | {
            name: about for name, about in matched.items() if about["type"] != "directory"
        }
    found = system.find(path, detail=True)
    root = path.rstrip("/")
    hidden = (name for name in found if any(part.startswith(".") for part in name[len(root) :].split("/") if part))
    return {name: found[name] for name in set(found) - set(hidden)}


def _full(system: Any, path: str) -> str:
    full = path if _is_local(system) else str(system.unstrip_protocol(path))
    return full if full.isascii() else full.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _outside(system: Any, folder: str | None) -> Callable[[str], bool]:
    """Whether a path is not in a folder, by whatever links it is reached."""
    if folder is None:
        return lambda path: True
    resolved = functools.cache(os.path.realpath) if _is_local(system) else str
    inside = resolved(folder).rstrip("/") + "/"
    return lambda path: not (resolved(posixpath.dirname(path)) + "/").startswith(inside)


def _is_local(system: Any) -> bool:
    return "file" in ((system.protocol,) if isinstance(system.protocol, str) else system.protocol)


def read_batches(
    file: File, form: Sequence[Field], named: Mapping[str, list[str]], keep: Sequence[str]
) -> Iterator[Batch]:
    """The rows of a file, in batches of bounded size.

    Args:
        file: to read.
        form: fields of the task.
        named: columns that the user named for them.
        keep: columns to keep.

    Raises:
        InputError: the file, or the rest of it, cannot be read, or lacks a column.
    """
    try:
        yield from (_of_parquet if file.suffix == ".parquet" else _of_lines)(file, form, named, keep)
    except (InputError, CorpusError):
        raise
    except FileNotFoundError:
        raise InputError(f"{file.name} is not there any more") from None
    except _BROKEN as error:
        raise InputError(f"{file.name} cannot be read: {_line(error)}") from None


def _of_parquet(
    file: File, form: Sequence[Field], named: Mapping[str, list[str]], keep: Sequence[str]
) -> Iterator[Batch]:
    parquet = library("pyarrow.parquet", Path(file.name), "corpus")
    with file.open() as (_, stream):
        table = parquet.ParquetFile(stream)
        names = table.schema_arrow.names
        chosen = choose_columns(names, form, named, file.name)
        _check_kept(names, keep, file.name)
        wanted = list(dict.fromkeys([*(c for some in chosen.values() for c in some), *keep]))
        if twice := [name for name in wanted if names.count(name) > 1]:
            raise InputError(f"{file.name} has more than one column called {', '.join(twice)}")
        first, total = 0, table.metadata.num_rows
        for batch in table.iter_batches(256, columns=wanted):
            columns = {name: batch[name].to_pylist() for name in wanted if name not in keep or _is_in(chosen, name)}
            rows = [
                _row(
                    {name: values[i] for name, values in columns.items()},
                    form,
                    chosen,
                    f"{file.name}, row {first + i},",
                )
                for i in range(len(batch))
            ]
            first += len(batch)
            yield Batch(
                first - len(batch), rows, {name: batch[name] for name in keep}, file.size * first // max(1, total)
            )


def _is_in(chosen: Mapping[str, list[str]], name: str) -> bool:
    return any(name in some for some in chosen.values())


def _of_lines(
    file: File, form: Sequence[Field], named: Mapping[str, list[str]], keep: Sequence[str]
) -> Iterator[Batch]:
    is_table = file.suffix in (".csv", ".tsv")
    columns: list[str] | None = None
    chosen: dict[str, list[str]] = {}
    first = 0
    with file.open() as (raw, stream):
        records = read_stream(stream, file.name, file.suffix)
        damage: Exception | None = None
        while damage is None:
            rows: list[tuple[Any, ...] | InputError] = []
            kept: dict[str, list[Any]] = {name: [] for name in keep}
            held = 0
            try:
                for record in itertools.islice(records, _ROWS):
                    where = f"{file.name}, row {first + len(rows)},"
                    row: tuple[Any, ...] | InputError
                    if isinstance(record, InputError):
                        row = record
                    else:
                        try:
                            if list(record) != columns:
                                chosen = choose_columns(list(record), form, named, file.name if is_table else where)
                                if is_table:
                                    _check_kept(list(record), keep, file.name)
                                columns = list(record)
                            row = _row(record, form, chosen, where)
                        except InputError as error:
                            if is_table and columns is None:
                                raise
                            row = error
                    rows.append(row)
                    for name, values in kept.items():
                        values.append(None if isinstance(record, InputError) else record.get(name))
                    held += sum(len(value) for value in row if isinstance(value, str)) if isinstance(row, tuple) else 0
                    if held > _BYTES:
                        break
            except (zlib.error, lzma.LZMAError, gzip.BadGzipFile):  # rows before it may be garbled already
                raise
            except _BROKEN as error:  # what was read before it counts
                damage = error
            if rows:
                first += len(rows)
                yield Batch(first - len(rows), rows, kept, min(file.size, raw.tell()))
            elif damage is None:
                return
        raise damage


def _check_kept(names: Sequence[str], keep: Sequence[str], where: str) -> None:
    missing = [name for name in keep if name not in names]
    if missing:
        raise InputError(f"{where} has the columns {', '.join(names)} and no {missing[0]!r}, which keep names")


def _row(
    record: Mapping[str, Any], form: Sequence[Field], chosen: Mapping[str, list[str]], where: str
) -> tuple[Any, ...] | InputError:
    """What a row has in each field; None where it has nothing that must be there."""
    try:
        values = []
        for field in form:
            value = value_in(record, chosen[field.name], field, where) if field.name in chosen else None
            if field.required and value is None:
                raise InputError(f"{where} has nothing in {chosen[field.name][0]!r}")
            for text in value if field.many and isinstance(value, list) else [value]:
                _check(text, field, chosen, where)
            values.append(value)
        return tuple(values)
    except InputError as error:
        return error


def _check(text: Any, field: Field, chosen: Mapping[str, list[str]], where: str) -> None:
    if text is None:
        return
    if not isinstance(text, str):
        raise InputError(f"{where} has {type(text).__name__} in {chosen[field.name][0]!r}; texts are read")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{where} holds a lone surrogate in {chosen[field.name][0]!r}, which is no Unicode"
            ) from None


def _line(error: Exception) -> str:
    return printable(" ".join(str(error).split()) or type(error).__name__, limit=300)
