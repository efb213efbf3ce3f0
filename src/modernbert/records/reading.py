"""Reading records of files by their suffix."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from modernbert.errors import InputError
from modernbert.records.structured import is_dataset, read_conll, read_dataset, read_json

Record = dict[str, Any]
T = TypeVar("T")
_ROWS_TOGETHER = 1024


def read_records(
    path: Path | None, go_on: bool = False, *, part: str | None = None, header: Sequence[str] | None = None
) -> Iterator[Record | InputError]:
    """Records of a file by its suffix, plain text where that says nothing; standard input without a file.

    Args:
        path: the file, or a folder of the `datasets` library.
        go_on: give the error in the place of a line that is no record, and read the lines after it.
        part: which part, of what has several; see `structured.parts_of`.
        header: names of the columns of a table whose first line does not name them.

    Raises:
        InputError: a line is not what the suffix promises.
        OSError: the file cannot be read.
    """
    if path is not None and path.is_dir() and not is_dataset(path):
        raise InputError(f"{path} is a folder; give a file: {', '.join([*_READERS, *_PARTED])}")
    suffix = "" if path is None else path.suffix.lower()
    if header is not None and suffix not in (".csv", ".tsv"):
        raise InputError(f"{path or 'standard input'} is no table; a header is for .csv and .tsv")
    records: Records
    if path is None:
        records = _lines(sys.stdin.buffer, "standard input")
    elif path.is_dir():
        records = read_dataset(path, part)
    elif suffix in _PARTED:
        records = _PARTED[suffix](path, part)
    elif part is not None:
        raise InputError(f"{path} has no parts; it cannot give {part!r}")
    elif header is not None:
        records = _read_table(path, header)
    else:
        records = _READERS.get(suffix, _read_text)(path)
    for record in records:
        if isinstance(record, InputError) and not go_on:
            raise record
        yield record


def count_records(path: Path | None) -> int | None:
    """How many records a file holds, where that is cheap to say."""
    suffix = "" if path is None else path.suffix.lower()
    if path is None or not path.is_file() or suffix in (".csv", ".tsv", *_PARTED):  # a cell may hold line ends
        return None
    if suffix == ".parquet":
        with _opened_parquet(path) as file:
            return int(file.metadata.num_rows)
    with path.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


# Readers give the error in the place of a line that is no record, and raise where the rest of the file makes no sense.
Records = Iterator[Record | InputError]


def _lines(stream: BinaryIO, name: str) -> Records:
    """Lines that are not blank; each must be UTF-8."""
    for number, line in enumerate(stream, 1):
        text = _decoded(line, name, number)
        if isinstance(text, InputError):
            yield text
        elif text.strip():
            yield {"text": text.rstrip("\r\n")}


def _decoded(line: bytes, name: str, number: int) -> str | InputError:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        return InputError(f"{name}, line {number}, is not UTF-8: {error.reason}")


def _read_text(path: Path) -> Records:
    with path.open("rb") as stream:
        yield from _lines(stream, str(path))


def _read_jsonl(path: Path) -> Records:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            text = _decoded(line, str(path), number)
            if isinstance(text, InputError):
                yield text
            elif text.strip():
                yield _parsed(text, f"{path}, line {number},")


def _parsed(text: str, where: str) -> Record | InputError:
    try:
        value = json.loads(text)
    except ValueError as error:
        return InputError(f"{where} is not JSON: {error}")
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, dict):
        return InputError(f"{where} holds a {type(value).__name__}; give objects or texts")
    return value


def _read_table(path: Path, header: Sequence[str] | None = None) -> Records:
    csv.field_size_limit(2**31 - 1)
    with path.open("rb") as stream:
        lines = (sure(_decoded(line, str(path), number)) for number, line in enumerate(stream, 1))
        tabs = path.suffix.lower() == ".tsv"
        # Tabs leave quotes alone in most files that have no header.
        quoting: Any = csv.QUOTE_NONE if tabs and header is not None else csv.QUOTE_MINIMAL
        rows: csv.DictReader[str] = csv.DictReader(
            lines, header, delimiter="\t" if tabs else ",", strict=True, quoting=quoting
        )
        try:
            names = list(rows.fieldnames or ())
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise InputError(f"{path} has more than one column called {', '.join(sorted(twice))}")
            for row in rows:
                if None in row or None in row.values():
                    more = "more" if None in row else "fewer"
                    yield InputError(f"{path}, line {rows.line_num}, has {more} cells than its header, {len(names)}")
                else:
                    yield dict(row)
        except csv.Error as error:
            raise InputError(f"{path}, line {rows.line_num}, is no table: {error}") from error


def sure(value: T | InputError) -> T:
    """A value that is there; raises the error that stands in its place."""
    if isinstance(value, InputError):
        raise value
    return value


def _read_parquet(path: Path) -> Records:
    with _opened_parquet(path) as file:
        for batch in file.iter_batches(_ROWS_TOGETHER):
            yield from batch.to_pylist()


def _opened_parquet(path: Path) -> Any:
    library = parquet()
    try:
        return library.ParquetFile(path)
    except ValueError as error:  # what the library raises for files of another kind
        raise InputError(f"{path} is no parquet file: {error}") from error


def parquet() -> Any:
    """The module `pyarrow.parquet`; raises `InputError` where it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("parquet files need pyarrow: pip install 'modernbert[parquet]'") from error
    return pyarrow.parquet


_READERS: dict[str, Callable[[Path], Records]] = {
    ".txt": _read_text,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
_PARTED: dict[str, Callable[[Path, str | None], Iterator[Record]]] = {
    ".json": read_json,
    **dict.fromkeys((".conll", ".bio", ".iob2"), read_conll),
}
