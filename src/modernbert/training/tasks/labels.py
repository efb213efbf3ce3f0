"""Names of labels, and the numbers that stand for them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from modernbert.config import Config
from modernbert.errors import InputError
from modernbert.nn.losses import IGNORED

_WHOLE = re.compile(r"[+-]?[0-9]+")
_POINT_ZERO = re.compile(r"([+-]?[0-9]+)\.0*")


def name_of(value: Any, numeric: bool = True) -> str:
    """A label's name; a whole number has one, 3, whether it is written 3, 3.0 or, if `numeric`, as the text "3.0"."""
    name = str(value).strip()
    if (numeric or isinstance(value, float)) and (found := _POINT_ZERO.fullmatch(name)):
        return found[1]
    return name


def number_of(value: Any) -> float | None:
    """The number that a cell holds, perhaps as text, or as a truth value; None where it holds none."""
    if not isinstance(value, bool | int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if isinstance(value, float) or math.isfinite(number) else None


def is_ignored(value: Any) -> bool:
    """Whether a label says that it does not count: -100, as in the losses."""
    return number_of(value) == IGNORED


class Labels:
    """Names in the order of their numbers.

    Args:
        names: at least one, each once.
        given: whether somebody named them, so that a whole number means the name at its place.
    """

    def __init__(self, names: Sequence[str], given: bool = False) -> None:
        twice = {name for name in names if names.count(name) > 1}
        if twice or not names:
            raise InputError(f"labels name {', '.join(sorted(twice))} twice" if twice else "there are no labels")
        self.names = list(names)
        self.given = given
        self.numbers = {name: i for i, name in enumerate(names)}

    @classmethod
    def named(cls, given: str) -> Labels:
        """Of "a,b,c", or of a file with a name a line."""
        names = given.split(",")
        if len(names) == 1:
            if not Path(given).is_file():
                raise InputError(f"labels is {given!r}; give names, a,b,c, or a file with one a line")
            try:
                names = Path(given).read_text(encoding="utf-8").splitlines()
            except UnicodeDecodeError as error:
                raise InputError(f"labels is {given}, which is not UTF-8: {error.reason}") from None
        return cls([name.strip() for name in names if name.strip()], True)

    @classmethod
    def found(cls, values: Iterable[Any]) -> Labels:
        """Of the values in the data: numbers in their order, else by the alphabet."""
        values = list(values)
        names = {name_of(value) for value in values} - {""}
        if all(_WHOLE.fullmatch(name) for name in names):
            return cls(sorted(names, key=lambda name: (int(name), name)))
        return cls(sorted({name_of(value, numeric=False) for value in values} - {""}))

    def of_model(self, config: Config) -> Labels:
        """A model's own labels, in its order, where it knows all of these and nobody named others."""
        theirs = [] if config.id2label is None else [config.id2label[i] for i in sorted(config.id2label)]
        if self.given or not theirs:
            return self
        if set(self.names) <= set(theirs):
            return Labels(theirs)
        are_places = all(name.isdecimal() and int(name) < len(theirs) for name in self.names)
        unnamed = any(name.startswith("LABEL_") or name.isdecimal() for name in theirs)
        return Labels(theirs, given=True) if are_places and not unnamed else self

    def number(self, value: Any, where: str) -> int:
        """The number of a label.

        Raises:
            InputError: there is no such label.
        """
        for name in (str(value).strip(), str(int(value)) if isinstance(value, bool) else name_of(value)):
            if name in self.numbers:
                return self.numbers[name]
        # Numbers are places where no name is a number itself.
        places = self.given and not any(n.isdecimal() for n in self.names)
        if places and name.isdecimal() and int(name) < len(self.names):
            return int(name)
        raise InputError(f"{where} has the label {str(value).strip()!r}; known are {some(self.names, 20)}")

    def leaves_out(self, value: Any) -> bool:
        """Whether a label says that it does not count: -100, as in the losses, unless that is a name."""
        return is_ignored(value) and name_of(value) not in self.numbers

    def config_changes(self) -> dict[str, Any]:
        """Fields of a configuration."""
        return {
            "num_labels": len(self.names),
            "id2label": dict(enumerate(self.names)),
            "label2id": dict(self.numbers),
        }


def some(names: Sequence[str], most: int) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def multi_hot_width(rows: Sequence[tuple[str, list[Any]]], names: int | None) -> int | None:
    """How many classes lists of labels have a 0 or a 1 for; None where they hold the classes themselves.

    Args:
        rows: where each list is, and the list.
        names: of classes that somebody named, if any.

    Raises:
        InputError: lists of 0 and 1 have different lengths, or another one than there are names.
    """
    if not all(_is_bit(value) for _, values in rows for value in values):
        return None
    where, first = rows[0]
    repeats = any(len({bool(number_of(v)) for v in values}) < len(values) for _, values in rows)
    other = next((row for row in rows if len(row[1]) != len(first)), None)
    if other is None and len(first) == names:
        return names
    if other is not None and repeats:
        raise InputError(
            f"{other[0]} has {len(other[1])} numbers of 0 and 1 and {where} has {len(first)}; give one for each class"
        )
    if names is not None and repeats:
        raise InputError(f"{where} has {len(first)} numbers of 0 and 1, and labels names {names} classes")
    if other is not None or names is not None:
        return None
    # A list of one whole number is a class; one of a truth value or of 1.0 is a target.
    alone = all(isinstance(values[0], bool | float) for _, values in rows) if len(first) == 1 else len(first) > 1
    return len(first) if alone else None


def _is_bit(value: Any) -> bool:
    return number_of(value) in (0.0, 1.0)
