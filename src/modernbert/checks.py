"""One home for what a value must be: fields of options with types and limits, and checks of single values.

Options are frozen dataclasses. Each field is declared once by `option`, with its default, its limits and a sentence;
keyword arguments, their checks, help texts, flags and keys of files come from that. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import numbers
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

from modernbert.errors import InputError, listed, printable, shown


@dataclasses.dataclass(frozen=True)
class Limits:
    """Which numbers are allowed: `least` and `most` are allowed themselves, `above` and `below` are not."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def allow(self, value: float) -> bool:
        """Whether a number keeps all limits; NaN and infinite numbers keep none."""
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        named = (("at least", self.least), ("above", self.above), ("at most", self.most), ("below", self.below))
        spelled = [
            (name, str(bound) if isinstance(bound, int) else f"{bound:g}") for name, bound in named if bound is not None
        ]
        return " and ".join(map(" ".join, spelled))


def option(
    default: Any,
    sentence: str,
    *,
    choices: Sequence[str] = (),
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    otherwise: str = "",
    required: bool = False,
    flag: str = "",
) -> Any:
    """A field of a dataclass of options.

    Args:
        default: its value if it is not given.
        sentence: what it is and in which unit, for help texts.
        choices: the allowed texts, if they can be listed; beside them, values of the field's other types are allowed.
        least, most, above, below: limits of a number, or of each number of a list; see `Limits`.
        otherwise: what holds by default, in words, where the default value itself does not say it.
        required: whether it must be given.
        flag: its name on the command line, if that is another one.
    """
    known = {"help": sentence, "choices": tuple(choices), "limits": Limits(least, most, above, below)}
    metadata = {**known, "otherwise": otherwise, "required": required, "flag": flag}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class OptionField(NamedTuple):
    """What is known of one option, for whoever shows it or reads it: help texts, flags, schemas of requests."""

    name: str
    kind: Any  # the type, such as `int | None`
    default: Any
    help: str
    choices: tuple[str, ...]
    limits: Limits
    otherwise: str
    required: bool
    flag: str  # without dashes before it

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The types that a value may have, without None."""
        return tuple(kind for kind in _members(self.kind) if kind is not type(None))

    @property
    def is_list(self) -> bool:
        """Whether several values are taken."""
        return any(typing.get_origin(kind) in (list, tuple) for kind in self.kinds)

    @property
    def usual(self) -> str:
        """What holds by default, in words."""
        if self.otherwise or self.default in (None, [], (), {}):
            return self.otherwise or "none"
        if isinstance(self.default, bool):
            return "yes" if self.default else "no"
        return ", ".join(map(str, self.default)) if isinstance(self.default, list | tuple) else str(self.default)

    @property
    def described(self) -> str:
        """The sentence, with the allowed texts and the default."""
        are_named = all(choice in self.help for choice in self.choices)
        choices = "" if are_named else f" Choices: {', '.join(self.choices)}."
        return f"{self.help.rstrip('.')}.{choices} ({'required' if self.required else f'default: {self.usual}'})"


def fields_of(options: Any) -> list[OptionField]:
    """The options of a dataclass, in their order."""
    out = []
    for field in dataclasses.fields(options):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        known = {**_PLAIN, **field.metadata}
        known["flag"] = known["flag"] or field.name.replace("_", "-")
        out.append(OptionField(field.name, kinds_of(options)[field.name], default, **known))
    return out


_PLAIN = dict(option(None, "").metadata)


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
            if value is field.default and (value is None or isinstance(value, bool | str)):
                continue  # every call has many of these
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
        unknown = sorted(values.keys() - kinds.keys())
        if unknown:
            raise cls.error(f"{source} has no option {', '.join(unknown)}; {_offered(unknown, list(kinds))}")
        return cls.kept(**{k: v for k, v in values.items() if v is not None or type(None) in _members(kinds[k])})

    @classmethod
    def kept(cls, **values: Any) -> Self:
        """Options of keyword arguments; those that were made of the same values lately are given again."""
        try:
            return typing.cast(Self, _made(typing.cast(Any, cls), **values))
        except TypeError:  # a list or a dict among them
            return cls(**values)


@functools.lru_cache(maxsize=256, typed=True)  # a server's calls are all alike, and checking takes as long as a text
def _made(cls: type[Options], **values: Any) -> Options:
    return cls(**values)


_MANY = 20  # names that a message lists


def _offered(unknown: Sequence[str], known: Sequence[str]) -> str:
    """The names that there are; of many those that are like the unknown ones."""
    if len(known) <= _MANY:
        return f"there are {', '.join(known)}"
    alike = list(dict.fromkeys(name for one in unknown for name in difflib.get_close_matches(one, known, 3, 0.5)))
    return f"there are {', '.join(alike)}{' and ' * bool(alike)}{len(known) - len(alike)} others"


_KINDS: dict[type, dict[str, Any]] = {}  # reading annotations takes long beside checking values


def kinds_of(options: Any) -> dict[str, Any]:
    """The type of each field of a dataclass."""
    if options not in _KINDS:
        hints = typing.get_type_hints(options)
        _KINDS[options] = {field.name: hints[field.name] for field in dataclasses.fields(options)}
    return _KINDS[options]


@functools.cache
def _members(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


_OTHER = object()  # what a value of another type is converted to


def check_value(
    name: str, value: Any, kind: Any, metadata: Mapping[str, Any], error: type[ValueError] = InputError
) -> Any:
    """A value as the type of its field, if it is allowed there.

    Whole floats are taken for whole numbers and texts of numbers for numbers, as YAML reads 5e-5 as a text; 0 and 1
    for False and True; a single value for a list of one.
    """
    kinds = _members(kind)
    limits, choices = metadata.get("limits", Limits()), metadata.get("choices", ())
    for wanted in kinds:
        converted = _converted(value, wanted, limits, choices)
        if converted is not _OTHER:
            return converted
    raise error(f"{name} is {shown(value)}; {_allowed(kinds, limits, choices)}")


def _converted(value: Any, wanted: Any, limits: Limits, choices: Sequence[str]) -> Any:
    """The value as this type; `_OTHER` if it is of another type or not allowed."""
    if wanted is Any:
        return value
    if wanted is type(None):
        return None if value is None else _OTHER
    origin = typing.get_origin(wanted) or wanted
    if origin in (list, tuple):
        inner = typing.get_args(wanted)[0]
        several = value if isinstance(value, list | tuple | set) else [value]
        items = [_converted(item, inner, limits, choices) for item in several]
        return _OTHER if any(item is _OTHER for item in items) else origin(items)
    if origin is bool:
        return bool(value) if isinstance(value, bool | int) and value in (0, 1) else _OTHER
    if origin in (int, float):
        number = _number(value, origin)
        return number if number is not None and limits.allow(number) else _OTHER
    if origin is str and choices and isinstance(value, str):
        return next((text for text in (value, value.lower()) if text in choices), _OTHER)
    return value if isinstance(value, origin) else _OTHER


def _number(value: Any, wanted: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, numbers.Real | str):
        return None
    try:
        number = float(value)
        if wanted is float:
            return number
        return int(value) if isinstance(value, numbers.Integral) else int(number) if number == int(number) else None
    except (ValueError, OverflowError):
        return None


def _allowed(kinds: Sequence[Any], limits: Limits, choices: Sequence[str]) -> str:
    """What a field takes, in words."""
    several = [typing.get_args(kind)[0] for kind in kinds if typing.get_origin(kind) in (list, tuple)]
    single = [kind for kind in (*kinds, *several) if typing.get_origin(kind) not in (list, tuple)]
    single = [kind for kind in single if kind is not type(None) and not (kind is str and choices)]
    texts = [f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]] if choices else []
    if bool in single:
        return f"choose True, False or {texts[0]}" if texts else "choose True or False"
    if not single:
        return f"choose {texts[0]}" if texts else "it must be a list of lists"
    words = dict.fromkeys(_noun(kind, str(limits)) for kind in single)
    return f"it must be {' or '.join([*words, *texts, *(['a list of them'] if several else [])])}"


def _noun(kind: Any, limits: str) -> str:
    if kind in (int, float):
        noun = "a number" if kind is float else "a whole number"
        return f"{noun}{' of' if limits.startswith('at least') else ''} {limits}".rstrip()
    name = getattr(kind, "__name__", str(kind))
    return "a string" if kind is str else f"{_article(name)} {name}"


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiouAEIOU" else "a"


def parse_values(given: Sequence[str], place: str, form: str) -> dict[str, Any]:
    """Values by name of texts such as "top_k=3": JSON or one of Python's constants where it can be, and else a text.

    Args:
        given: the texts; a dash in a name counts as an underscore.
        place: where they were given, for messages.
        form: what one looks like, for messages.

    Raises:
        InputError: one is not of this form, or a name is there twice.
    """
    out: dict[str, Any] = {}
    for entry in given:
        name, equals, value = entry.partition("=")
        if not equals or not name:
            raise InputError(f"{place} {entry!r}: write {form}")
        name = name.replace("-", "_")
        if name in out:
            raise InputError(f"{place} {name} is given twice; give it once")
        try:
            out[name] = json.loads(value)
        except (ValueError, RecursionError):
            out[name] = {"True": True, "False": False, "None": None}.get(value, value)
    return out


def described(value: Any) -> str:
    """What kind of value it is, for messages: "a list", "None"."""
    name = type(value).__name__
    return "None" if value is None else f"{_article(name)} {name}"


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
