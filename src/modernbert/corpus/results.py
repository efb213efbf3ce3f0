"""What an output holds: its answers as a stream of tables, and one hash of all of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
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

    Of each text, in the order of keys: its key and the bytes of its answer's columns, little-endian numbers, texts with
    their length. `tokens`, `truncated` and `error` do not count, nor does a text without an answer.

    Args:
        tables: `pyarrow.Table`s as `Transform` gives them, or a function that gives them, each time anew.
        parts: how often they are gone through, with so little of them in memory at once.

    Raises:
        InputError: the tables can be gone through only once, and there are several parts.
    """
    if parts > 1 and isinstance(tables, Iterator):
        raise InputError(
            f"parts is {parts} and tables can be gone through only once; give a list of tables, or a function that "
            "gives them each time anew"
        )
    again = tables if callable(tables) else (lambda: tables)
    whole = hashlib.sha256()
    for part in range(max(1, parts)):
        lines: list[tuple[bytes, bytes]] = []
        for table in again():
            lines += contents_of(table, part, max(1, parts))
        for key, content in sorted(lines):
            whole.update(key)
            whole.update(content)
    return whole.hexdigest()


def contents_of(table: Any, part: int = 0, parts: int = 1) -> Iterator[tuple[bytes, bytes]]:
    """The key and the bytes of the answer of each row that has one, of those that belong to a part of all keys."""
    if "error" in table.column_names:
        table = table.filter(table["error"].is_null())
    keys = table["key"].to_pylist()
    chosen = [i for i, key in enumerate(keys) if int.from_bytes(key[:4], "big") * parts >> 32 == part]
    names = [name for name in table.column_names if name not in ("key", "tokens", "truncated", "error")]
    table = table.take(pa.array(chosen, pa.int64()))
    contents: list[Iterable[bytes]] = [_bytes_of(table[name].combine_chunks()) for name in names]
    for i, *content in zip(chosen, *contents, strict=True):
        yield keys[i], b"".join(content)


def _bytes_of(column: Any) -> Iterator[bytes]:
    """The bytes of each value of a column."""
    kind = column.type
    if pa.types.is_fixed_size_list(kind):
        numbers = np.ascontiguousarray(column.flatten().to_numpy(zero_copy_only=False))
        for row in numbers.reshape(len(column), kind.list_size):
            yield row.tobytes()
    elif pa.types.is_list(kind) and pa.types.is_fixed_size_list(kind.value_type):
        for value in column:
            yield b"".join([len(value).to_bytes(8, "little"), *_bytes_of(value.values)])
    elif pa.types.is_floating(kind):
        for number in column.to_numpy(zero_copy_only=False):
            yield number.tobytes()
    else:
        for value in column.to_pylist():
            text = repr(value).encode()
            yield len(text).to_bytes(8, "little") + text
