"""Reading records of files by their suffix."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from modernbert.errors import InputError, printable, shown
from modernbert.io.tables.structured import is_dataset, read_conll, read_dataset, read_json

Record = dict[str, Any]
T = TypeVar("T")
_ROWS_TOGETHER = 1024
_SEPARATORS = {False: ";\t|", True: ",;|"}  # of other tables, by whether this one has tabs
_DEEPEST = 100  # levels of a JSON record


def read_records(
    path: Path | None,
    go_on: bool = False,
    *,
    part: str | None = None,
    header: Sequence[str] | None = None,
    blank: bool = False,
) -> Iterator[Record | InputError]:
    """Records of a file by its suffix; standard input without a file.

    .txt, .text, .md and names without a suffix are lines of plain text; other suffixes that are not known are refused.

    Args:
        path: the file, or a folder of the `datasets` library.
        go_on: give the error in the place of a line that is no record, and read the lines after it.
        part: which part, of what has several; see `structured.parts_of`.
        header: names of the columns of a table whose first line does not name them.
        blank: whether a blank line counts, so that record i is line i: in plain text it is a record of an empty text,
            in .jsonl and in tables an error. Otherwise blank lines are left out, as those at the very end always are.

    Raises:
        InputError: the suffix is unknown, or a line is not what it promises.
        OSError: the file cannot be read.
    """
    if path is not None:
        check_file(path)
    suffix = "" if path is None else path.suffix.lower()
    if header is not None and suffix not in (".csv", ".tsv"):
        raise InputError(f"{path or 'standard input'} is no table; a header is for .csv and .tsv")
    records: Records
    if path is None:
        records = _texts(sys.stdin.buffer, "standard input", blank)
    elif path.is_dir():
        records = read_dataset(path, part)
    elif suffix in _PARTED:
        records = _PARTED[suffix](path, part)
    elif part is not None:
        raise InputError(f"{path} has no parts; it cannot give {part!r}")
    elif header is not None:
        records = _read_table(path, blank, header)
    else:
        records = _READERS[suffix](path, blank)
    for record in records:
        if isinstance(record, InputError) and not go_on:
            raise record
        yield record


def check_file(path: Path) -> None:
    """Refuse a file of a kind that is not read, before anything else is done for it.

    Raises:
        InputError: its suffix is unknown, or it is a folder that is no dataset.
    """
    if path.is_dir():
        if not is_dataset(path):
            raise InputError(f"{path} is a folder; give a file: {', '.join(SUFFIXES)}")
    elif path.suffix.lower() not in ("", *SUFFIXES):
        raise InputError(f"{path} ends with {path.suffix}; read are {', '.join(SUFFIXES)}, and no suffix as plain text")


def count_records(path: Path | None, *, blank: bool = False) -> int | None:
    """How many records a file holds, where that is cheap to say; `blank` as in `read_records`."""
    suffix = "" if path is None else path.suffix.lower()
    if path is None or not path.is_file() or suffix in (".csv", ".tsv", *_PARTED):  # a cell may hold line ends
        return None
    if suffix == ".parquet":
        with _opened_parquet(path) as file:
            return int(file.metadata.num_rows)
    last = count = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                last, count = number, count + 1
    return last if blank else count


# Readers give the error in the place of a line that is no record, and raise where the rest of the file makes no sense.
Records = Iterator[Record | InputError]


def _lines(stream: BinaryIO, name: str, blank: bool) -> Iterator[tuple[int, str | InputError]]:
    """Lines and their numbers; each must be UTF-8. Blank ones are "", where they count."""
    last = 0
    for number, line in enumerate(stream, 1):
        text = _decoded(line, name, number)
        if b"\0" in line:
            text = InputError(f"{name}, line {number}, holds NUL bytes; it is no text in UTF-8")
        if isinstance(text, str) and not text.strip():
            continue  # whether others follow is not known yet
        if blank:
            yield from ((missed, "") for missed in range(last + 1, number))
        last = number
        yield number, text


def _decoded(line: bytes, name: str, number: int) -> str | InputError:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        return InputError(f"{name}, line {number}, is not UTF-8: {error.reason}")


def _texts(stream: BinaryIO, name: str, blank: bool) -> Records:
    for _, text in _lines(stream, name, blank):
        yield text if isinstance(text, InputError) else {"text": text.removesuffix("\n").removesuffix("\r")}


def _read_text(path: Path, blank: bool) -> Records:
    with path.open("rb") as stream:
        yield from _texts(stream, str(path), blank)


def _read_jsonl(path: Path, blank: bool) -> Records:
    with path.open("rb") as stream:
        for number, text in _lines(stream, str(path), blank):
            if text == "":
                yield _blank(path, number)
            else:
                yield text if isinstance(text, InputError) else _parsed(text, f"{path}, line {number},")


def _blank(path: Path, number: int) -> InputError:
    return InputError(f"{path}, line {number}, is blank; remove the line, or write a record there")


def _parsed(text: str, where: str) -> Record | InputError:
    try:
        value = json.loads(text)
        deep = text.count("[") + text.count("{") > _DEEPEST and _depth(value) > _DEEPEST
    except RecursionError:
        deep = True
    except ValueError as error:
        return InputError(f"{where} is not JSON: {error}")
    if deep:
        return InputError(f"{where} is JSON of more than {_DEEPEST} levels")
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, dict):
        return InputError(f"{where} holds a {type(value).__name__}; give objects or texts")
    return value


def _depth(value: Any) -> int:
    """Levels of lists and dicts."""
    depth, level = 0, [value]
    while level := [v for v in level if isinstance(v, dict | list)]:
        depth += 1
        level = [inner for v in level for inner in (v.values() if isinstance(v, dict) else v)]
    return depth


def _read_table(path: Path, blank: bool, header: Sequence[str] | None = None) -> Records:
    csv.field_size_limit(2**31 - 1)
    with path.open("rb") as stream:
        lines = (sure(_decoded(line, str(path), number)) for number, line in enumerate(stream, 1))
        tabs = path.suffix.lower() == ".tsv"
        # Tabs leave quotes alone in most files that have no header.
        quoting: Any = csv.QUOTE_NONE if tabs and header is not None else csv.QUOTE_MINIMAL
        rows = csv.reader(lines, delimiter="\t" if tabs else ",", strict=True, quoting=quoting)
        try:
            names = next(filter(None, rows), []) if header is None else list(header)
            other = next((mark for mark in _SEPARATORS[tabs] if len(names) == 1 and mark in names[0]), None)
            if header is None and other is not None:
                wanted = "tabs" if tabs else "commas"
                raise InputError(
                    f"{path} has a header of one column, {shown(names[0])}; is it separated by {shown(other)}? "
                    f"A {path.suffix.lower()} file is separated by {wanted}"
                )
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise InputError(f"{path} has more than one column called {', '.join(sorted(twice))}")
            passed: list[int] = []  # blank lines since the last row
            for row in rows:
                if not row:
                    passed += [rows.line_num] if blank else []
                    continue
                yield from (_blank(path, number) for number in passed)
                passed = []
                if len(row) != len(names):
                    more = "more" if len(row) > len(names) else "fewer"
                    yield InputError(f"{path}, line {rows.line_num}, has {more} cells than its header, {len(names)}")
                else:
                    yield dict(zip(names, row, strict=True))
        except csv.Error as error:
            raise InputError(f"{path}, line {rows.line_num}, is no table: {printable(str(error))}") from error


def sure(value: T | InputError) -> T:
    """A value that is there; raises the error that stands in its place."""
    if isinstance(value, InputError):
        raise value
    return value


def _read_parquet(path: Path, blank: bool) -> Records:
    with _opened_parquet(path) as file:
        batches = file.iter_batches(_ROWS_TOGETHER)
        total, done = int(file.metadata.num_rows), 0
        while True:
            try:
                batch = next(batches, None)
                rows = [] if batch is None else batch.to_pylist()
            except (ValueError, OSError, NotImplementedError) as error:  # what the library raises in the middle of one
                raise InputError(
                    f"{path} cannot be read as parquet: {printable(' '.join(str(error).split()))}"
                ) from error
            if batch is None:
                break
            done += len(rows)
            yield from rows
        if done != total:
            raise InputError(f"{path} says that it has {total} rows and holds {done}; it is damaged")


def _opened_parquet(path: Path) -> Any:
    library = parquet()
    path.open("rb").close()  # what the system refuses is said in its own words
    try:
        return library.ParquetFile(path)
    except (ValueError, OSError) as error:  # what the library raises for files of another kind, and for torn ones
        raise InputError(f"{path} is no parquet file: {printable(' '.join(str(error).split()))}") from error


def parquet() -> Any:
    """The module `pyarrow.parquet`; raises `InputError` where it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("parquet files need pyarrow: pip install 'modernbert[parquet]'") from error
    return pyarrow.parquet


_READERS: dict[str, Callable[[Path, bool], Records]] = {
    "": _read_text,
    **dict.fromkeys((".txt", ".text", ".md"), _read_text),
    ".csv": _read_table,
    ".tsv": _read_table,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
_PARTED: dict[str, Callable[[Path, str | None], Iterator[Record]]] = {
    ".json": read_json,
    **dict.fromkeys((".conll", ".bio", ".iob2"), read_conll),
}
SUFFIXES = (*filter(None, _READERS), *_PARTED)  # of files that are read
