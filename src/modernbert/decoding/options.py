"""How to generate: one checked, frozen set of options."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from modernbert.errors import InputError, shown

logger = logging.getLogger(__name__)

_DEFAULT_NEW_TOKENS = 20
_MOST_FROM_FILE = 1024  # beams and sequences of a prompt that defaults may ask for
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_BEAMS = ("length_penalty", "early_stopping")
_LEAST = {  # of whole numbers
    "max_length": 1, "max_new_tokens": 1, "num_beams": 1, "num_return_sequences": 1, "min_new_tokens": 0, "top_k": 0,
    "no_repeat_ngram_size": 0, "pad_token_id": 0,
}  # fmt: skip
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How to generate.

    Args:
        max_length: tokens of prompt and continuation together, padding columns of the prompt included; 1, which no
            prompt fits under, asks for one new token.
        max_new_tokens: tokens of the continuation; 20 where neither is given.
        min_new_tokens: an end of text is not taken before this many.
        do_sample: draw tokens by their probability instead of taking the likeliest.
        temperature: scores are divided by it before drawing; above 0.
        top_k: draw among this many likeliest tokens; 0 among all.
        top_p: draw among the fewest likeliest tokens whose probabilities sum to this or more; in (0, 1].
        min_p: draw among tokens at least as likely as this share of the likeliest one's probability; in [0, 1].
        repetition_penalty: scores of tokens that occur already are divided by it (multiplied where negative).
        no_repeat_ngram_size: no tokens in a row of this length occur twice; 0 allows all.
        num_beams: continuations that beam search follows; 1 follows one.
        length_penalty: a beam's score is its log-probability over its length to this power.
        early_stopping: True ends a beam search once `num_beams` beams are finished; False once none that runs scores
            better than those as it is; "never" once none could.
        num_return_sequences: continuations of each prompt.
        eos_token_id: ids that end a text; empty never ends one.
        pad_token_id: what fills up texts that are shorter than the longest one.
        stop_strings: strings that end a text once its continuation holds one; they stay in it.
    """

    max_length: int | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    stop_strings: tuple[str, ...] = ()

    @classmethod
    def make(cls, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> GenerationOptions:
        """Options of what a caller gave, over a model's defaults; None means not given.

        Raises:
            InputError: an option is unknown or impossible, or two contradict each other.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise InputError(f"generate has no option {', '.join(unknown)}; there are {', '.join(names)}")
        given = {name: value for name, value in given.items() if value is not None}
        none = (None, -1)  # -1 is a file's way to write that there is no such id
        base = {
            name: value
            for name, value in defaults.items()
            if name in names and value not in (none if name.endswith("token_id") else none[:1])
        }
        for name in ("num_beams", "num_return_sequences"):
            value = base.get(name)
            if name not in given and isinstance(value, int) and value > _MOST_FROM_FILE:
                raise InputError(
                    f"{name} is {shown(value)} in the generation_config; it may ask for {_MOST_FROM_FILE} at most, so "
                    f"give {name} to generate"
                )
        if {"max_length", "max_new_tokens"} & set(given):
            base = {name: value for name, value in base.items() if name not in ("max_length", "max_new_tokens")}
        values = {**base, **given}
        for name, kind in (("eos_token_id", int), ("stop_strings", str)):
            value = values.get(name, ())
            if isinstance(value, kind):
                values[name] = (value,)
            elif isinstance(value, list | tuple):
                values[name] = tuple(value)
            else:
                raise InputError(f"{name} is {shown(value)}; give one or a list of them")
        options = cls(**values)
        options._check(set(given))
        return options

    def _check(self, given: set[str]) -> None:
        if {"max_length", "max_new_tokens"} <= given:
            raise InputError(
                f"max_length is {self.max_length} and max_new_tokens is {self.max_new_tokens}; give one of them"
            )
        for name, least in _LEAST.items():
            _whole(name, getattr(self, name), least)
        for i in self.eos_token_id:
            _whole("eos_token_id", i, 0)
        if not isinstance(self.do_sample, bool):
            raise InputError(f"do_sample is {shown(self.do_sample)}; choose True or False")
        _between("repetition_penalty", self.repetition_penalty, 0.0, open_below=True)
        _between("length_penalty", self.length_penalty, -100.0, 100.0)
        if self.do_sample:  # what is off means nothing
            _between("temperature", self.temperature, 0.0, open_below=True)
            _between("top_p", self.top_p, 0.0, 1.0, open_below=True)
            _between("min_p", self.min_p, 0.0, 1.0)
        if not self.do_sample and (off := [name for name in _SAMPLING if name in given]):
            raise InputError(f"{', '.join(off)} is for sampling, which is off; give do_sample=True too")
        if not isinstance(self.early_stopping, bool | str) or self.early_stopping not in (True, False, "never"):
            raise InputError(f"early_stopping is {shown(self.early_stopping)}; choose True, False or 'never'")
        if self.num_beams == 1 and (off := [name for name in _BEAMS if name in given]):
            raise InputError(f"{', '.join(off)} is for beam search, which is off; give num_beams too")
        if self.num_return_sequences > 1 and not self.do_sample and self.num_return_sequences > self.num_beams:
            raise InputError(
                f"num_return_sequences is {self.num_return_sequences}; without do_sample=True there are as many "
                f"different ones as num_beams, {self.num_beams}"
            )
        if self.num_beams > 1 and self.num_return_sequences > self.num_beams:
            raise InputError(
                f"num_return_sequences is {self.num_return_sequences}; a beam search keeps num_beams, {self.num_beams}"
            )
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise InputError(
                f"min_new_tokens is {self.min_new_tokens} and max_new_tokens is {self.max_new_tokens}, which is less"
            )
        if not all(isinstance(s, str) and s for s in self.stop_strings):
            raise InputError(f"stop_strings is {shown(list(self.stop_strings))}; give strings with something in them")

    def new_tokens(self, columns: int) -> int:
        """How many tokens to add at the most to prompts of this many columns.

        Raises:
            InputError: `max_length` leaves no room.
        """
        if self.max_length is None or self.max_new_tokens is not None:
            return self.max_new_tokens or _DEFAULT_NEW_TOKENS
        if self.max_length == 1:
            logger.warning("max_length=1 is shorter than any prompt; one new token is generated")
            return 1
        if self.max_length <= columns:
            raise InputError(
                f"max_length is {self.max_length} and the prompt has {columns} tokens already; give a larger one, or "
                "max_new_tokens"
            )
        if self.max_length - columns < self.min_new_tokens:
            raise InputError(
                f"min_new_tokens is {self.min_new_tokens}; max_length {self.max_length} leaves room for "
                f"{self.max_length - columns} after the prompt"
            )
        return self.max_length - columns


def shows_options(function: Function) -> Function:
    """Let `help` and `inspect.signature` show each option of a function that takes `GenerationOptions` by keyword."""
    own = list((signature := inspect.signature(function)).parameters.values())
    keyword = inspect.Parameter.KEYWORD_ONLY
    first = next(place for place, parameter in enumerate(own) if parameter.kind is keyword)
    options = [
        inspect.Parameter(field.name, keyword, default=None, annotation=_given(str(field.type)))
        for field in dataclasses.fields(GenerationOptions)
    ]
    vars(function)["__signature__"] = signature.replace(parameters=[*own[:first], *options, *own[first:]])
    return function


def _given(kind: str) -> str:
    """What a caller may give for a field of this type: one instead of several, and None for the default."""
    kind = re.sub(r"tuple\[(\w+), \.\.\.\]", r"\1 | Sequence[\1]", kind)
    return kind if kind.endswith("None") else f"{kind} | None"


def _whole(name: str, value: Any, least: int) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        raise InputError(f"{name} is {shown(value)}; it must be a whole number of at least {least}")


def _between(name: str, value: Any, low: float, high: float | None = None, open_below: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
    if not number or not (value > low if open_below else value >= low) or (high is not None and value > high):
        most = "" if high is None else f", at most {high:g}"
        raise InputError(f"{name} is {shown(value)}; it must be {'above' if open_below else 'at least'} {low:g}{most}")
