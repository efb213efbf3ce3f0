"""One home for what a value must be: fields of options with types and limits, and checks of single values.

Options are frozen dataclasses. Each field is declared once by `option`, with its default, its limits and a sentence;
keyword arguments, their checks, help texts, flags and keys of files come from that. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from modernbert.errors import InputError, listed, printable, shown


@dataclasses.dataclass(frozen=True)
class Limits:
    """Which numbers are allowed: `least` and `most` are allowed themselves, `above` and `below` are not."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def allow(self, value: float) -> bool:
        """Whether a number keeps all limits; NaN keeps none, and an infinite number only those that name no end."""
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        low = None if self.least is None else f"at least {self.least:g}"
        low = low if self.above is None else f"above {self.above:g}"
        high = None if self.most is None else f"at most {self.most:g}"
        high = high if self.below is None else f"below {self.below:g}"
        return " and ".join(part for part in (low, high) if part)


def option(
    default: Any,
    help: str,  # noqa: A002 (what every library of command lines calls it)
    *,
    choices: Sequence[str] = (),
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    otherwise: str = "",
    required: bool = False,
) -> Any:
    """A field of a dataclass of options.

    Args:
        default: its value if it is not given.
        help: one sentence that says what it is and in which unit.
        choices: the allowed values, if they can be listed.
        least, most, above, below: limits of a number, or of each number of a list; see `Limits`.
        otherwise: what holds by default, in words, where the default value itself does not say it.
        required: whether it must be given.
    """
    limits = Limits(least, most, above, below)
    metadata = {"help": help, "choices": tuple(choices), "limits": limits, "otherwise": otherwise, "required": required}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The base of all options: every field is checked by its type and by what `option` says of it.

    Raises:
        ValueError: of the class's own kind (`InputError` by default); it names the field, what was given and what is
            allowed.
    """

    error: ClassVar[type[ValueError]] = InputError

    def __post_init__(self) -> None:
        kinds = kinds_of(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            checked = check_value(field.name, value, kinds[field.name], field.metadata, self.error)
            if checked is not value:
                object.__setattr__(self, field.name, checked)

    @classmethod
    def of(cls, values: Mapping[str, Any], source: str) -> Self:
        """Options of keyword arguments or of a file's keys.

        Args:
            values: by the fields' names. None stands for the default, unless the field itself may be None.
            source: what they are options of, for the message about a name that does not exist.
        """
        kinds = kinds_of(cls)
        unknown = sorted(set(values) - set(kinds))
        if unknown:
            raise cls.error(f"{source} has no option {', '.join(unknown)}; there are {', '.join(kinds)}")
        return cls(**{k: v for k, v in values.items() if v is not None or type(None) in typing.get_args(kinds[k])})


_KINDS: dict[type, dict[str, Any]] = {}  # reading annotations takes long beside checking values


def kinds_of(options: Any) -> dict[str, Any]:
    """The type of each field of a dataclass."""
    if options not in _KINDS:
        hints = typing.get_type_hints(options)
        _KINDS[options] = {field.name: hints[field.name] for field in dataclasses.fields(options)}
    return _KINDS[options]


def check_value(
    name: str, value: Any, kind: Any, metadata: Mapping[str, Any], error: type[ValueError] = InputError
) -> Any:
    """A value as the type of its field, if it is allowed there.

    Whole floats are taken for whole numbers and texts of numbers for numbers, as YAML reads 5e-5 as a text; a single
    value is taken for a list of one.
    """
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in kinds:
        return None
    kinds = tuple(k for k in kinds if k is not type(None))
    limits, choices = metadata.get("limits", Limits()), metadata.get("choices", ())
    if choices and isinstance(value, str) and value in choices:
        return value
    for wanted in kinds:
        if typing.get_origin(wanted) in (list, tuple):
            origin, inner = typing.get_origin(wanted), typing.get_args(wanted)[0]
            several = value if isinstance(value, list | tuple | set) else [value]
            return origin(check_value(name, v, inner, metadata, error) for v in several)
        converted = _as_kind(value, wanted)
        if converted is not None:
            if isinstance(converted, str) and choices:
                break
            if isinstance(converted, bool) or not isinstance(converted, int | float) or limits.allow(converted):
                return converted
            break
    raise error(f"{name} is {shown(value)}; {_allowed(kinds, limits, choices)}")


def _as_kind(value: Any, wanted: Any) -> Any:
    """The value as this type; None if it is of another one."""
    if wanted is bool:
        return value if isinstance(value, bool) else None
    if wanted in (int, float):
        if isinstance(value, bool):
            return None
        try:
            number = float(value)
            if wanted is float:
                return number
            return int(value) if isinstance(value, int) else int(number) if number == int(number) else None
        except (TypeError, ValueError, OverflowError):
            return None
    if isinstance(wanted, type):
        return value if isinstance(value, wanted) else None
    return value


def _allowed(kinds: Sequence[Any], limits: Limits, choices: Sequence[str]) -> str:
    """What a field takes, in words."""
    if choices:
        return f"choose one of {', '.join((*(('True', 'False') if bool in kinds else ()), *choices))}"
    if bool in kinds:
        return "choose True or False"
    said = str(limits)
    if int in kinds or float in kinds:
        number = "a number" if float in kinds else "a whole number"
        return f"it must be {number}{f' of {said}' if said.startswith('at least') else f' {said}' if said else ''}"
    return f"it must be {'a string' if str in kinds else described_kinds(kinds)}"


def described_kinds(kinds: Sequence[Any]) -> str:
    """Types by their names, for messages."""
    return " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)


def described(value: Any) -> str:
    """What kind of value it is, for messages: "a list", "None"."""
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def short(text: Any) -> str:
    """The beginning of a text, or of a list of words, for messages."""
    text = text if isinstance(text, str) else " ".join(map(str, text))
    return text if len(text) <= 60 else text[:57] + "..."


def check_text(text: Any, what: str = "a text") -> str:
    """A text that can be answered.

    Raises:
        InputError: it is no string, is empty or blank, or is not valid Unicode.
    """
    if not isinstance(text, str):
        keys = f" with {printable(listed(text), limit=200)}" if isinstance(text, dict) and text else ""
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
