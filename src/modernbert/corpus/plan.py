"""The corpus read once: rows get keys, texts that are new become units, and rows are noted with their keys."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from modernbert.corpus.contract import Unit
from modernbert.corpus.inputs import Batch, File, read_batches
from modernbert.corpus.keys import AGAIN, NEW, KeySet
from modernbert.corpus.output import CorpusError, Output
from modernbert.corpus.settings import Key, Settings
from modernbert.corpus.work import unit_of
from modernbert.errors import InputError
from modernbert.io.tables.columns import Field, parse_columns

_SHARD_BYTES, _TEXT_BYTES = 4 * 2**20, 1024  # of texts in a shard at the most; more where it is to have more texts
_LISTED = 5  # reasons
_GROUP, _GROUP_BYTES = 65_536, 32 * 2**20  # rows that are noted together, and their bytes
_LONG, _SHORT = 4096, 256  # texts of a shard by default; the second where each token has a vector


@dataclasses.dataclass
class Met:
    """What was read so far.

    Attributes:
        rows: of all files.
        unreadable: those that have no text, with those of files that could not be read.
        duplicates: rows whose text an earlier row of this run had.
        new: distinct texts that were not computed before.
        size, total: bytes of the files read so far, and of all.
        reasons: why rows could not be read, the first of them.
        files: that could not be read, or not to their end, with the reason.
    """

    rows: int = 0
    unreadable: int = 0
    duplicates: int = 0
    new: int = 0
    size: int = 0
    total: int = 0
    reasons: list[str] = dataclasses.field(default_factory=list)
    files: dict[str, str] = dataclasses.field(default_factory=dict)


class Plan:
    """Units of the texts of files that are not known yet.

    Args:
        files: in the order in which they are read.
        settings: of the task.
        column, keep: as in `CorpusOptions`.
        shard_size: texts of a unit, at the most.
        known: keys of the texts that are computed already.
        output: where rows are noted.
    """

    def __init__(
        self,
        files: Sequence[File],
        settings: Settings,
        column: Sequence[str],
        keep: Sequence[str],
        shard_size: int,
        known: KeySet,
        output: Output,
    ) -> None:
        form = settings.form
        self.named = columns_of(column, form)
        self.files, self.settings, self.keep, self.known = files, settings, list(keep), known
        self.output, self.form, self.shard_size = output, form, shard_size
        self.met = Met(total=sum(file.size for file in files))
        self._is_stopped = False
        self._schema = pa.schema([("key", pa.binary(32)), *((f.name, _arrow(f)) for f in form)])

    def stop(self) -> None:
        """Have `units` give up, after the batch of rows that it reads; from any thread."""
        self._is_stopped = True

    def units(self) -> Generator[Unit, None, None]:
        """The units, made as the files are read."""
        keys: list[Key] = []
        rows: list[tuple[Any, ...]] = []
        held, most = 0, max(_SHARD_BYTES, self.shard_size * _TEXT_BYTES)
        for file in self.files:
            for key, row in self._new_texts(file):
                size = _size(row)
                if keys and (len(keys) == self.shard_size or held + size > most):
                    yield self._unit(keys, rows)
                    keys, rows, held = [], [], 0
                keys.append(key)
                rows.append(row)
                held += size
        if keys:
            yield self._unit(keys, rows)

    def _unit(self, keys: list[Key], rows: list[tuple[Any, ...]]) -> Unit:
        columns = [keys, *map(list, zip(*rows, strict=True))]
        arrays = [pa.array(values, field.type) for values, field in zip(columns, self._schema, strict=True)]
        return unit_of(pa.table(arrays, schema=self._schema))

    def _new_texts(self, file: File) -> Iterator[tuple[Key, tuple[Any, ...]]]:
        """The texts of a file that are new; its rows are noted once it is read."""
        read = self.met.size
        name = hashlib.sha256(file.name.encode()).hexdigest()[:24]
        about: dict[str, Any] = {"name": file.name, "rows": 0, "unreadable": 0, "error": None}
        with contextlib.ExitStack() as stack:
            rows = Rows(stack.enter_context(self.output.writing(f"rows/{name}.parquet")), file.name)
            stack.callback(rows.abandon)
            errors = stack.enter_context(self.output.writing(f"unreadable/{name}.jsonl"))
            try:
                for batch in read_batches(file, self.form, self.named, self.keep):
                    if self._is_stopped:
                        raise CorpusError("the job was ended while it read the corpus; the same call continues")
                    readable = [row for row in batch.rows if isinstance(row, tuple)]
                    keys = self.settings.keys(readable)
                    rows.write(batch, keys)
                    for i, row in enumerate(batch.rows):
                        if isinstance(row, InputError):
                            errors.write(_error_line(file.name, batch.first + i, str(row)))
                            about["unreadable"] += 1
                            self.met.reasons += [str(row)] * (len(self.met.reasons) < _LISTED)
                    about["rows"] += len(batch.rows)
                    self.met.rows += len(batch.rows)
                    self.met.unreadable += len(batch.rows) - len(readable)
                    for key, row, how in zip(keys, readable, self.known.meet(keys), strict=True):
                        self.met.duplicates += how == AGAIN
                        self.met.new += how == NEW
                        if how == NEW:
                            yield key, row
                    self.met.size = read + batch.size
            except InputError as error:
                about["error"] = self.met.files[file.name] = str(error)
                errors.write(_error_line(file.name, None, str(error)))
            self.met.size = read + file.size
            rows.close()
        if not about["unreadable"] and about["error"] is None:
            self.output.remove(f"unreadable/{name}.jsonl")
        self.output.write_json(f"files/{name}.json", about)


class Rows:
    """The file that says which row has which key, and holds the columns that are kept.

    Kept columns of .parquet keep their types; those of lines of text are strings, as any row may have another type.
    """

    def __init__(self, stream: Any, name: str) -> None:
        self.stream, self.name = stream, name
        self.writer: Any = None
        self._waiting: list[Any] = []
        self._rows = self._bytes = 0  # of these

    def write(self, batch: Batch, keys: Sequence[Key]) -> None:
        """Add the rows of a batch that can be read."""
        there = [i for i, row in enumerate(batch.rows) if isinstance(row, tuple)]
        columns: dict[str, Any] = {
            "file": pa.array([self.name] * len(there)),
            "row": pa.array([batch.first + i for i in there], pa.int64()),
            "key": pa.array(keys, pa.binary(32)),
        }
        for name, values in batch.kept.items():
            if isinstance(values, list):
                columns[name] = pa.array([None if values[i] is None else _text(values[i]) for i in there], pa.string())
            else:
                columns[name] = values.take(pa.array(there, pa.int64()))
        table = pa.table(columns)
        self._waiting.append(table)
        self._rows += table.num_rows
        self._bytes += table.nbytes
        if self._rows >= _GROUP or self._bytes >= _GROUP_BYTES:
            self._write()

    def _write(self) -> None:
        table = pa.concat_tables(self._waiting).unify_dictionaries()
        self._waiting, self._rows, self._bytes = [], 0, 0
        if self.writer is None:
            self.writer = pq.ParquetWriter(self.stream, table.schema, compression="zstd")
        self.writer.write_table(table)

    def close(self) -> None:
        if self._waiting:
            self._write()
        if self.writer is None:
            columns = {"file": pa.string(), "row": pa.int64(), "key": pa.binary(32)}
            self.writer = pq.ParquetWriter(self.stream, pa.schema(list(columns.items())))
        self.writer.close()

    def abandon(self) -> None:
        """Write nothing more, where it was not closed; pyarrow would, when it lets go of the writer."""
        if self.writer is not None:
            self.writer.is_open = False


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if text.isascii() else text.encode(errors="replace").decode()  # lone surrogates are no Unicode


def _error_line(file: str, row: int | None, reason: str) -> bytes:
    return (json.dumps({"file": file, "row": row, "error": reason}) + "\n").encode()


def _arrow(field: Field) -> Any:
    return pa.list_(pa.string()) if field.many else pa.string()


def _size(row: tuple[Any, ...]) -> int:
    return sum(sum(map(len, v)) if isinstance(v, list) else len(v or "") for v in row)


def columns_of(column: Sequence[str], form: Sequence[Field]) -> dict[str, list[str]]:
    """The columns that a user named for the fields of a task; raises `InputError` for a field that there is not."""
    main = next((field.name for field in form if "text" in (field.name, *field.others)), None)
    return parse_columns(column, form, main)


def shard_size_of(given: int | None, settings: Settings) -> int:
    """Texts of a shard."""
    of_tokens = settings.task in ("late-interaction", "feature-extraction") or settings.options.get("multi_vector")
    return given or (_SHORT if of_tokens else _LONG)
