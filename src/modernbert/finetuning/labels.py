"""Names of labels, and the numbers that stand for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from modernbert.config import Config
from modernbert.errors import InputError


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
            names = Path(given).read_text(encoding="utf-8").splitlines()
        return cls([name.strip() for name in names if name.strip()], True)

    @classmethod
    def found(cls, values: Iterable[Any]) -> Labels:
        """Of the values in the data: numbers in their order, else by the alphabet."""
        names = {str(value).strip() for value in values} - {""}
        numeric = all(name.lstrip("-").isdigit() for name in names)
        return cls(sorted(names, key=int) if numeric else sorted(names))

    def of_model(self, config: Config) -> Labels:
        """A model's own labels, in its order, where it knows all of these and nobody named others."""
        theirs = [] if config.id2label is None else [config.id2label[i] for i in sorted(config.id2label)]
        if self.given or not theirs:
            return self
        if set(self.names) <= set(theirs):
            return Labels(theirs)
        are_places = all(name.isdigit() and int(name) < len(theirs) for name in self.names)
        unnamed = any(name.startswith("LABEL_") or name.isdigit() for name in theirs)
        return Labels(theirs, given=True) if are_places and not unnamed else self

    def number(self, value: Any, where: str) -> int:
        """The number of a label.

        Raises:
            InputError: there is no such label.
        """
        name = str(value).strip()
        if name in self.numbers:
            return self.numbers[name]
        # Numbers are places where no name is a number itself.
        if self.given and name.isdigit() and int(name) < len(self.names) and not any(n.isdigit() for n in self.names):
            return int(name)
        known = ", ".join(self.names[:20]) + (f" and {len(self.names) - 20} more" if len(self.names) > 20 else "")
        raise InputError(f"{where} has the label {name!r}; known are {known}")

    def config_changes(self) -> dict[str, Any]:
        """Fields of a configuration."""
        return {
            "num_labels": len(self.names),
            "id2label": dict(enumerate(self.names)),
            "label2id": dict(self.numbers),
        }
