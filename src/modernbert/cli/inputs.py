"""What a task's inputs are made of, from arguments, lines or columns."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from modernbert.errors import InputError
from modernbert.records.reading import Record, sure


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


def from_records(
    records: Iterable[Record | InputError], form: Form, fixed: Record, columns: dict[str, list[str]], name: str
) -> Iterator[tuple[Any, Record | None]]:
    """Inputs of records, each with the record where that has more columns than one of text. Errors pass through.

    Args:
        records: from a file or standard input.
        form: of the task.
        fixed: fields that an option gave. A list that is missing then takes all records together.
        columns: the columns that each field is in, where they are not called like it.
        name: of the file, for messages.
    """
    if form.many is not None and set(form.fields) - set(fixed) == {form.many}:
        column = columns.get(form.many) or columns.get("text")
        yield {**fixed, form.many: [_field(sure(record), "text", column, name) for record in records]}, None
        return
    for record in records:
        if isinstance(record, InputError):
            yield record, None
            continue
        values: Record = dict(fixed)
        for field in form.fields:
            if field in fixed:
                continue
            plain = field == form.main and field not in record and field not in columns and set(record) == {"text"}
            source = ["text"] if plain else columns.get(field)
            values[field] = _field(record, field, source, name, many=field == form.many)
        for field in form.optional:
            if field in columns or field in record:
                values[field] = _field(record, field, columns.get(field), name)
        yield values["text"] if set(values) == {"text"} else values, None if set(record) == {"text"} else record


def _field(record: Record, field: str, columns: list[str] | None, name: str, many: bool = False) -> Any:
    wanted = columns or [field]
    for column in wanted:
        if column not in record:
            raise InputError(
                f"{name} has the columns {', '.join(map(str, record)) or 'none'} and no {column!r}; say which one is "
                f"the {field} with --column {field}=NAME"
            )
    values = [record[column] for column in wanted]
    if not many:
        return values[0]
    if len(values) > 1:
        return [value for value in values if value not in (None, "")]
    if isinstance(values[0], str):  # a table's cell
        try:
            return json.loads(values[0])
        except ValueError:
            raise InputError(
                f"{name}: the column {wanted[0]!r} holds no JSON list; name several columns instead"
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
            raise InputError(f"--column {entry}: there is no {field!r}; this task has {', '.join(known)}")
        out.setdefault(field, []).extend(column.split(",") if field == form.many else [column])
    return out


def parse_options(given: list[str]) -> dict[str, Any]:
    """`name=value` options; a value is JSON where it can be, and a text otherwise."""
    out: dict[str, Any] = {}
    for entry in given:
        name, equals, value = entry.partition("=")
        if not equals or not name:
            raise InputError(f"--option {entry!r}: write name=value, such as top_k=3")
        try:
            out[name.replace("-", "_")] = json.loads(value)
        except ValueError:
            out[name.replace("-", "_")] = value
    return out


def fingerprint(path: Path | None) -> Any:
    """What tells one input file from another: its place, size and time of change."""
    if path is None:
        return "standard input"
    state = path.stat()
    return [str(path.resolve()), state.st_size, state.st_mtime_ns]


def checkpoint_fingerprint(name_or_folder: str | None, revision: str | None) -> Any:
    """What tells one checkpoint from another: a folder's files, or the commit of what the Hub's cache holds."""
    from modernbert.errors import CheckpointError
    from modernbert.hub import Source

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
