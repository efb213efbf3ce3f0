"""Columns: which of them hold the fields of a task, found by their usual names or named, and what a row has there."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from modernbert.checks import described
from modernbert.errors import InputError, listed
from modernbert.io.tables.reading import Record


@dataclasses.dataclass(frozen=True)
class Field:
    """Something that a task reads of every row.

    Attributes:
        name: what it is called.
        others: what columns that hold it are often called.
        required: whether every row must have it.
        many: whether it is a list; then several columns may make it.
        words: whether a text stands for the list of its words.
        alone: whether a text that is no list stands for a list of one.
    """

    name: str
    others: tuple[str, ...] = ()
    required: bool = True
    many: bool = False
    words: bool = False
    alone: bool = True


def parse_columns(given: Sequence[str], fields: Sequence[Field], main: str | None = None) -> dict[str, list[str]]:
    """The columns that a user names for fields: "FIELD=COLUMN" entries, or columns of the field `main` alone.

    Several columns of a list have commas between.

    Raises:
        InputError: an entry names no column, or a field that does not exist or has a column already.
    """
    known = {field.name: field for field in fields}
    named: dict[str, list[str]] = {}
    for entry in given:
        name, equals, column = entry.partition("=")
        if not equals and main is not None:
            name, column = main, entry
        if not column:
            raise InputError(f"column is {entry!r}; write FIELD=COLUMN, such as {fields[0].name}=NAME")
        if name not in known:
            raise InputError(f"column is {entry!r} and there is no field {name!r}; this task has {', '.join(known)}")
        if name in named and not known[name].many:
            raise InputError(f"column is {entry!r} and {name} has the column {named[name][0]!r} already; give one")
        named.setdefault(name, []).extend(column.split(",") if known[name].many else [column])
    return named


def choose_columns(
    columns: Sequence[str], fields: Sequence[Field], named: Mapping[str, list[str]], where: str
) -> dict[str, list[str]]:
    """The columns of each field: those in `named`, else one of the field's name, else one of its usual names.

    Raises:
        InputError: a required field has no column, or a named column does not exist; it begins with `where`.
    """
    lower = {column.lower(): column for column in columns} | {column: column for column in columns}
    chosen: dict[str, list[str]] = {}
    for field in fields:
        if field.name in named:
            missing = [column for column in named[field.name] if column not in columns]
            if missing:
                raise InputError(f"{where} has the columns {listed(columns, 10) or 'none'} and no {missing[0]!r}")
            chosen[field.name] = named[field.name]
            continue
        found = next((lower[name] for name in (field.name, *field.others) if name in lower), None)
        if found is not None and [found] not in chosen.values():
            chosen[field.name] = [found]
    required = [field.name for field in fields if field.required]
    if not chosen and list(columns) == [str(i) for i in range(len(required))]:  # rows that are lists
        return {name: [column] for name, column in zip(required, columns, strict=True)}
    for name in required:
        if name not in chosen:
            raise InputError(
                f"{where} has the columns {listed(columns, 10) or 'none'}; none is known to hold the {name}. "
                f'Say which one does: column="{name}=COLUMN"'
            )
    return chosen


def value_in(record: Mapping[str, Any], columns: Sequence[str], field: Field, where: str) -> Any:
    """What a row has in the columns of a field: a cell, or a list if the field is one; None where it has nothing.

    Raises:
        InputError: there is no list where the field is one.
    """
    cells = [record.get(column) for column in columns]
    if len(cells) > 1 and not field.required:
        return [cell for cell in cells if cell is not None] or None
    if len(cells) > 1:
        while cells and cells[-1] in (None, ""):  # other rows may have more; a gap would shift their numbers
            cells.pop()
        return cells or None
    value = cells[0]
    if not field.many or value is None:
        return value
    if isinstance(value, str):  # of a table
        found = list_in(value)
        value = found if found is not None else value.split() if field.words else [value] if field.alone else value
    if not isinstance(value, list):
        raise InputError(f'{where} has {described(value)} in {columns[0]!r}; give a list, such as ["one", "two"]')
    return list(value)


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


def text_in(record: Record, column: str, where: str) -> str:
    """The text that a row has in a column.

    Raises:
        InputError: there is none, or it is not valid Unicode.
    """
    text = record.get(column)
    if not isinstance(text, str):
        lack = f"{'nothing' if text is None else described(text)} in" if column in record else "no column"
        raise InputError(f"{where} has {lack} {column!r}; name the column of the text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where} is no Unicode text: {error}") from None
    return text
