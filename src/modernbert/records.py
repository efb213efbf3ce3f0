"""Records in files, one after another: .txt, .csv, .tsv, .jsonl and .parquet, read and written as they stream by.

A record is a dict of columns; a line of plain text is {"text": line}. Output is gathered in a file beside the wanted
one, a JSON object a line, which an interrupted job goes on with; the wanted file appears when it is whole.
"""

from __future__ import annotations

import base64
import csv
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from modernbert.errors import InputError
from modernbert.files import replacing

Record = dict[str, Any]
_ROWS_TOGETHER = 1024


# Reading


def read_records(path: Path | None) -> Iterator[Record]:
    """Records of a file by its suffix, plain text where that says nothing; standard input without a file.

    Raises:
        InputError: a line is not what the suffix promises.
        OSError: the file cannot be read.
    """
    if path is None:
        return _lines(sys.stdin.buffer, "standard input")
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a file: {', '.join(_READERS)}")
    return _READERS.get(path.suffix.lower(), _read_text)(path)


def count_records(path: Path | None) -> int | None:
    """How many records a file holds, where that is cheap to say."""
    if path is None or path.suffix.lower() in (".csv", ".tsv"):  # a cell may hold line ends
        return None
    if path.suffix.lower() == ".parquet":
        return int(_parquet().ParquetFile(path).metadata.num_rows)
    with path.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def _lines(stream: BinaryIO, name: str) -> Iterator[Record]:
    """Lines that are not blank; each must be UTF-8."""
    for number, line in enumerate(stream, 1):
        text = _decoded(line, name, number).rstrip("\r\n")
        if text.strip():
            yield {"text": text}


def _decoded(line: bytes, name: str, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}, line {number}, is not UTF-8: {error.reason}") from error


def _read_text(path: Path) -> Iterator[Record]:
    with path.open("rb") as stream:
        yield from _lines(stream, str(path))


def _read_jsonl(path: Path) -> Iterator[Record]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            text = _decoded(line, str(path), number).strip()
            if not text:
                continue
            try:
                value = json.loads(text)
            except ValueError as error:
                raise InputError(f"{path}, line {number}, is not JSON: {error}") from error
            if isinstance(value, str):
                value = {"text": value}
            if not isinstance(value, dict):
                raise InputError(f"{path}, line {number}, holds a {type(value).__name__}; give objects or texts")
            yield value


def _read_table(path: Path) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)
    with path.open("rb") as stream:
        lines = (_decoded(line, str(path), number) for number, line in enumerate(stream, 1))
        rows = csv.DictReader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            for row in rows:
                if None in row or None in row.values():
                    more = "more" if None in row else "fewer"
                    names = len(rows.fieldnames or ())
                    raise InputError(
                        f"{path}, line {rows.line_num}, has {more} cells than the {names} of its first line"
                    )
                yield dict(row)
        except csv.Error as error:
            raise InputError(f"{path}, line {rows.line_num}, is no table: {error}") from error


def _read_parquet(path: Path) -> Iterator[Record]:
    parquet = _parquet()
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS_TOGETHER):
                yield from batch.to_pylist()
    except ValueError as error:  # what the library raises for files of another kind
        raise InputError(f"{path} is no parquet file: {error}") from error


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("parquet files need pyarrow: pip install 'modernbert[parquet]'") from error
    return pyarrow.parquet


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".txt": _read_text,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


# Writing


class ResumableOutput:
    """A file that is gathered record by record and appears when it is whole.

    Until then the records are in `<name>.partial`, one JSON object a line after a line that says what job they are of.
    A job that finds its own partial file goes on after the last whole line of it.

    Args:
        path: where the file goes; its suffix says its form. .jsonl keeps records as they are; .csv, .tsv and .parquet
            have a row a record; .npy has the record's "output", a vector, alone.
        job: what makes this job this one: task, model, options, input. Another job's partial file is refused.

    Raises:
        InputError: the suffix is unknown, or a partial file belongs to another job.
    """

    def __init__(self, path: Path, job: Record) -> None:
        if path.suffix.lower() not in _WRITERS:
            raise InputError(f"{path} ends with {path.suffix or 'nothing'}; written are {', '.join(_WRITERS)}")
        if path.suffix.lower() == ".parquet":
            _parquet()  # a missing library is said before the work, not after
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.head = json.dumps({"job": job}, sort_keys=True, ensure_ascii=False)
        self.done = 0

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = 0
        if self.partial.exists():
            with self.partial.open("rb") as lines:
                for number, line in enumerate(lines):
                    if not line.endswith(b"\n"):
                        break  # cut off in the middle
                    if number == 0 and line.decode("utf-8").rstrip("\n") != self.head:
                        raise InputError(
                            f"{self.partial} is of another job: {line.decode('utf-8').strip()[:200]}; finish that one, "
                            "remove the file, or name another output"
                        )
                    whole += len(line)
                    self.done = number
            os.truncate(self.partial, whole)
        self.file = self.partial.open("ab")
        if not whole:
            self._line(self.head)
        return self

    def write(self, record: Record) -> None:
        """Add a record."""
        self._line(json.dumps(record, ensure_ascii=False, default=_plain))
        self.done += 1

    def _line(self, text: str) -> None:
        self.file.write(text.encode("utf-8", "surrogatepass") + b"\n")
        self.file.flush()

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        self.file.close()
        if error is not None:
            if not self.done:
                self.partial.unlink()  # nothing in it to go on with
        else:
            with replacing(self.path) as temporary:
                _WRITERS[self.path.suffix.lower()](temporary, self._records)
            self.partial.unlink()

    def _records(self) -> Iterator[Record]:
        with self.partial.open("rb") as lines:
            next(lines)
            for line in lines:
                yield json.loads(line, object_hook=_unplain)


def _plain(value: Any) -> Any:
    """Arrays, for JSON: their bytes as text."""
    array = np.ascontiguousarray(value, dtype="<f4")
    return {"float32": base64.b64encode(array.tobytes()).decode(), "shape": array.shape}


def _unplain(value: Record) -> Any:
    if set(value) != {"float32", "shape"}:
        return value
    return np.frombuffer(base64.b64decode(value["float32"]), dtype="<f4").reshape(value["shape"])


# Each takes the records as a function, so that it can go over them twice.
Records = Callable[[], Iterator[Record]]


def _write_jsonl(path: Path, records: Records) -> None:
    with path.open("w", encoding="utf-8", errors="surrogatepass") as file:
        for record in records():
            file.write(json.dumps(record, ensure_ascii=False, default=_listed) + "\n")


def _write_table(delimiter: str) -> Callable[[Path, Records], None]:
    def write(path: Path, records: Records) -> None:
        names = list(dict.fromkeys(name for record in records() for name in flattened(record)))
        with path.open("w", encoding="utf-8", newline="", errors="backslashreplace") as file:
            table = csv.DictWriter(file, names, delimiter=delimiter)
            table.writeheader()
            for record in records():
                table.writerow({name: _cell(value) for name, value in flattened(record).items()})

    return write


def _write_parquet(path: Path, records: Records) -> None:
    import pyarrow as pa

    kinds: dict[str, set[Any]] = {}
    for record in records():
        for name, value in flattened(record).items():
            vector = isinstance(value, np.ndarray) and value.ndim == 1
            kinds.setdefault(name, set()).add(("vector", len(value)) if vector else type(value))
    types = {name: _arrow_type(pa, found - {type(None)}) for name, found in kinds.items()}
    schema = pa.schema(list(types.items()))
    with _parquet().ParquetWriter(path, schema) as writer:
        rows = (flattened(record) for record in records())
        while some := list(itertools.islice(rows, _ROWS_TOGETHER)):
            columns = [
                pa.array([_arrow_value(row.get(name), kind == pa.string()) for row in some], kind)
                for name, kind in types.items()
            ]
            writer.write_table(pa.table(columns, schema=schema))


def _arrow_type(pa: Any, found: set[Any]) -> Any:
    """The narrowest type that holds all values; text in JSON where nothing else does."""
    if len(found) == 1 and isinstance(one := next(iter(found)), tuple):
        return pa.list_(pa.float32(), one[1])
    if found == {bool}:
        return pa.bool_()
    if found == {int}:
        return pa.int64()
    return pa.float64() if found and found <= {int, float} else pa.string()


def _arrow_value(value: Any, as_text: bool) -> Any:
    if as_text and value is not None:
        return str(_cell(value)).encode("utf-8", "backslashreplace").decode()
    return value


def _write_npy(path: Path, records: Records) -> None:
    shapes = [np.shape(record["output"]) if "output" in record else None for record in records()]
    known = {shape for shape in shapes if shape is not None}
    if len(known) > 1 or any(len(shape) != 1 for shape in known):
        raise InputError("a .npy file holds one vector a text; give texts, and neither spans nor vectors of tokens")
    width = next(iter(known), (0,))[0]
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f4", "fortran_order": False, "shape": (len(shapes), width)}
        )
        for record in records():  # what could not be answered has no numbers
            file.write(np.asarray(record.get("output", np.full(width, np.nan)), "<f4").tobytes())


_WRITERS: dict[str, Callable[[Path, Records], None]] = {
    ".jsonl": _write_jsonl,
    ".csv": _write_table(","),
    ".tsv": _write_table("\t"),
    ".parquet": _write_parquet,
    ".npy": _write_npy,
}


def flattened(record: Record) -> Record:
    """A record as one row: the input's columns, then the output's where it has names for its parts."""
    given = record["input"]
    row: Record = dict(given) if isinstance(given, dict) else {"text": given}
    if "error" in record:
        return {**row, "error": record["error"]}
    output = record["output"]
    named = isinstance(output, dict) and all(_is_scalar(value) for value in output.values())
    return {**row, **output} if named else {**row, "output": output}


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)


def _cell(value: Any) -> Any:
    """A value as one cell: itself, or JSON."""
    return value if _is_scalar(value) else json.dumps(value, ensure_ascii=False, default=_listed)


def _listed(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value
