"""What a task's inputs are made of, from arguments, lines or columns."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from modernbert.errors import InputError, listed, shown
from modernbert.io.tables.reading import SUFFIXES, Record, sure


@dataclasses.dataclass(frozen=True)
class Form:
    """The fields of a task's inputs.

    Attributes:
        fields: those that an input must have; the first one is what arguments and lines of text stand for, unless
            `main` names another.
        optional: those that it may have.
        many: a field that holds a list.
        main: the field that a line of text stands for.
    """

    fields: tuple[str, ...] = ("text",)
    optional: tuple[str, ...] = ()
    many: str | None = None
    main: str = "text"


FORMS = {
    "text-classification": Form(optional=("text_pair",)),
    "question-answering": Form(("question", "context"), main="context"),
    "multiple-choice": Form(("prompt", "choices"), many="choices", main="choices"),
    "text-ranking": Form(("query", "documents"), many="documents", main="documents"),
}


def form_of(task: str) -> Form:
    """The form of a task's inputs; a text, where nothing else is said."""
    return FORMS.get(task, Form())


def from_arguments(texts: list[str], form: Form, fixed: Record) -> Iterator[Any]:
    """Inputs of a command line's arguments.

    Args:
        texts: the arguments.
        form: of the task.
        fixed: fields that an option gave, such as a question; the arguments are then the rest.
    """
    missing = [name for name in form.fields if name not in fixed]
    if form.many is not None:
        if len(missing) == 2:
            if len(texts) < 2:
                raise InputError(f"give a {missing[0]} and then its {missing[1]}, each as an argument")
            yield {missing[0]: texts[0], missing[1]: texts[1:]}
        else:
            yield {**fixed, form.many: texts}
        return
    if len(missing) > 1:
        raise InputError(f"{', '.join(missing[:-1])} is not given; name it with --{missing[0]}")
    for text in texts:
        yield text if form.fields == ("text",) else {**fixed, missing[0]: text}


def check_arguments(texts: list[str]) -> None:
    """Refuse arguments that are meant as files: what would be answered is their name.

    Raises:
        InputError: an argument names a file or a folder, or has no space and ends like a file that is read.
    """
    for text in texts:
        stdin = "a text that reads so is given on standard input"
        with contextlib.suppress(OSError):  # too long for a name
            if Path(text).is_file():
                raise InputError(f"{text} is a file; did you mean --file {text}? ({stdin})")
            if Path(text).is_dir() and os.sep in text:
                raise InputError(f"{text} is a folder; give a file with --file ({stdin})")
        if text.lower().endswith(SUFFIXES) and not any(map(str.isspace, text)):
            raise InputError(f"{text} is an argument that ends like a file, and there is no such file ({stdin})")


def from_records(
    records: Iterable[Record | InputError],
    form: Form,
    fixed: Record,
    columns: dict[str, list[str]],
    name: str,
    go_on: bool = False,
) -> Iterator[tuple[Any, Record | None]]:
    """Inputs of records, each with the record where that has more columns than one of text. Errors pass through.

    Args:
        records: from a file or standard input.
        form: of the task.
        fixed: fields that an option gave. A list that is missing then takes all records together, errors among them.
        columns: the columns that each field is in, where they are not called like it.
        name: of the file, for messages.
        go_on: give the error in the place of an input that a record lacks a field of. What a table lacks, all its rows
            do; that is raised all the same.
    """
    table = name.lower().endswith((".csv", ".tsv", ".parquet"))
    if form.many is not None and set(form.fields) - set(fixed) == {form.many}:
        column = columns.get(form.many) or columns.get("text")
        items: list[Any] = []
        for number, record in enumerate(records, 1):
            where = f"{name}, record {number},"
            try:
                values = sure(record)
                item = values[_columns(values, "text", column, name if table else where)[0]]
            except InputError as error:
                if not go_on or (table and error is not record):
                    raise
                item = error
            if isinstance(item, str) and not item.strip():
                item = InputError(f"{where} is empty or only spaces; there is nothing to answer")
                if not go_on:
                    raise item
            items.append(item)
        if items:
            yield {**fixed, form.many: items}, None
        return
    for number, record in enumerate(records, 1):
        if isinstance(record, InputError):
            yield record, None
            continue
        where = name if table else f"{name}, record {number},"
        row = None if set(record) == {"text"} else record
        try:
            sources = _sources(record, form, fixed, columns, where)
        except InputError as error:
            if table or not go_on:
                raise
            yield error, row
            continue
        try:
            values = fixed | {field: _value(record, wanted, field == form.many) for field, wanted in sources.items()}
        except InputError as error:
            error = InputError(f"{name}, record {number}, {error}")
            if not go_on:
                raise error from None
            yield error, row
            continue
        yield values["text"] if set(values) == {"text"} else values, row


def _sources(
    record: Record, form: Form, fixed: Record, columns: dict[str, list[str]], where: str
) -> dict[str, list[str]]:
    """The columns of a record that each field is read from."""
    found = {}
    for field in form.fields:
        if field not in fixed:
            plain = field == form.main and field not in record and field not in columns and set(record) == {"text"}
            found[field] = _columns(record, field, ["text"] if plain else columns.get(field), where)
    for field in form.optional:
        if field in columns or field in record:
            found[field] = _columns(record, field, columns.get(field), where)
    return found


def _columns(record: Record, field: str, columns: list[str] | None, where: str) -> list[str]:
    wanted = columns or [field]
    for column in wanted:
        if column not in record:
            raise InputError(
                f"{where} has the columns {listed(record) or 'none'} and no {shown(column)}; say which one is the "
                f"{field} with --column {field}=NAME"
            )
    return wanted


def _value(record: Record, columns: list[str], many: bool) -> Any:
    values = [record[column] for column in columns]
    if not many:
        return values[0]
    if len(values) > 1:
        while values and values[-1] in (None, ""):  # a row may have fewer than others; a gap would shift their numbers
            values.pop()
        return values
    if isinstance(values[0], str):  # a table's cell
        try:
            return json.loads(values[0])
        except (ValueError, RecursionError):
            raise InputError(
                f"holds no JSON list in the column {shown(columns[0])}; name several columns instead"
            ) from None
    return values[0]


def parse_columns(given: list[str], form: Form) -> dict[str, list[str]]:
    """`field=column` options; a bare column is the main field's."""
    known = [*form.fields, *form.optional]
    out: dict[str, list[str]] = {}
    for entry in given:
        field, equals, column = entry.partition("=")
        if not equals:
            field, column = form.main, entry
        if field not in known:
            raise InputError(f"--column {entry}: there is no {shown(field)}; this task has {', '.join(known)}")
        if field in out and field != form.many:
            raise InputError(f"--column {entry}: {field} has the column {out[field][0]} already; give one")
        out.setdefault(field, []).extend(column.split(",") if field == form.many else [column])
    return out


def parse_options(given: list[str]) -> dict[str, Any]:
    """`name=value` options; a value is JSON or one of Python's constants where it can be, and a text otherwise."""
    out: dict[str, Any] = {}
    for entry in given:
        name, equals, value = entry.partition("=")
        if not equals or not name:
            raise InputError(f"--option {entry!r}: write name=value, such as top_k=3")
        name = name.replace("-", "_")
        if name in out:
            raise InputError(f"--option {name} is given twice; give it once")
        try:
            out[name] = json.loads(value)
        except (ValueError, RecursionError):
            out[name] = {"True": True, "False": False, "None": None}.get(value, value)
    return out


def fingerprint(path: Path | None) -> Any:
    """What tells one input file from another: its place, size and time of change."""
    if path is None:
        return {"file": "standard input"}
    state = path.stat()
    return {"file": str(path.resolve()), "the file's content": [state.st_size, state.st_mtime_ns]}


def checkpoint_fingerprint(name_or_folder: str | None, revision: str | None) -> Any:
    """What tells one checkpoint from another: a folder's files, or the commit of what the Hub's cache holds."""
    from modernbert.errors import CheckpointError
    from modernbert.io.hub import Source

    if name_or_folder is None:
        return None
    source = Source(name_or_folder, revision)
    if source.folder is not None:
        return [fingerprint(path) for path in sorted(source.folder.rglob("*")) if path.is_file()]
    try:
        found = source.find("config.json")
    except CheckpointError:
        return None
    return None if found is None else str(found.parent)
