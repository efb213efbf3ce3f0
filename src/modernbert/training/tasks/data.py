"""Rows of training data: read from files or memory, under the names of a task's fields, some of them held out."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from modernbert.checks import described
from modernbert.errors import InputError, listed
from modernbert.io.tables.columns import Field, choose_columns, value_in
from modernbert.io.tables.reading import Record, check_once, parts_of, place_of, read_records, rows_of_dataset

_VALIDATION = ("validation", "val", "valid", "dev", "eval", "test")


class Row(NamedTuple):
    """What a record has for the fields of a task, the record as "_record", and where it is, for messages."""

    values: dict[str, Any]
    where: str


def read_tables(sources: Any, header: Sequence[str] | None) -> dict[str, list[Record]]:
    """Read files, datasets in memory or lists of dicts whole; their rows by their names.

    Args:
        sources: a path, with "#PART" for a part; a list of paths; a list of rows; a dataset, or a table of pandas.
        header: names of the columns of tables without a header line.

    Raises:
        InputError: a file is empty, is given twice, or is not what its suffix promises.
        OSError: a file cannot be read.
    """
    tables: dict[str, list[Record]] = {}
    sources = [sources] if isinstance(sources, str | Path) else sources
    if isinstance(sources, Sequence) and sources and all(isinstance(s, str | Path) for s in sources):
        places = [(*place_of(str(source)), str(source)) for source in sources]
        check_once(places)
        for path, part, name in places:
            if not path.exists():
                raise InputError(f"there is no file or folder {path}")
            tables[name] = list(read_records(path, part, header))
    elif hasattr(sources, "features"):
        tables["the dataset"] = list(rows_of_dataset(sources))
    else:
        if hasattr(sources, "columns") and hasattr(sources, "to_dict"):  # a table of pandas
            sources = sources.to_dict("records")
        if not isinstance(sources, Iterable) or isinstance(sources, Mapping):
            raise InputError(f"data is {described(sources)}; give paths, rows or a dataset")
        rows = list(sources)
        wrong = next((row for row in rows if not isinstance(row, Mapping)), None)
        if wrong is not None:
            raise InputError(f"a row is {described(wrong)}; give dicts")
        tables["the list of rows"] = list(map(dict, rows))
    for name, records in tables.items():
        if not records:
            raise InputError(f"{name} holds no rows")
    return tables


def with_parts(train: Any, evaluation: Any) -> tuple[Any, Any, str]:
    """What to train and to evaluate on if one file holds both parts; and what was chosen, in words."""
    alone = [train] if isinstance(train, str | Path) else train
    if evaluation or not (isinstance(alone, Sequence) and len(alone) == 1 and isinstance(alone[0], str | Path)):
        return train, evaluation, ""
    path, part = place_of(str(alone[0]))
    parts = parts_of(path) if path.exists() and part in (None, "train") else []
    if "train" not in parts:
        return train, evaluation, ""
    second = next((name for name in _VALIDATION if name in parts), None)
    rest = f", evaluating on its part {second!r}" if second else ""
    evaluation = [f"{path}#{second}"] if second else []
    return [f"{path}#train"], evaluation, f"training on the part 'train' of {path}{rest}"


def rows_of(
    tables: Mapping[str, Sequence[Record]], fields: Sequence[Field], named: Mapping[str, list[str]]
) -> tuple[list[Row], dict[str, list[str]]]:
    """Rows under the names of the fields, and the columns that these are in.

    Raises:
        InputError: a column is missing, or a row lacks a value.
    """
    rows: list[Row] = []
    chosen: dict[str, list[str]] = {}
    for name, records in tables.items():
        columns = list(dict.fromkeys(str(column) for record in records for column in record))
        chosen = choose_columns(columns, fields, named, name)
        for number, record in enumerate(records, 1):
            row = Row({"_record": record}, f"{name}, row {number}")
            cells = {column: _plain(record.get(column)) for wanted in chosen.values() for column in wanted}
            for field in fields:
                if field.name in chosen:
                    _add(row, cells, field, chosen[field.name])
            rows.append(row)
    return rows, chosen


def _add(row: Row, cells: Mapping[str, Any], field: Field, columns: Sequence[str]) -> None:
    """Add what a row has for a field."""
    cell = cells[columns[0]]
    if field.many and isinstance(cell, Mapping) and isinstance(cell.get("text"), list):
        # Choices as {"label": ["A", "B"], "text": [...]}: the right one is named by its label.
        keys = cell.get("label") or ()
        row.values[f"{field.name}_keys"] = [None if key is None else str(key) for key in keys]
        cells = {columns[0]: cell["text"]}
    value = value_in(cells, columns, field, row.where)
    if value is not None:
        row.values[field.name] = value
    elif field.required:
        lack = "nothing in" if columns[0] in row.values["_record"] else "no"
        raise InputError(f"{row.where} has {lack} {columns[0]!r}; give the row a {field.name}, or leave it out")


def _plain(cell: Any) -> Any:
    """A cell as JSON would have it, arrays as lists; None where it is empty, in a file, a table or a dataset."""
    if hasattr(cell, "tolist"):  # arrays, tensors, and numbers of NumPy
        cell = cell.tolist()
    if isinstance(cell, set | frozenset):
        cell = sorted(cell, key=str)
    if isinstance(cell, list | tuple):
        return [_plain(inner) if hasattr(inner, "tolist") else inner for inner in cell]
    missing = type(cell).__name__ in ("NAType", "NaTType") or (isinstance(cell, float) and cell != cell)  # of pandas
    return None if missing or (isinstance(cell, str) and not cell) else cell


def text_of(row: Row, name: str) -> str:
    """A field that must be a text that is not blank.

    Raises:
        InputError: it is something else.
    """
    value = row.values[name]
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        what = "blank" if isinstance(value, str) else described(value)
        raise InputError(f"{row.where}: the {name} is {what}; give a text")
    return value


def hold_out(
    rows: Sequence[Row], share: float, group_by: str | None, group_field: str | None = None
) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and a share of them to evaluate on, in their order.

    Rows with one value in the column `group_by`, or in the field `group_field` if no column is named, stay together.

    Raises:
        InputError: a row has no such column, or the share leaves no row to train on.
    """
    if not share:
        return list(rows), []
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        name: Any = None if group_field is None else row.values[group_field]
        if group_by is not None:
            record = row.values["_record"]
            if group_by not in record:
                raise InputError(f"group_by is {group_by!r}; {row.where} has no such column, but {listed(record, 20)}")
            name = _plain(record[group_by])
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
        every = "the only row" if len(rows) == 1 else f"all of the {len(rows)} rows"
        if len(groups) == 1 < len(rows):
            every += f", as they all have one {group_by or group_field}"
        raise InputError(
            f"held_out is {share}, which takes {every}; give more rows, rows to evaluate on (eval=FILE), or held_out=0"
        )
    return [row for i, row in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]
