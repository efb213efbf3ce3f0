"""Writing records: gathered in a file beside the wanted one, a JSON object a line, which an interrupted job goes on
with; the wanted file appears when it is whole.
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
from modernbert.io.files import naming, replacing
from modernbert.io.tables.reading import Record, parquet

_ROWS_TOGETHER = 1024
_EXACT, _LARGE = 2**53, "large"  # integers that a float holds exactly, and those that 64 bits hold beyond them
_LISTED = 10  # errors that are kept for a summary
# What JSON lets stand in a string, but a file of UTF-8 cannot hold or a terminal acts on.
_UNSAFE = re.compile("[\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class ResumableOutput:
    """A file that is gathered record by record and appears when it is whole.

    Until then the records are in `<name>.partial`, one JSON object a line after a line that says what job they are of.
    A job that finds its own partial file goes on after the last whole line of it.

    A record is {"input", "output"} or {"input", "error"}, and {"row"} with the columns of the file it came from.

    Args:
        path: where the file goes; its suffix says its form. .jsonl keeps records as they are; .csv, .tsv and .parquet
            have a row a record; .npy has the record's "output", a vector, alone.
        job: what makes this job this one: task, model, options, input. Another job's partial file is refused.
        overwrite: whether a file of this name may be replaced, once the new one is whole.

    Attributes:
        done: records in the file so far.
        failed: those of them that are errors.
        errors: number of the record, from 1, and error of the first ten of those.

    Raises:
        InputError: the suffix is unknown, the file is there already, a partial file belongs to another job, or another
            process is writing it.
    """

    def __init__(self, path: Path, job: Record, *, overwrite: bool = False) -> None:
        check_output(path, overwrite)
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.head = to_json({"job": job}, str)
        self.done = self.failed = 0
        self.errors: dict[int, str] = {}

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.partial.open("ab+")
        self._lock()
        try:
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
        except BaseException:
            self._close()
            raise
        return self

    def _take(self, number: int, line: bytes) -> None:
        """Go on after one line of an earlier run."""
        try:
            record = json.loads(line.decode("utf-8", "surrogatepass"))
            wanted = {"job"} if number == 0 else {"input"}
            if not isinstance(record, dict) or not wanted <= set(record):
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

    def _lock(self) -> None:
        """Let no other process write the same file; systems without such locks go without."""
        try:
            import fcntl
        except ImportError:
            return
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.close()
            raise InputError(f"{self.partial} is being written by another process; name another output") from None

    def rest(self, inputs: Iterable[Any], input_of: Callable[[Any], Any]) -> Iterator[Any]:
        """The inputs that have no answer yet.

        Args:
            inputs: all of them, from the beginning.
            input_of: what a record of one has under "input".

        Raises:
            InputError: the inputs are others than those that were answered before.
        """
        iterator = iter(inputs)
        records = itertools.islice(self._records(), self.done) if self.done else iter(())
        for number, record in enumerate(records, 1):
            item = next(iterator, iterator)
            if item is iterator or to_json(record["input"], _plain) != to_json(input_of(item), _plain):
                raise InputError(
                    f"input {number} is not the one that {self.partial} has an answer for; remove that file, or name "
                    "another output"
                )
        yield from iterator

    def write(self, record: Record) -> None:
        """Add a record."""
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
        with contextlib.suppress(OSError):  # what a full disk did not take was said before
            self.file.close()

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        try:
            if error is not None:
                if not self.done:
                    self.partial.unlink()  # nothing in it to go on with
                return
            with replacing(self.path) as temporary:
                _WRITERS[self.path.suffix.lower()](temporary, self._records)
            self.partial.unlink()
        finally:
            self._close()

    def _records(self) -> Iterator[Record]:
        with self.partial.open("rb") as lines:
            next(lines)
            for line in lines:
                yield json.loads(line.decode("utf-8", "surrogatepass"), object_hook=_unplain)


def check_output(path: Path, overwrite: bool = False) -> None:
    """Refuse an output that cannot be written, before the work and not after.

    Raises:
        InputError: its suffix is unknown, it is there already, or a library for it is missing.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file to write")
    if path.suffix.lower() not in _WRITERS:
        raise InputError(f"{path} ends with {path.suffix or 'nothing'}; written are {', '.join(_WRITERS)}")
    if path.exists() and not overwrite:
        raise InputError(f"{path} is there already; name another output, or replace it with overwrite=True")
    if path.suffix.lower() == ".parquet":
        parquet()


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

    Args:
        value: what is written.
        plain: what stands for a value that JSON has no form for.

    Raises:
        InputError: it is nested too deeply.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, default=plain)
    except RecursionError as error:
        raise InputError("a record is nested too deeply to be written as JSON") from error
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _plain(value: Any) -> Any:
    """What JSON has no form for: arrays as the text of their bytes, dates and the like as people read them."""
    if not isinstance(value, np.ndarray):
        return str(value)
    array = np.ascontiguousarray(value, dtype="<f4")
    return {"float32": base64.b64encode(array.tobytes()).decode(), "shape": array.shape}


def _unplain(value: Record) -> Any:
    if set(value) != {"float32", "shape"}:
        return value
    return np.frombuffer(base64.b64decode(value["float32"]), dtype="<f4").reshape(value["shape"])


# Each takes the records as a function, so that it can go over them twice.
Again = Callable[[], Iterator[Record]]


def _write_jsonl(path: Path, records: Again) -> None:
    with path.open("w", encoding="utf-8") as file:
        for record in records():
            file.write(to_json(record, as_lists) + "\n")


def _write_table(delimiter: str) -> Callable[[Path, Again], None]:
    def write(path: Path, records: Again) -> None:
        names = list(dict.fromkeys(name for record in records() for name in flattened(record)))
        with path.open("w", encoding="utf-8", newline="", errors="backslashreplace") as file:
            table = csv.DictWriter(file, names, delimiter=delimiter)
            table.writeheader()
            for record in records():
                table.writerow({name: _cell(value) for name, value in flattened(record).items()})

    return write


def _write_parquet(path: Path, records: Again) -> None:
    import pyarrow as pa

    kinds: dict[str, set[Any]] = {}
    filled: collections.Counter[str] = collections.Counter()
    rows = 0
    for record in records():
        rows += 1
        for name, value in flattened(record).items():
            kinds.setdefault(name, set()).add(_kind(value))
            filled[name] += value is not None
    types = {name: _arrow_type(pa, found - {type(None)}, filled[name] == rows) for name, found in kinds.items()}
    schema = pa.schema(list(types.items()))
    with parquet().ParquetWriter(path, schema) as writer:
        flat = (flattened(record) for record in records())
        while some := list(itertools.islice(flat, _ROWS_TOGETHER)):
            columns = [
                pa.array([_arrow_value(row.get(name), kind == pa.string()) for row in some], kind)
                for name, kind in types.items()
            ]
            writer.write_table(pa.table(columns, schema=schema))


def _kind(value: Any) -> Any:
    """What a value is for a column: its type, or the length of a vector; large integers do not fit every column."""
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return "vector", len(value)
    if type(value) is int and abs(value) > _EXACT:
        return _LARGE if -(2**63) <= value < 2**63 else str
    return type(value)


def _arrow_type(pa: Any, found: set[Any], is_full: bool) -> Any:
    """The narrowest type that holds all values; text in JSON where nothing else does."""
    if len(found) == 1 and isinstance(one := next(iter(found)), tuple):
        # Before 26, pyarrow writes no row without a vector among vectors of a fixed length.
        is_fixed = is_full or int(pa.__version__.split(".")[0]) >= 26
        return pa.list_(pa.float32(), one[1] if is_fixed else -1)
    if found == {bool}:
        return pa.bool_()
    if found and found <= {int, _LARGE}:
        return pa.int64()
    return pa.float64() if found and found <= {int, float} else pa.string()


def _arrow_value(value: Any, as_text: bool) -> Any:
    if as_text and value is not None:
        return str(_cell(value)).encode("utf-8", "backslashreplace").decode()
    return value


def _write_npy(path: Path, records: Again) -> None:
    shapes = [np.shape(record["output"]) if "output" in record else None for record in records()]
    width = next((shape[0] for shape in shapes if shape is not None), 0)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f4", "fortran_order": False, "shape": (len(shapes), width)}
        )
        for record in records():  # what could not be answered has no numbers
            file.write(np.asarray(record.get("output", np.full(width, np.nan)), "<f4").tobytes())


_WRITERS: dict[str, Callable[[Path, Again], None]] = {
    ".jsonl": _write_jsonl,
    ".csv": _write_table(","),
    ".tsv": _write_table("\t"),
    ".parquet": _write_parquet,
    ".npy": _write_npy,
}


def flattened(record: Record) -> Record:
    """A record as one row: the columns of its file or its input, then the output's where it has names for its parts.

    A column of the file keeps its name; the output's of the same name gets "output_" before it.
    """
    given = record["input"]
    row: Record = dict(given) if isinstance(given, dict) else {"text": given}
    row = dict(record["row"]) if "row" in record else row
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


def as_lists(value: Any) -> Any:
    """What stands in JSON for an array, or for a value that has no form there."""
    return value.tolist() if isinstance(value, np.ndarray) else str(value)
