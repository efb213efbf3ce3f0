"""What several tasks ask of their inputs and options, and how they say what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modernbert.errors import InputError


def check_text(text: Any, what: str = "a text") -> str:
    """A text that can be answered.

    Raises:
        InputError: it is no string, is empty or blank, or is not valid Unicode.
    """
    if not isinstance(text, str):
        raise InputError(f"{what} is {described(text)}; it must be a string")
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
        raise InputError(f"{name} is {value!r}; it must be a whole number of at least {least}")
    return value


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """An option that is one of a few names."""
    if value not in allowed:
        raise InputError(f"{name} is {value!r}; choose one of {', '.join(allowed)}")
    return str(value)


def check_fields(item: Any, names: Sequence[str], task: str) -> dict[str, Any]:
    """An input that is a dict with these keys."""
    if not isinstance(item, dict):
        raise InputError(f"an input is {described(item)}; {task} takes a dict with {' and '.join(names)}")
    missing = [name for name in names if name not in item]
    if missing:
        given = ", ".join(map(str, item)) or "nothing"
        raise InputError(f"an input has {given} and lacks {', '.join(missing)}; {task} takes {' and '.join(names)}")
    return item


def short(text: Any) -> str:
    """The beginning of a text, for messages."""
    text = text if isinstance(text, str) else " ".join(map(str, text))
    return text if len(text) <= 60 else text[:57] + "..."


def described(value: Any) -> str:
    """What a value is, for messages."""
    return "None" if value is None else f"a {type(value).__name__}"
