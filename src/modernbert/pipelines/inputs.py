"""What pipelines take for inputs: dicts with fields, and iterables that are no tables."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from modernbert.checks import described
from modernbert.errors import InputError, printable, shown

logger = logging.getLogger(__name__)


def check_fields(item: Any, names: Sequence[str], task: str) -> dict[str, Any]:
    """An input that is a dict with these keys."""
    if not isinstance(item, dict):
        raise InputError(f"an input is {described(item)}; {task} takes a dict with {' and '.join(names)}")
    missing = [name for name in names if name not in item]
    if missing:
        raise InputError(
            f"an input has {_named(item)} and lacks {', '.join(missing)}; {task} takes {' and '.join(names)}"
        )
    return item


def check_texts(name: str, values: Any) -> list[Any]:
    """A field that holds a list of texts, not empty."""
    if not isinstance(values, list | tuple) or not values:
        raise InputError(f"{name} is {shown(values)}; give a list of at least one text")
    return list(values)


def check_iterable(name: str, values: Any) -> Iterator[Any]:
    """Several inputs, one after another, in an order that is theirs.

    Raises:
        InputError: a table, whose own iterator gives the names of its columns; a mapping; a set, which has no order; or
            nothing that can be iterated over.
    """
    if hasattr(values, "columns") and not isinstance(values, Mapping):
        names = list(getattr(values, "column_names", values.columns))
        first = shown(names[0]) if names else "NAME"
        raise InputError(
            f"{name} is {described(values)}, a table with the columns {_named(names)}; give one of them, such as "
            f"{name}[{first}]"
        )
    if isinstance(values, set | frozenset):
        raise InputError(f"{name} is {described(values)}, which has no order; give a list")
    try:
        if not isinstance(values, Mapping | str | bytes | bytearray | memoryview):
            return iter(values)
    except TypeError:
        pass
    raise InputError(f"{name} is {described(values)}; give a text, a list of texts or an iterable of them")


def watched(inputs: Iterable[Any]) -> Iterator[Any]:
    """The inputs, with a warning where they seem to be lines of a file with their ends."""
    lines = 0
    for item in inputs:
        lines = lines + 1 if lines >= 0 and isinstance(item, str) and item.endswith("\n") else -1
        if lines == 2:
            logger.warning("texts end with a line end, which is read as a part of them; line.rstrip('\\n') removes it")
        yield item


def _named(keys: Iterable[Any]) -> str:
    return printable(", ".join(map(str, keys)), limit=200) or "nothing"
