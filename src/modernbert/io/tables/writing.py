"""Writing rows: they are gathered in a partial file beside the output, from which an interrupted job continues; the
output appears once it is whole.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import csv
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np

from modernbert.errors import InputError, shown
from modernbert.io.files import locked, naming, replacing
from modernbert.io.tables.reading import Record, library

_LISTED = 10  # errors that are kept for a summary
# What JSON lets stand in a string, but a file of UTF-8 cannot hold or a terminal acts on.
_UNSAFE = re.compile("[\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class ResumableOutput:
    """A file that is gathered record by record and appears when it is whole.

    Until then the records are in `<name>.partial`, a JSON object a line after a line that describes their job. A job
    that finds its own partial file continues after the last whole line of it.

    A record is {"input", "output"} or {"input", "error"}, and {"row"} with the columns of the file it came from.

    Args:
        path: the file; its suffix is its form. .jsonl keeps records as they are; .csv, .tsv and .parquet have a row a
            record; .npy has the record's "output", a vector, alone.
        job: what makes this job this one: task, model, options, input. Another job's partial file is refused.
        overwrite: whether a file of this name may be replaced, once the new one is whole.
        flat: whether .jsonl has rows as tables have them, instead of records.

    Attributes:
        done: number of records in the file so far.
        failed: number of those that are errors.
        errors: the first ten of these, by the number of the record, from 1.

    Raises:
        InputError: the suffix is unknown, the file exists, the partial file is another job's, or is being written.
    """

    def __init__(self, path: Path, job: Record, *, overwrite: bool = False, flat: bool = False) -> None:
        check_output(path, overwrite)
        self.path, self.flat = path, flat and path.suffix.lower() == ".jsonl"
        self.partial = path.with_name(path.name + ".partial")
        self.head = to_json({"job": job}, str)
        self.done = self.failed = 0
        self.errors: dict[int, str] = {}

    def __enter__(self) -> Self:
        refusal = f"{self.partial} is being written by another process; name another output"
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(self.partial, refusal))
            self.file = self.partial.open("ab+")
            stack.callback(self._close)
            self.file.seek(0)
            whole = 0
            for number, line in enumerate(self.file):
                if not line.endswith(b"\n"):
                    break  # cut off in the middle
                self._take(number, line)
                whole += len(line)
            self.file.truncate(whole)
            if not whole:
                self._line(self.head)
            self._held = stack.pop_all()
        return self

    def _take(self, number: int, line: bytes) -> None:
        """Count a line of an earlier run, if it is of this job."""
        try:
            record = json.loads(line.decode("utf-8", "surrogatepass"))
            if not isinstance(record, dict) or ("input" if number else "job") not in record:
                raise ValueError
        except (ValueError, RecursionError):
            raise InputError(
                f"{self.partial}, line {number + 1}, was not written by a job like this one; remove the file, or name "
                "another output"
            ) from None
        if number:
            self._count(number, record)
        elif record["job"] != (job := json.loads(self.head)["job"]):
            raise InputError(
                f"{self.partial} is of another job: {differences(record['job'], job)}; finish that one, remove the "
                "file, or name another output"
            )

    def _count(self, number: int, record: Record) -> None:
        self.done = number
        if "error" in record:
            self.failed += 1
            if len(self.errors) < _LISTED:
                self.errors[number] = str(record["error"])

    def rest(self, inputs: Iterable[Any], input_of: Callable[[Any], Any]) -> Iterator[Any]:
        """Those of all inputs that have no answer yet; `input_of` gives what a record of one has under "input".

        Raises:
            InputError: the inputs are others than those that were answered before.
        """
        iterator = iter(inputs)
        for number, record in enumerate(itertools.islice(self.records(), self.done), 1):
            item = next(iterator, iterator)
            if item is iterator or to_json(record["input"], _plain) != to_json(input_of(item), _plain):
                raise InputError(
                    f"input {number} is not the one that {self.partial} has an answer for; remove that file, or name "
                    "another output"
                )
        yield from iterator

    def write(self, record: Record) -> None:
        output = record.get("output")
        if self.path.suffix.lower() == ".npy" and output is not None and np.ndim(output) != 1:
            raise InputError("a .npy file holds one vector a text; give texts, and neither spans nor vectors of tokens")
        self._line(to_json(record, _plain))
        self._count(self.done + 1, record)

    def held(self) -> int:
        """Answers that the partial file holds, also where an interruption came before the last one was counted."""
        self.file.flush()
        with self.partial.open("rb") as lines:
            return sum(line.endswith(b"\n") for line in lines) - 1

    def _line(self, text: str) -> None:
        with naming(self.partial):
            self.file.write(text.encode() + b"\n")
            self.file.flush()

    def _close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk was reported when the line was written
            self.file.close()

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        with self._held:
            if error is None:
                with replacing(self.path) as temporary:
                    _WRITERS[self.path.suffix.lower()](temporary, self._rows if self.flat else self.records)
            self._close()
            if error is None or not self.done:  # nothing in it to go on with
                self.partial.unlink()

    def records(self) -> Iterator[Record]:
        """What was written so far, from the first."""
        self.file.flush()
        with self.partial.open("rb") as lines:
            next(lines)
            for line in lines:
                yield json.loads(line.decode("utf-8", "surrogatepass"), object_hook=_unplain)

    def _rows(self) -> Iterator[Record]:
        return map(flattened, self.records())


def check_output(path: Path, overwrite: bool = False) -> None:
    """Raise `InputError` if an output cannot be written, before the work and not after."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file to write")
    if path.suffix.lower() not in _WRITERS:
        raise InputError(f"{path} ends with {path.suffix or 'nothing'}; written are {', '.join(_WRITERS)}")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already; name another output, or replace it with overwrite=True")
    if path.suffix.lower() == ".parquet":
        library("pyarrow.parquet", path, "parquet")


def differences(before: Any, now: Any) -> str:
    """How one job differs from another, in words: "top_k was 3 and is 5"."""
    changed = list(_changed("the job", before, now))
    return ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")


def _changed(name: str, before: Any, now: Any) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            yield from _changed(key, before.get(key), now.get(key))
    elif before != now:
        plain = all(_is_scalar(value) for value in (before, now))
        was, now = ("not given" if value is None else shown(value) for value in (before, now))
        yield f"{name} was {was} and is {now}" if plain else f"{name} has changed"


def to_json(value: Any, plain: Callable[[Any], Any]) -> str:
    """A value as one line of JSON that every file holds and no terminal acts on.

    `plain` gives what stands for a value that JSON has no form for. `InputError` is raised for one nested too deeply.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, default=plain)
    except RecursionError as error:
        raise InputError("a record is nested too deeply to be written as JSON") from error
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def as_lists(value: Any) -> Any:
    """What stands in JSON for an array, or for a value that has no form there."""
    return value.tolist() if isinstance(value, np.ndarray) else str(value)


def _plain(value: Any) -> Any:
    """What stands in a partial file for an array, the text of its bytes, or for a value that has no form in JSON."""
    if not isinstance(value, np.ndarray):
        return str(value)
    name = "int32" if np.issubdtype(value.dtype, np.integer) else "float32"
    array = np.ascontiguousarray(value, dtype=np.dtype(name).newbyteorder("<"))
    return {name: base64.b64encode(array.tobytes()).decode(), "shape": array.shape}


def _unplain(value: Record) -> Any:
    name = next((name for name in ("float32", "int32") if set(value) == {name, "shape"}), None)
    if name is None:
        return value
    dtype = np.dtype(name).newbyteorder("<")
    return np.frombuffer(base64.b64decode(value[name]), dtype=dtype).reshape(value["shape"])


Again = Callable[[], Iterator[Record]]  # gives the records from the first, as writers go over them twice


def _write_jsonl(path: Path, records: Again) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(to_json(record, as_lists) + "\n" for record in records())


def _write_table(path: Path, records: Again, delimiter: str = ",") -> None:
    names = list(dict.fromkeys(name for record in records() for name in flattened(record)))
    with path.open("w", encoding="utf-8", newline="", errors="backslashreplace") as file:
        table = csv.DictWriter(file, names, delimiter=delimiter)
        table.writeheader()
        table.writerows({name: _cell(value) for name, value in flattened(record).items()} for record in records())


def _write_parquet(path: Path, records: Again) -> None:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    possible: dict[str, set[Any]] = {}  # types that hold all values of a column
    filled: collections.Counter[str] = collections.Counter()
    rows = 0
    for row in map(flattened, records()):
        rows += 1
        for name, value in row.items():
            filled[name] += value is not None
            if value is not None:
                found = _types_of(value)
                possible[name] = possible.get(name, found) & found
    types = {name: _arrow_type(pa, possible.get(name, set()), filled[name] == rows) for name in filled}
    schema = pa.schema(list(types.items()))
    with ParquetWriter(path, schema) as writer:
        flat = map(flattened, records())
        while some := list(itertools.islice(flat, 1024)):
            columns = [[_arrow_value(row.get(name), kind) for row in some] for name, kind in types.items()]
            writer.write_table(pa.table(list(map(pa.array, columns, types.values())), schema=schema))


def _types_of(value: Any) -> set[Any]:
    """Types of columns that hold a value exactly, but for text in JSON, which holds all; a vector's is its length."""
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return {len(value)}
    if type(value) is int:
        fits = {"int64": -(2**63) <= value < 2**63, "double": abs(value) <= 2**53}
        return {name for name, is_exact in fits.items() if is_exact}
    return {bool: {"bool"}, float: {"double"}}.get(type(value), set())


def _arrow_type(pa: Any, possible: set[Any], is_full: bool) -> Any:
    if "int64" in possible:
        return pa.int64()
    kind = next(iter(possible), "string")
    if isinstance(kind, int):
        # Before 26, pyarrow writes no row without a vector among vectors of a fixed length.
        is_fixed = is_full or int(pa.__version__.split(".")[0]) >= 26
        return pa.list_(pa.float32(), kind if is_fixed else -1)
    return pa.type_for_alias(kind)


def _arrow_value(value: Any, kind: Any) -> Any:
    if value is None or str(kind) != "string":
        return value
    return str(_cell(value)).encode("utf-8", "backslashreplace").decode()


def _write_npy(path: Path, records: Again) -> None:
    shapes = [np.shape(record["output"]) if "output" in record else None for record in records()]
    width = next((shape[0] for shape in shapes if shape is not None), 0)
    with path.open("wb") as file:
        head = {"descr": "<f4", "fortran_order": False, "shape": (len(shapes), width)}
        np.lib.format.write_array_header_1_0(file, head)
        for record in records():  # a text that could not be answered has NaN
            file.write(np.asarray(record.get("output", np.full(width, np.nan)), "<f4").tobytes())


WRITTEN = (".jsonl", ".csv", ".tsv", ".parquet", ".npy")  # suffixes of files that are written
_WRITERS: dict[str, Callable[[Path, Again], None]] = {
    ".jsonl": _write_jsonl,
    ".csv": _write_table,
    ".tsv": lambda path, records: _write_table(path, records, "\t"),
    ".parquet": _write_parquet,
    ".npy": _write_npy,
}


def flattened(record: Record) -> Record:
    """A record as one row: the columns of its file or its input, then the output's where it has names for its parts.

    A column of the file keeps its name; the output's of the same name gets "output_" before it.
    """
    given = record.get("row", record["input"])
    row: Record = dict(given) if isinstance(given, dict) else {"text": given}
    if "error" in record:
        answer = {"error": record["error"]}
    else:
        output = record["output"]
        named = isinstance(output, dict) and all(_is_scalar(value) for value in output.values())
        answer = output if named else {"output": output}
    for name, value in answer.items():
        while name in row:
            name = f"output_{name}"
        row[name] = value
    return row


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)


def _cell(value: Any) -> Any:
    """A value as one cell: itself, or JSON."""
    return value if _is_scalar(value) else to_json(value, as_lists)
