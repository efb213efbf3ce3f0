"""What several tasks ask of their inputs and options, and how they say what is wrong."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from modernbert.errors import InputError, printable, shown

logger = logging.getLogger(__name__)


def check_text(text: Any, what: str = "a text") -> str:
    """A text that can be answered.

    Raises:
        InputError: it is no string, is empty or blank, or is not valid Unicode.
    """
    if not isinstance(text, str):
        keys = f" with {_named(text)}" if isinstance(text, dict) else ""
        raise InputError(f"{what} is {described(text)}{keys}; it must be a string")
    if not text.strip():
        raise InputError(f"{what} is empty or only spaces; there is nothing to answer")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} holds a lone surrogate, U+{ord(text[error.start]):04X} at character {error.start}, which is no "
            "valid Unicode; decode the text again, or replace it"
        ) from None
    return text


def check_count(name: str, value: Any, least: int = 1) -> int:
    """An option that is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} is {shown(value)}; it must be a whole number of at least {least}")
    return value


def check_switch(name: str, value: Any, usual: bool = False) -> bool:
    """An option that is on or off; None means as usual. A text such as "false" is neither."""
    if value is None:
        return usual
    if not isinstance(value, bool) and not (isinstance(value, int) and value in (0, 1)):
        raise InputError(f"{name} is {shown(value)}; choose True or False")
    return bool(value)


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """An option that is one of a few names."""
    if not isinstance(value, str) or value not in allowed:
        raise InputError(f"{name} is {shown(value)}; choose one of {', '.join(allowed)}")
    return str(value)


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


def check_iterable(name: str, values: Any) -> Iterable[Any]:
    """Several inputs, one after another, in an order that is theirs.

    Raises:
        InputError: a table, whose own iterator gives the names of its columns; a mapping; a set, which has no order; or
            nothing that can be gone through.
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
    if isinstance(values, Mapping | str | bytes | bytearray | memoryview):
        raise InputError(f"{name} is {described(values)}; give a text, a list of texts or an iterable of them")
    try:
        return iter(values)
    except TypeError:
        raise InputError(
            f"{name} is {described(values)}; give a text, a list of texts or an iterable of them"
        ) from None


def watched(inputs: Iterable[Any]) -> Iterator[Any]:
    """The inputs, with a warning where they seem to be lines of a file with their ends."""
    lines = 0
    for item in inputs:
        lines = lines + 1 if lines >= 0 and isinstance(item, str) and item.endswith("\n") else -1
        if lines == 2:
            logger.warning(
                "texts end with a line end, which is read as a part of them; line.rstrip('\\n') takes it off"
            )
        yield item


def _named(keys: Iterable[Any]) -> str:
    """Names of columns or fields."""
    return printable(", ".join(map(str, keys)), limit=200) or "nothing"


def short(text: Any) -> str:
    """The beginning of a text, for messages."""
    text = text if isinstance(text, str) else " ".join(map(str, text))
    return text if len(text) <= 60 else text[:57] + "..."


def described(value: Any) -> str:
    """What a value is, for messages."""
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
