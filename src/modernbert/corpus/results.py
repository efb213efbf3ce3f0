"""What an output holds: its answers as a stream of tables, and one hash of all of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from modernbert.corpus.output import Output, read_parquet
from modernbert.errors import InputError

_PART = 256 * 2**20  # bytes of answers that are sorted together


def answers(folder: str | Path) -> Iterator[Any]:
    """The shards of an output, as `pyarrow.Table`s: `key`, the answer's columns, `tokens`, `truncated`."""
    output = Output(str(folder))
    names = output.names("data")
    if not names and output.read("manifest.json") is None:
        raise InputError(f"{folder} is no output of a corpus")
    for name in names:
        with output.open(f"data/{name}") as stream:
            yield read_parquet(stream)


def digest(folder: str | Path) -> str:
    """SHA-256 over the keys and answers of an output, sorted by key; see `digest_of`."""
    output = Output(str(folder))
    size = sum(int(output.system.size(output.path(f"data/{name}"))) for name in output.names("data"))
    return digest_of(lambda: answers(folder), parts=-(-size // _PART))


def digest_of(tables: Any, parts: int = 1) -> str:
    """SHA-256 over the keys and answers of tables, sorted by key.

    It covers the names and types of the answer's columns, and of each text, in the order of keys, its key and the bytes
    of these columns in the order of their names: little-endian numbers, texts with their length. `tokens`, `truncated`
    and `error` do not count, nor does a text without an answer, nor what else Arrow says of a type than which values it
    has (names of a list's items, the width of offsets).

    Args:
        tables: `pyarrow.Table`s as `Transform` gives them, or a function that gives them, each time anew.
        parts: how often they are gone through, with so little of them in memory at once.

    Raises:
        InputError: the tables can be gone through only once, and there are several parts; or their columns differ.
    """
    if parts > 1 and isinstance(tables, Iterator):
        raise InputError(
            f"parts is {parts} and tables can be gone through only once; give a list of tables, or a function that "
            "gives them each time anew"
        )
    again = tables if callable(tables) else (lambda: tables)
    whole = hashlib.sha256()
    columns: dict[str, str] = {}
    for part in range(max(1, parts)):
        lines: list[tuple[bytes, bytes]] = []
        for table in map(_answered, again()):
            if not table.num_rows:
                continue
            here = {name: _kind(table.schema.field(name).type) for name in _answer_names(table)}
            if not columns:
                columns = here
                whole.update(repr(list(columns.items())).encode())
            elif here != columns:
                raise InputError(f"tables of one digest have the columns {_shown(columns)}, and one has {_shown(here)}")
            lines += contents_of(table, part, max(1, parts))
        for key, content in sorted(lines):
            whole.update(key)
            whole.update(content)
    return whole.hexdigest()


def contents_of(table: Any, part: int = 0, parts: int = 1) -> Iterator[tuple[bytes, bytes]]:
    """The key and the bytes of the answer of each row that has one, of those that belong to a part of all keys."""
    table = _answered(table)
    keys = table["key"].to_pylist()
    chosen = [i for i, key in enumerate(keys) if int.from_bytes(key[:4], "big") * parts >> 32 == part]
    table = table.take(pa.array(chosen, pa.int64()))
    contents: list[Iterable[bytes]] = [_bytes_of(table[name].combine_chunks()) for name in _answer_names(table)]
    for i, *content in zip(chosen, *contents, strict=True):
        yield keys[i], b"".join(content)


def _answered(table: Any) -> Any:
    """The rows of a table that have an answer."""
    return table.filter(table["error"].is_null()) if "error" in table.column_names else table


def _answer_names(table: Any) -> list[str]:
    return sorted(set(table.column_names) - {"key", "tokens", "truncated", "error"})


def _kind(kind: Any) -> str:
    """A type by the values that it holds: however Arrow stores them, and whatever it calls the items of a list."""
    types = pa.types
    if types.is_fixed_size_list(kind):
        return f"{_kind(kind.value_type)}[{kind.list_size}]"
    if types.is_list(kind) or types.is_large_list(kind) or types.is_list_view(kind) or types.is_large_list_view(kind):
        return f"list<{_kind(kind.value_type)}>"
    if types.is_struct(kind):
        return f"struct<{', '.join(f'{field.name}: {_kind(field.type)}' for field in kind)}>"
    if types.is_dictionary(kind):
        return _kind(kind.value_type)
    return str(kind).removeprefix("large_").removesuffix("_view")


def _shown(columns: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in columns.items())


def _bytes_of(column: Any) -> Iterator[bytes]:
    """The bytes of each value of a column."""
    kind = column.type
    if pa.types.is_fixed_size_list(kind):
        numbers = np.ascontiguousarray(column.flatten().to_numpy(zero_copy_only=False))
        for row in numbers.reshape(len(column), kind.list_size):
            yield row.tobytes()
    elif (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_fixed_size_list(kind.value_type):
        for value in column:
            yield b"".join([len(value).to_bytes(8, "little"), *_bytes_of(value.values)])
    elif pa.types.is_floating(kind):
        for number in column.to_numpy(zero_copy_only=False):
            yield number.tobytes()
    else:
        for value in column.to_pylist():
            text = repr(value).encode()
            yield len(text).to_bytes(8, "little") + text
