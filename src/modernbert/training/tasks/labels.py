"""Names of labels and the numbers that stand for them: from data, from users, from a checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modernbert.config import Config
from modernbert.errors import InputError, listed, shown
from modernbert.nn.losses import IGNORED

_WHOLE = re.compile(r"[+-]?[0-9]+")
_POINT_ZERO = re.compile(r"([+-]?[0-9]+)\.0*")


def name_of(value: Any, numeric: bool = True) -> str:
    """A label's name; a whole number has one, 3, whether it is written 3, 3.0 or, if `numeric`, as the text "3.0"."""
    name = str(value).strip()
    found = _POINT_ZERO.fullmatch(name) if numeric or isinstance(value, float) else None
    return found[1] if found else name


def number_of(value: Any) -> float | None:
    """The number that a cell holds, perhaps as text or as a truth value; None if it holds none."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if isinstance(value, float) or math.isfinite(number) else None


def is_ignored(value: Any) -> bool:
    """Whether a label is -100, which does not count in losses and metrics."""
    return number_of(value) == IGNORED


class Labels:
    """Names in the order of their numbers.

    Args:
        names: at least one, each once.
        given: whether a user gave them, so that a whole number may mean the name at its place.
    """

    def __init__(self, names: Sequence[str], given: bool = False) -> None:
        twice = {name for name in names if names.count(name) > 1}
        if twice or not names:
            raise InputError(f"labels name {', '.join(sorted(twice))} twice" if twice else "there are no labels")
        self.names, self.given = list(names), given
        self.numbers = {name: i for i, name in enumerate(names)}

    @classmethod
    def read(cls, given: str) -> Labels:
        """From "a,b,c", or from a file with a name in each line."""
        names = given.split(",")
        if len(names) == 1:
            if not Path(given).is_file():
                raise InputError(f"labels is {given!r}; give names, a,b,c, or a file with one a line")
            try:
                names = Path(given).read_text(encoding="utf-8-sig").splitlines()
            except UnicodeDecodeError as error:
                raise InputError(f"labels is {given}, which is not UTF-8: {error.reason}") from None
        return cls([name.strip() for name in names if name.strip()], given=True)

    @classmethod
    def found_in(cls, values: Iterable[Any]) -> Labels:
        """From data: whole numbers in their order, other names in that of the alphabet."""
        values = list(values)
        names = {name_of(value) for value in values} - {""}
        if all(_WHOLE.fullmatch(name) for name in names):
            return cls(sorted(names, key=lambda name: (int(name), name)))
        return cls(sorted({name_of(value, numeric=False) for value in values} - {""}))

    @classmethod
    def unnamed(cls, count: int) -> Labels:
        """Names that say nothing, such as LABEL_0."""
        return cls([f"LABEL_{i}" for i in range(count)])

    def aligned(self, config: Config) -> Labels:
        """The labels of a checkpoint, in its order, if it has all of these and no user gave others."""
        theirs = [config.id2label[i] for i in sorted(config.id2label)] if config.id2label else []
        if self.given or not theirs:
            return self
        if set(self.names) <= set(theirs):
            return Labels(theirs)
        are_places = all(name.isdecimal() and int(name) < len(theirs) for name in self.names)
        have_names = not any(name.startswith("LABEL_") or name.isdecimal() for name in theirs)
        return Labels(theirs, given=True) if are_places and have_names else self

    def number(self, value: Any, where: str) -> int:
        """The number of a label; `InputError`, which names the row `where` it is, if there is no such label."""
        for name in (str(value).strip(), str(int(value)) if isinstance(value, bool) else name_of(value)):
            if name in self.numbers:
                return self.numbers[name]
        # Numbers are places if no name is a number itself.
        are_places = self.given and not any(other.isdecimal() for other in self.names)
        if are_places and name.isdecimal() and int(name) < len(self.names):
            return int(name)
        raise InputError(f"{where} has the label {str(value).strip()!r}; known are {listed(self.names, 20)}")

    def leaves_out(self, value: Any) -> bool:
        """Whether a label is -100, which does not count, and that is not a name."""
        return is_ignored(value) and name_of(value) not in self.numbers

    def config_changes(self) -> dict[str, Any]:
        """Fields of a configuration."""
        return {"num_labels": len(self.names), "id2label": dict(enumerate(self.names)), "label2id": {**self.numbers}}


def class_weights(given: Sequence[str], labels: Labels, texts: Sequence[Iterable[int]], several: bool) -> Tensor | None:
    """What each class counts for in training; None if all count alike.

    Args:
        given: "LABEL=WEIGHT" of some, weights of all in their order, or "balanced".
        labels: the names.
        texts: the classes of each text, or of each word.
        several: whether a text may have any number of classes. Weights are then those of the texts that have a class
            against those that do not.
    """
    if not given:
        return None
    counts = torch.zeros(len(labels.names))
    for classes in texts:
        for one in classes:
            counts[one] += 1
    if list(given) == ["balanced"]:
        balanced = (len(texts) - counts) / counts if several else counts.sum() / ((counts > 0).sum() * counts)
        return torch.where((counts > 0) & (balanced > 0), balanced, 1.0)
    weights = torch.ones(len(labels.names))
    pairs = [pair.rpartition("=") for pair in given]
    if not any(equals for _, equals, _ in pairs):
        pairs = [(name, "=", weight) for name, (_, _, weight) in zip(labels.names, pairs, strict=False)]
    for name, _, weight in pairs:
        number = number_of(weight)
        if number is None or not 0 <= number < math.inf or name not in labels.numbers or len(given) > len(labels.names):
            raise InputError(
                f"class_weights is {shown(list(given))}; give balanced, LABEL=WEIGHT, or a weight for each of "
                f"{listed(labels.names)}"
            )
        weights[labels.numbers[name]] = number
    return weights


def is_bit(value: Any) -> bool:
    """Whether a cell holds 0 or 1, perhaps as text or as a truth value."""
    return number_of(value) in (0.0, 1.0)


def multi_hot_width(rows: Sequence[tuple[str, list[Any]]], names: int | None) -> int | None:
    """How many classes lists of labels have a 0 or a 1 for; None if they hold the classes themselves.

    Args:
        rows: where each list is, and the list.
        names: how many classes a user named, if any.

    Raises:
        InputError: lists of 0 and 1 have different lengths, or not the length that the names ask for.
    """
    if not all(is_bit(value) for _, values in rows for value in values):
        return None
    where, first = rows[0]
    width, other = len(first), next((row for row in rows if len(row[1]) != len(first)), None)
    if other is None and (width == names or (names is None and width > 1)):
        return width
    if any(len({number_of(value) for value in values}) < len(values) for _, values in rows):  # no list of classes
        if other is None:
            raise InputError(f"{where} has {width} numbers of 0 and 1, and labels names {names} classes")
        counts = f"{other[0]} has {len(other[1])} numbers of 0 and 1 and {where} has {width}"
        raise InputError(f"{counts}; give one for each class")
    # A list of one whole number is a class; one of a truth value or of 1.0 says whether a text has the only class.
    is_alone = other is None and names is None and width == 1
    return 1 if is_alone and all(isinstance(values[0], bool | float) for _, values in rows) else None
