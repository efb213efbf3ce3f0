"""Writing records: gathered in a file beside the wanted one, a JSON object a line, which an interrupted job goes on
with; the wanted file appears when it is whole.
"""

from __future__ import annotations

import base64
import collections
import csv
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np

from modernbert.errors import InputError
from modernbert.files import replacing
from modernbert.records.reading import Record, parquet

_ROWS_TOGETHER = 1024


class ResumableOutput:
    """A file that is gathered record by record and appears when it is whole.

    Until then the records are in `<name>.partial`, one JSON object a line after a line that says what job they are of.
    A job that finds its own partial file goes on after the last whole line of it.

    A record is {"input", "output"} or {"input", "error"}, and {"row"} with the columns of the file it came from.

    Args:
        path: where the file goes; its suffix says its form. .jsonl keeps records as they are; .csv, .tsv and .parquet
            have a row a record; .npy has the record's "output", a vector, alone.
        job: what makes this job this one: task, model, options, input. Another job's partial file is refused.

    Attributes:
        done: records in the file so far.
        failed: those of them that are errors.

    Raises:
        InputError: the suffix is unknown, a partial file belongs to another job, or another process is at it.
    """

    def __init__(self, path: Path, job: Record) -> None:
        if path.is_dir():
            raise InputError(f"{path} is a folder; name a file to write")
        if path.suffix.lower() not in _WRITERS:
            raise InputError(f"{path} ends with {path.suffix or 'nothing'}; written are {', '.join(_WRITERS)}")
        if path.suffix.lower() == ".parquet":
            parquet()  # a missing library is said before the work, not after
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.head = json.dumps({"job": job}, sort_keys=True, ensure_ascii=False, default=str)
        self.done = self.failed = 0

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.partial.open("ab+")
        self._lock()
        self.file.seek(0)
        whole = 0
        for number, line in enumerate(self.file):
            if not line.endswith(b"\n"):
                break  # cut off in the middle
            if number == 0 and line.decode("utf-8").rstrip("\n") != self.head:
                self.file.close()
                raise InputError(
                    f"{self.partial} is of another job: {line.decode('utf-8').strip()[:200]}; finish that one, "
                    "remove the file, or name another output"
                )
            whole += len(line)
            self.done = number
            self.failed += number > 0 and "error" in json.loads(line)
        self.file.truncate(whole)
        if not whole:
            self._line(self.head)
        return self

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
        records = self._records() if self.done else iter(())
        for number, (record, item) in enumerate(zip(itertools.islice(records, self.done), iterator, strict=False), 1):
            if record["input"] != json.loads(json.dumps(input_of(item), default=_plain)):
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
        self._line(json.dumps(record, ensure_ascii=False, default=_plain))
        self.done += 1
        self.failed += "error" in record

    def _line(self, text: str) -> None:
        self.file.write(text.encode("utf-8", "surrogatepass") + b"\n")
        self.file.flush()

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
            self.file.close()

    def _records(self) -> Iterator[Record]:
        with self.partial.open("rb") as lines:
            next(lines)
            for line in lines:
                yield json.loads(line.decode("utf-8", "surrogatepass"), object_hook=_unplain)


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
    with path.open("w", encoding="utf-8", errors="surrogatepass") as file:
        for record in records():
            file.write(json.dumps(record, ensure_ascii=False, default=_listed) + "\n")


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
    for rows, record in enumerate(records(), start=1):  # noqa: B007 (their number is read below)
        for name, value in flattened(record).items():
            vector = isinstance(value, np.ndarray) and value.ndim == 1
            kinds.setdefault(name, set()).add(("vector", len(value)) if vector else type(value))
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


def _arrow_type(pa: Any, found: set[Any], is_full: bool) -> Any:
    """The narrowest type that holds all values; text in JSON where nothing else does."""
    if len(found) == 1 and isinstance(one := next(iter(found)), tuple):
        # Before 26, pyarrow writes no row without a vector among vectors of a fixed length.
        is_fixed = is_full or int(pa.__version__.split(".")[0]) >= 26
        return pa.list_(pa.float32(), one[1] if is_fixed else -1)
    if found == {bool}:
        return pa.bool_()
    if found == {int}:
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
    """A record as one row: the columns of its file or its input, then the output's where it has names for its parts."""
    given = record["input"]
    row: Record = dict(given) if isinstance(given, dict) else {"text": given}
    row = dict(record["row"]) if "row" in record else row
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
    return value.tolist() if isinstance(value, np.ndarray) else str(value)
