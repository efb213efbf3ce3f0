"""Rows of training data: read from files or memory, their columns matched with a task's fields, some held out."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from modernbert.errors import InputError
from modernbert.io.tables import parts_of, read_records
from modernbert.io.tables.reading import sure
from modernbert.io.tables.structured import place_of, rows_of_dataset

_TRAINING, _VALIDATION = ("train",), ("validation", "val", "valid", "dev", "eval", "test")


class Row(NamedTuple):
    """One record under the names of a task's fields, and where it is, for messages."""

    values: dict[str, Any]
    where: str


@dataclasses.dataclass(frozen=True)
class Field:
    """Something that a task reads of every row.

    Attributes:
        name: what it is called.
        others: what columns that hold it are often called.
        required: whether every row must have it.
        many: whether it is a list; then several columns may make it, and a text alone is a list of one.
        words: whether a text stands for the list of its words.
    """

    name: str
    others: tuple[str, ...] = ()
    required: bool = True
    many: bool = False
    words: bool = False


class Table(NamedTuple):
    """Rows as they were read."""

    records: list[dict[str, Any]]
    name: str


def read_tables(sources: Any, header: Sequence[str] | None) -> list[Table]:
    """Files, datasets in memory or lists of dicts, read whole.

    Args:
        sources: a path, with "#PART" for a part; a list of rows; a dataset; or a list of paths.
        header: names of the columns of tables without a header line.

    Raises:
        InputError: a file is empty, is given twice, or is not what its suffix promises.
        OSError: a file cannot be read.
    """
    if isinstance(sources, str | Path):
        sources = [sources]
    if isinstance(sources, Sequence) and sources and all(isinstance(s, str | Path) for s in sources):
        _check_once([str(source) for source in sources])
        return [_read_file(str(source), header) for source in sources]
    if hasattr(sources, "features"):
        return [Table(_sure(list(rows_of_dataset(sources)), "the dataset"), "the dataset")]
    if hasattr(sources, "columns") and hasattr(sources, "to_dict"):  # a table of pandas
        sources = sources.to_dict("records")
    if not isinstance(sources, Iterable) or isinstance(sources, Mapping):
        raise InputError(f"data is a {type(sources).__name__}; give paths, rows or a dataset")
    rows = list(sources)
    wrong = next((row for row in rows if not isinstance(row, Mapping)), None)
    if wrong is not None:
        raise InputError(f"a row is a {type(wrong).__name__}; give dicts")
    return [Table(_sure([dict(row) for row in rows], "the list of rows"), "the list of rows")]


def _check_once(sources: Sequence[str]) -> None:
    """Raise `InputError` where rows would count twice: a file, or a part of one, that is given twice."""
    given: dict[Path, dict[str | None, str]] = {}
    for source in sources:
        path, part = place_of(source)
        parts = given.setdefault(path.resolve(), {})
        if parts and (part is None or None in parts or part in parts):
            before = parts.get(part) or next(iter(parts.values()))
            again = "" if source == before else f" (as {before} too)"
            raise InputError(f"{source} is given twice{again}; give each file once")
        parts[part] = source


def _read_file(source: str, header: Sequence[str] | None) -> Table:
    path, part = place_of(source)
    if not path.exists():
        raise InputError(f"there is no file or folder {path}")
    tabular = path.suffix.lower() in (".csv", ".tsv")
    records = read_records(path, part=part, header=header if tabular else None)
    return Table(_sure([sure(record) for record in records], source), source)


def _sure(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    if not rows:
        raise InputError(f"{name} holds no rows")
    return rows


def with_parts(train: Any, evaluation: Any) -> tuple[Any, Any, str]:
    """Sources where one file holds both parts; and what was chosen, in words."""
    alone = [train] if isinstance(train, str | Path) else train
    if evaluation or not (isinstance(alone, Sequence) and len(alone) == 1 and isinstance(alone[0], str | Path)):
        return train, evaluation, ""
    path, part = place_of(str(alone[0]))
    parts = parts_of(path) if path.exists() and part in (None, *_TRAINING) else []
    first = next((name for name in _TRAINING if name in parts), None)
    second = next((name for name in _VALIDATION if name in parts), None)
    if first is None:
        return train, evaluation, ""
    rest = f", evaluating on its part {second!r}" if second else ""
    said = f"training on the part {first!r} of {path}{rest}"
    return [f"{path}#{first}"], [f"{path}#{second}"] if second else [], said


def parse_columns(given: Sequence[str] | Mapping[str, Any], fields: Sequence[Field]) -> dict[str, list[str]]:
    """ "field=column" entries, or a mapping; several columns of a list are apart by commas."""
    known = {field.name: field for field in fields}
    pairs: list[tuple[str, Any]] = []
    if isinstance(given, Mapping):
        pairs = list(given.items())
    else:
        for entry in given:
            name, equals, column = entry.partition("=")
            if not equals or not column:
                raise InputError(f"column is {entry!r}; write FIELD=COLUMN, such as {fields[0].name}=NAME")
            pairs.append((name, column))
    out = {}
    for name, columns in pairs:
        if name not in known:
            raise InputError(f"column names the field {name!r}; this task has {', '.join(known)}")
        listed = list(columns) if isinstance(columns, list | tuple) else [columns]
        out[name] = listed[0].split(",") if known[name].many and len(listed) == 1 else listed
    return out


def choose_columns(
    columns: Sequence[str], fields: Sequence[Field], named: Mapping[str, list[str]], name: str
) -> dict[str, list[str]]:
    """The columns of each field: those that were named, else those that are called like it, else by habit.

    Raises:
        InputError: a required field has no column, or a named column does not exist.
    """
    lower = {column.lower(): column for column in columns}
    chosen: dict[str, list[str]] = {}
    for field in fields:
        if field.name in named:
            missing = [c for c in named[field.name] if c not in columns]
            if missing:
                raise InputError(f"{name} has the columns {', '.join(columns)} and no {missing[0]!r}")
            chosen[field.name] = named[field.name]
            continue
        found = next((lower[n] for n in (field.name, *field.others) if n in lower), None)
        if found is not None and [found] not in chosen.values():
            chosen[field.name] = [found]
    required = [field for field in fields if field.required]
    if list(columns) == [str(i) for i in range(len(required))] and not chosen:  # rows that are lists
        chosen = {field.name: [column] for field, column in zip(required, columns, strict=True)}
    for field in required:
        if field.name not in chosen:
            raise InputError(
                f"{name} has the columns {', '.join(columns)}; none is known to hold the {field.name}. Say which one "
                f'does: column="{field.name}=COLUMN"'
            )
    return chosen


def rows_of(
    tables: Sequence[Table], fields: Sequence[Field], named: Mapping[str, list[str]]
) -> tuple[list[Row], dict[str, list[str]]]:
    """Rows under the names of the fields, and the columns that these are in.

    Raises:
        InputError: a column is missing, or a row lacks a value.
    """
    rows: list[Row] = []
    chosen: dict[str, list[str]] = {}
    by_name = {field.name: field for field in fields}
    for table in tables:
        columns = list(dict.fromkeys(str(column) for record in table.records for column in record))
        chosen = choose_columns(columns, fields, named, table.name)
        for number, record in enumerate(table.records, 1):
            where = f"{table.name}, row {number}"
            values: dict[str, Any] = {"_record": record}
            for name, wanted in chosen.items():
                field = by_name[name]
                cells = [_plain(record.get(column)) for column in wanted]
                given = [cell for cell in cells if cell is not None]
                if not given:
                    if field.required:
                        lack = "nothing in" if wanted[0] in record else "no"
                        raise InputError(f"{where} has {lack} {wanted[0]!r}; give the row a {name}, or leave it out")
                    continue
                if field.many and isinstance(given[0], Mapping) and isinstance(given[0].get("text"), list):
                    # Choices as {"label": ["A", "B"], "text": [...]}: the right one is named by its label.
                    keys = given[0].get("label") or ()
                    values[f"{name}_keys"] = [None if key is None else str(key) for key in keys]
                    given = [given[0]["text"]]
                values[name] = _listed(given, len(cells) > 1, field, where, wanted[0]) if field.many else given[0]
            rows.append(Row(values, where))
    return rows, chosen


def _plain(cell: Any) -> Any:
    """A cell as JSON would have it, arrays as lists; None where it is empty, as files, tables and datasets say it."""
    if hasattr(cell, "tolist"):  # arrays, tensors, and numbers of NumPy
        cell = cell.tolist()
    if isinstance(cell, set | frozenset):
        cell = sorted(cell, key=str)
    if isinstance(cell, list | tuple):
        return [_plain(inner) if hasattr(inner, "tolist") else inner for inner in cell]
    missing = type(cell).__name__ in ("NAType", "NaTType") or (isinstance(cell, float) and cell != cell)  # of pandas
    return None if missing or (isinstance(cell, str) and not cell) else cell


def list_in(text: str) -> list[Any] | None:
    """The list that a table's cell holds, in JSON or as Python prints one; None where it is another text."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            found = read(text)
            return found if isinstance(found, list) else None
    return None


def _listed(given: list[Any], several: bool, field: Field, where: str, column: str) -> list[Any]:
    if several:
        return given
    value = given[0]
    if isinstance(value, str):  # a table's cell
        found = list_in(value)
        if found is not None:
            return found
        return value.split() if field.words else [value]
    if not isinstance(value, list):
        raise InputError(f"{where} holds a {type(value).__name__} in {column!r}; a list is wanted")
    return list(value)


def text_of(row: Row, name: str) -> str:
    """A field that must be a text that is not blank.

    Raises:
        InputError: it is something else.
    """
    value = row.values[name]
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        what = "is blank" if isinstance(value, str) else f"is a {type(value).__name__}"
        raise InputError(f"{row.where}: the {name} {what}; a text is wanted")
    return value


def hold_out(
    rows: Sequence[Row], share: float, group_by: str | None, group_field: str | None = None
) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows to evaluate on, in their order; some stay together.

    Args:
        rows: all of them.
        share: of them to evaluate on.
        group_by: column whose equal values stay together.
        group_field: field whose equal values do, where no column is named.

    Raises:
        InputError: a row has no such column, or the share leaves no row on one side.
    """
    if not share:
        return list(rows), []
    if len(rows) < 2:
        raise InputError(
            f"held_out is {share} and there is 1 row; give more rows, rows to evaluate on (eval=FILE), or held_out=0"
        )
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        name: Any = None if group_field is None else row.values[group_field]
        if group_by is not None:
            if group_by not in row.values["_record"]:
                known = ", ".join(map(str, row.values["_record"]))
                raise InputError(f"group_by is {group_by!r}; {row.where} has no such column, but {known}")
            name = _plain(row.values["_record"][group_by])
        # A row whose group is not known is one by itself.
        groups.setdefault(str(i) if name is None else f" {name}", []).append(i)
    names = sorted(groups)
    random.Random(0).shuffle(names)  # the same rows whatever the run's seed, so that runs can be compared
    held: set[int] = set()
    for name in names:
        if len(held) >= share * len(rows):
            break
        held |= set(groups[name])
    if len(held) == len(rows):
        key = group_by or group_field
        by = f", as they all have one {key}" if key and len(groups) == 1 else ""
        raise InputError(
            f"held_out is {share}; it takes all of the {len(rows)} rows{by}. Give more rows, rows to evaluate on "
            "(eval=FILE), or held_out=0"
        )
    return [row for i, row in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]
