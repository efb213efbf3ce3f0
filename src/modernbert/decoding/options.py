"""How to generate: one checked, frozen set of options."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from modernbert.checks import Options, fields_of, option
from modernbert.errors import InputError, shown

logger = logging.getLogger(__name__)

_DEFAULT_NEW_TOKENS = 20
_MOST_FROM_FILE = 1024  # beams and sequences of a prompt that defaults may ask for
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_BEAMS = ("length_penalty", "early_stopping")
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationOptions(Options):
    """How to generate."""

    max_length: int | None = option(
        None,
        "Most tokens of prompt and continuation together, the prompt's padding included; 1 asks for one new token.",
        least=1,
    )
    max_new_tokens: int | None = option(
        None, "Most tokens of the continuation.", least=1, otherwise="20, unless max_length is given"
    )
    min_new_tokens: int = option(0, "Do not end a text before this many new tokens.", least=0)
    do_sample: bool = option(False, "Draw tokens by their probability, instead of always taking the likeliest.")
    temperature: float = option(1.0, "Divide scores by this; lower values draw likelier tokens.", above=0)
    top_k: int = option(50, "Draw only among this many likeliest tokens; 0 means among all.", least=0)
    top_p: float = option(
        1.0, "Draw only among the likeliest tokens whose probabilities together reach this.", above=0, most=1
    )
    min_p: float = option(
        0.0, "Draw only among tokens with at least this share of the likeliest token's probability.", least=0, most=1
    )
    repetition_penalty: float = option(
        1.0, "Divide the scores of tokens that occurred already by this; multiply negative ones.", above=0
    )
    no_repeat_ngram_size: int = option(0, "Never repeat a sequence of this many tokens; 0 allows it.", least=0)
    num_beams: int = option(1, "Number of beams; 1 means no beam search.", least=1)
    length_penalty: float = option(
        1.0, "Divide a beam's log-probability by its length to this power.", least=-100, most=100
    )
    early_stopping: bool | str = option(
        False,
        'End a beam search once num_beams beams are finished, even if an unfinished one scores better; "never" '
        "continues until none can.",
        choices=("never",),
    )
    num_return_sequences: int = option(1, "Number of continuations of each prompt.", least=1)
    eos_token_id: tuple[int, ...] = option((), "Ids of the tokens that end a text.", least=0)
    pad_token_id: int | None = option(None, "Id of the token that pads shorter texts.", least=0)
    stop_strings: tuple[str, ...] = option(
        (), "Strings that end a text once its continuation holds one; they stay in it."
    )

    @classmethod
    def make(cls, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> GenerationOptions:
        """Options of what a caller gave, over a model's defaults; None means not given.

        Raises:
            InputError: an option is unknown or impossible, or two contradict each other.
        """
        names = [field.name for field in dataclasses.fields(cls)]
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
        yields = ("max_length", "max_new_tokens") if {"max_length", "max_new_tokens"} & {*given} else ()
        if not given.get("do_sample", base.get("do_sample")):
            yields = (*yields, *_SAMPLING)  # what is off means nothing
        options = cls.of({name: value for name, value in base.items() if name not in yields} | given, "generate")
        options._check({*given})
        return options

    def _check(self, given: set[str]) -> None:
        if {"max_length", "max_new_tokens"} <= given:
            raise InputError(
                f"max_length is {self.max_length} and max_new_tokens is {self.max_new_tokens}; give one of them"
            )
        if not self.do_sample and (off := [name for name in _SAMPLING if name in given]):
            raise InputError(f"{', '.join(off)} is for sampling, which is off; give do_sample=True too")
        if self.num_beams == 1 and (off := [name for name in _BEAMS if name in given]):
            raise InputError(f"{', '.join(off)} is for beam search, which is off; give num_beams too")
        beams, sequences = self.num_beams, self.num_return_sequences
        if sequences > beams and not self.do_sample:
            raise InputError(
                f"num_return_sequences is {sequences}; without do_sample=True there are as many different ones as "
                f"num_beams, {beams}"
            )
        if sequences > beams > 1:
            raise InputError(f"num_return_sequences is {sequences}; a beam search keeps num_beams, {beams}")
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise InputError(
                f"min_new_tokens is {self.min_new_tokens} and max_new_tokens is {self.max_new_tokens}, which is less"
            )
        if not all(self.stop_strings):
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


GenerationOptions.__doc__ = "\n".join(
    [
        "How to generate.\n\nArgs:",
        *(f"    {field.name}: {field.described}" for field in fields_of(GenerationOptions)),
        "\nRaises:\n    InputError: an option is impossible.",
    ]
)


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
