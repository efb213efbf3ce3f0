"""What pipelines take for inputs: dicts with fields, and iterables that are no tables."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from modernbert.checks import described
from modernbert.errors import InputError, listed, printable, shown

logger = logging.getLogger(__name__)

_NO_LISTS = str | bytes | bytearray | memoryview  # sequences that hold no inputs


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
        if not isinstance(values, Mapping | _NO_LISTS):
            if hasattr(values, "__len__") and not hasattr(type(values), "__iter__"):  # a dataset of PyTorch
                return (values[i] for i in range(len(values)))
            return iter(values)
    except TypeError:
        pass
    raise InputError(f"{name} is {described(values)}; give a text, a list of texts or an iterable of them")


def as_list(values: Any) -> Any:
    """An array, a column of a table, or another sequence as a list; anything else as it is."""
    if isinstance(values, list | tuple | _NO_LISTS) or hasattr(values, "columns"):
        return values
    for name in ("tolist", "to_list", "to_pylist"):
        if hasattr(values, name) and getattr(values, "ndim", 1) == 1:
            return getattr(values, name)()
    return list(values) if isinstance(values, Sequence) else values


def check_no_tables(values: Any) -> None:
    """Refuse a dict of tables, such as the parts of a dataset."""
    tables = (
        [name for name, value in values.items() if hasattr(value, "columns") or hasattr(value, "column_names")]
        if isinstance(values, dict)
        else []
    )
    if tables:
        raise InputError(
            f"inputs is {described(values)} of tables, {_named(values)}; give a column of one of them, such as "
            f"inputs[{shown(tables[0])}]['text']"
        )


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


def choose_prompt(prompts: Mapping[str, str], usual: Sequence[str | None], name: str | None, given: str | None) -> str:
    """The text before each text: what is given, or one of the checkpoint's prompts.

    Args:
        prompts: the checkpoint's, by name.
        usual: names to take if none is named: the first that there is, else the last, where None is no prompt.
        name, given: what the caller chose.

    Raises:
        InputError: both are given, or there is no prompt of that name.
    """
    if given is not None:
        if name is not None:
            raise InputError("prompt and prompt_name are given; give one of them")
        return given
    if name is None:
        name = next((one for one in usual if one in prompts), usual[-1])
    if name is not None and name not in prompts:
        raise InputError(f"prompt_name is {shown(name)}; the checkpoint has {listed(prompts) or 'no prompts'}")
    return "" if name is None else prompts[name]
