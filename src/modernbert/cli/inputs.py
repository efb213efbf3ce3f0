"""What a task's inputs are made of, from arguments, lines or columns."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from modernbert.errors import CheckpointError, InputError
from modernbert.io.hub import Source
from modernbert.io.tables.columns import Field, choose_columns, value_in
from modernbert.io.tables.reading import SUFFIXES, Record, Records
from modernbert.pipelines.forms import Form, main_of


def from_arguments(texts: list[str], form: Form, fixed: Record) -> Iterator[Any]:
    """Inputs of a command line's arguments, with the fields that an option fixed, such as a question."""
    main = main_of(form)
    others = [field.name for field in form if field.required and field is not main and field.name not in fixed]
    if main.many and others:
        if len(texts) < 2:
            raise InputError(f"give a {others[0]} and then its {main.name}, each as an argument")
        yield {others[0]: texts[0], main.name: texts[1:]}
    elif main.many:
        yield {**fixed, main.name: texts}
    elif others:
        raise InputError(f"--{others[0]} is not given; the task needs one")
    else:
        yield from (text if main.name == "text" else {**fixed, main.name: text} for text in texts)


def check_arguments(texts: list[str]) -> None:
    """Raise `InputError` for arguments that are meant as files: what would be answered is their name."""
    for text in texts:
        stdin = "to read it as a text, give it on standard input"
        with contextlib.suppress(OSError):  # too long for a name
            if Path(text).is_file():
                raise InputError(f"{text} is a file; did you mean --file {text}? ({stdin})")
            if Path(text).is_dir():
                raise InputError(
                    f"{text} is a folder; give a file with --file, or for its files an --output that is a folder, too, "
                    f"without .jsonl or the like ({stdin})"
                )
        if text.lower().endswith(SUFFIXES) and not any(map(str.isspace, text)):
            raise InputError(f"{text} is an argument that ends like a file, and there is no such file ({stdin})")


def from_records(
    records: Records, form: Form, fixed: Record, named: Mapping[str, list[str]], name: str, skip_errors: bool = False
) -> Iterator[tuple[Any, Record | None]]:
    """Inputs of the rows of a file; each with its row where that has more columns than one of text.

    Args:
        records: of the file.
        form: of the task.
        fixed: fields that an option gave. If only a list is missing, all rows together are that list.
        named: columns that the user named; see `modernbert.io.tables.parse_columns`.
        name: of the file, for messages.
        skip_errors: give the error instead of an input that cannot be read. The lack of a column in a table is raised
            all the same, as all its rows lack it.
    """
    main = main_of(form)
    wanted = [field for field in form if field.name not in fixed]
    if not main.many or wanted != [main]:
        for values, row in _values(records, wanted, named, name, skip_errors):
            if not isinstance(values, InputError):
                values = fixed | values
            yield values["text"] if isinstance(values, dict) and set(values) == {"text"} else values, row
        return
    items: list[Any] = []
    one = dataclasses.replace(main, many=False)
    for number, (values, _) in enumerate(_values(records, [one], named, name, skip_errors), 1):
        item = values if isinstance(values, InputError) else values[main.name]
        if isinstance(item, str) and not item.strip():
            item = InputError(f"{name}, record {number}, is empty or only spaces; there is nothing to answer")
            if not skip_errors:
                raise item
        items.append(item)
    if items:
        yield {**fixed, main.name: items}, None


def _values(
    records: Records, fields: Sequence[Field], named: Mapping[str, list[str]], name: str, skip_errors: bool
) -> Iterator[tuple[Record | InputError, Record | None]]:
    """What each row has for the fields, or its error."""
    is_table = name.lower().endswith((".csv", ".tsv", ".parquet"))
    columns: list[str] | None = None
    chosen: dict[str, list[str]] = {}
    for number, record in enumerate(records, 1):
        where, row = f"{name}, record {number},", None
        values: Record | InputError
        try:
            if isinstance(record, InputError):
                raise record
            row = None if set(record) == {"text"} else record
            if list(record) != columns:
                chosen = choose_columns(list(record), fields, named, name if is_table else where)
                columns = list(record)
            values = {f.name: value_in(record, chosen[f.name], f, where) for f in fields if f.name in chosen}
        except InputError as error:
            if not skip_errors or (is_table and columns is None and error is not record):
                raise
            values = error
        yield values, row


def fingerprint(path: Path | None) -> Any:
    """What tells one input file from another: its place, size and time of change."""
    if path is None:
        return {"file": "standard input"}
    state = path.stat()
    return {"file": str(path.resolve()), "the file's content": [state.st_size, state.st_mtime_ns]}


def checkpoint_fingerprint(name_or_folder: str | None, revision: str | None) -> Any:
    """What tells one checkpoint from another: a folder's files, or the commit of what the Hub's cache holds."""
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
