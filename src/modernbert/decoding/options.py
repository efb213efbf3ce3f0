"""How to generate: one checked, frozen set of options."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any, Self, TypeVar

from modernbert.checks import Options, fields_of, option
from modernbert.errors import InputError, shown

logger = logging.getLogger(__name__)

_DEFAULT_NEW_TOKENS = 20
_MOST_FROM_FILE = 1024  # beams and sequences of a prompt that defaults may ask for
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_BEAMS = ("length_penalty", "early_stopping", "num_beam_groups", "diversity_penalty")
_LENGTHS = ("max_length", "max_new_tokens")
_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
# What generate takes elsewhere and what has no meaning here: accepted, because it changes no token.
NO_EFFECT = {
    name: why
    for why, names in {
        "the cache is laid out by this library": "cache_implementation cache_config max_cache_len prefill_chunk_size "
        "low_memory cache_position",
        "steps run as they always do": "compile_config disable_compile synced_gpus continuous_batching_config use_mtp",
        "as many tokens are guessed as were right before": "assistant_early_exit assistant_confidence_threshold "
        "is_assistant assistant_ensemble_weight assistant_lookbehind target_lookbehind assistant_tokenizer "
        "speculation_type num_assistant_tokens_schedule",
        "the last token alone is scored": "logits_to_keep num_logits_to_keep",
        "there is no encoder": "decoder_start_token_id",
        "a prompt begins a text": "bos_token_id",
        "no loss is computed": "labels",
        "nothing is downloaded": "trust_remote_code",
    }.items()
    for name in names.split()
}
# And what would mislead: refused, with what to do instead.
REFUSED = {
    "custom_generate": "generate runs no code of others; give logits_processor and stopping_criteria",
    "penalty_alpha": "contrastive search is not served; sample with top_k, or leave it out",
    "dola_layers": "contrasting layers is not served; leave it out",
    "constraints": "constrained beam search is not served; give prefix_allowed_tokens_fn",
    "force_words_ids": "constrained beam search is not served; give prefix_allowed_tokens_fn or sequence_bias",
    "watermarking_config": "watermarks are not served; give a logits_processor that makes them",
    "token_healing": "prompts are gone on with as they are; leave their last token out before the call",
    "top_h": "it is not served; give top_p, min_p or typical_p",
}
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
    min_length: int = option(
        0, "Do not end a text before prompt and continuation have this many tokens; min_new_tokens wins.", least=0
    )
    max_time: float | None = option(None, "End all texts after the step that passes this many seconds.", least=0)
    typical_p: float = option(
        1.0, "Draw only among the tokens of the most typical surprise that together reach this.", above=0, most=1
    )
    epsilon_cutoff: float = option(0.0, "Draw only among tokens of at least this probability.", least=0, below=1)
    eta_cutoff: float = option(
        0.0, "Likewise, with a bound that falls where many tokens are possible.", least=0, below=1
    )
    encoder_repetition_penalty: float = option(
        1.0, "Multiply the scores of the prompt's tokens by this; divide negative ones.", above=0
    )
    encoder_no_repeat_ngram_size: int = option(
        0, "Never repeat a sequence of this many tokens of the prompt; 0 allows it.", least=0
    )
    bad_words_ids: tuple[tuple[int, ...], ...] = option((), "Sequences of ids that never occur.", least=0)
    sequence_bias: Any = option(
        None, "What to add to the score of the last id of sequences of ids: pairs of ids and number, or a mapping."
    )
    suppress_tokens: tuple[int, ...] = option((), "Ids that never occur.", least=0)
    begin_suppress_tokens: tuple[int, ...] = option((), "Ids that no continuation begins with.", least=0)
    forced_bos_token_id: int | None = option(None, "Id that follows prompts of one token.", least=0)
    forced_eos_token_id: tuple[int, ...] = option((), "Ids of which one is the last where length ends a text.", least=0)
    exponential_decay_length_penalty: tuple[float, ...] = option(
        (), "After this many new tokens the end becomes likelier: a number of tokens, and a factor a token."
    )
    guidance_scale: float | None = option(
        None, "How far to move scores away from those without the prompt, or after negative_prompt_ids; 1 is not."
    )
    num_beam_groups: int = option(1, "Groups of beams, each kept from repeating what those before it chose.", least=1)
    diversity_penalty: float = option(0.0, "Taken from a token's score for each earlier group's beam with it.")
    renormalize_logits: bool = option(False, "Make log-probabilities of the scores that remain.")
    prompt_lookup_num_tokens: int = option(
        0,
        "Guess up to this many tokens ahead, by where the last ones stood before; the text is the same, and comes "
        "sooner where it repeats itself or its prompt. On a CPU with compiled kernels.",
        least=0,
    )
    max_matching_ngram_size: int = option(
        2, "How many of the last tokens prompt_lookup_num_tokens looks for, at the most.", least=1
    )
    num_assistant_tokens: int = option(
        20, "How many tokens the assistant_model of generate guesses at a time, at the most.", least=1
    )
    remove_invalid_values: bool = option(False, "Take 0 for scores that are NaN, and the largest number for infinite.")

    @classmethod
    def make(cls, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> Self:
        """Options of what a caller gave, over a model's defaults.

        None means not given; of what limits sampling it means no limit, as in transformers. Options for sampling or
        beams that are off are dropped with a warning, as are arguments without a meaning here.

        Raises:
            InputError: an option is unknown, refused or impossible, or two contradict each other.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        unlimited = {name: 0 if name == "top_k" else getattr(cls, name) for name in _SAMPLING}
        given = {name: unlimited.get(name) if value is None else _plain(value) for name, value in given.items()}
        given = {name: value for name, value in given.items() if value is not None}
        if given.get("eos_token_id") in (-1, [-1]):  # no id, so that nothing ends a text
            given["eos_token_id"] = []
        given = {name: value for name, value in given.items() if name in names or not has_no_meaning(name, value)}
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
        if {*_LENGTHS} <= given.keys():
            logger.warning("max_new_tokens and max_length are given; max_new_tokens counts")
            del given["max_length"]
        if "min_new_tokens" in (given if "min_length" in given else {**base, **given}):
            if given.pop("min_length", 0):
                logger.warning("min_new_tokens and min_length are given; min_new_tokens counts")
            base.pop("min_length", None)
        yields = _LENGTHS if {*_LENGTHS} & {*given} else ()
        for dependent, switch, on in (
            (_SAMPLING, "do_sample=True", given.get("do_sample", base.get("do_sample"))),
            (_BEAMS, "num_beams", given.get("num_beams", base.get("num_beams", 1)) != 1),
            (_OUTPUTS, "return_dict_in_generate=True", any(d.get("return_dict_in_generate") for d in (given, base))),
        ):
            if not on:
                yields = (*yields, *dependent)  # what is off means nothing
                off = [n for n in dependent if n in given and given.pop(n) not in (False, getattr(cls, n, None))]
                if off:
                    logger.warning("%s: without effect; give %s too", ", ".join(off), switch)
        options = cls.of({name: value for name, value in base.items() if name not in yields} | given, "generate")
        options._check()
        return options

    def _check(self) -> None:
        beams, sequences = self.num_beams, self.num_return_sequences
        if sequences > beams and not self.do_sample:
            raise InputError(
                f"num_return_sequences is {sequences}; without do_sample=True there are as many different ones as "
                f"num_beams, {beams}"
            )
        if sequences > beams > 1:
            raise InputError(f"num_return_sequences is {sequences}; a beam search keeps num_beams, {beams}")
        if beams % self.num_beam_groups or (self.num_beam_groups > 1 and self.do_sample):
            raise InputError(
                f"num_beam_groups is {self.num_beam_groups}; it must divide num_beams, {beams}, and groups do not draw"
            )
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise InputError(
                f"min_new_tokens is {self.min_new_tokens} and max_new_tokens is {self.max_new_tokens}, which is less"
            )
        if not all(self.stop_strings):
            raise InputError(f"stop_strings is {shown(list(self.stop_strings))}; give strings with something in them")
        if not all(self.bad_words_ids):
            raise InputError("bad_words_ids holds an empty list; give lists of at least one id")
        if len(self.exponential_decay_length_penalty) not in (0, 2):
            raise InputError("exponential_decay_length_penalty takes two numbers: new tokens, and a factor")
        _ = self.biases

    @functools.cached_property
    def biases(self) -> list[tuple[tuple[int, ...], float]]:
        """Sequences of ids, and what is added to the score of the last one after the others."""
        given = self.sequence_bias or {}
        try:
            pairs = given.items() if isinstance(given, Mapping) else given
            found = {tuple(int(i) for i in ids): float(bias) for ids, bias in pairs}
        except (TypeError, ValueError):
            found = {(): 0.0}
        if not all(ids and min(ids) >= 0 for ids in found):
            raise InputError(f"sequence_bias is {shown(given)}; give pairs of a list of ids and a number")
        ends = [(i,) for i in self.eos_token_id]  # a text may always end
        return [*found.items()] + [(ids, float("-inf")) for ids in self.bad_words_ids if ids not in ends]

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions(GenerationOptions):
    """`GenerationOptions`, and what a call of `generate` returns."""

    use_cache: bool = option(True, "False reads each text anew for every token.")
    return_dict_in_generate: bool = option(False, "Return a `GenerateOutput`.")
    output_scores: bool = option(False, "With that, keep the scores of every step, as tokens were chosen by.")
    output_logits: bool = option(False, "Likewise, as the model gave them.")
    output_attentions: bool = option(False, "Likewise the attention weights, which take a pass of their own.")
    output_hidden_states: bool = option(False, "Likewise the hidden states.")


def _plain(value: Any) -> Any:
    """Tensors and arrays of ids as lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def has_no_meaning(name: str, value: Any) -> bool:
    """Whether an argument of transformers changes nothing here, which is logged; raises where it would."""
    if name in REFUSED and value:
        raise InputError(f"{name} is {shown(value)}; {REFUSED[name]}")
    if name in NO_EFFECT and value:
        logger.warning("%s changes nothing: %s", name, NO_EFFECT[name])
    return name in REFUSED or name in NO_EFFECT


def shows_options(options: type[GenerationOptions]) -> Callable[[Function], Function]:
    """Let `help` and `inspect.signature` show each of these options of a function that takes them by keyword."""

    def show(function: Function) -> Function:
        own = list((signature := inspect.signature(function)).parameters.values())
        keyword = inspect.Parameter.KEYWORD_ONLY
        first = next(place for place, parameter in enumerate(own) if parameter.kind is keyword)
        shown = [
            inspect.Parameter(field.name, keyword, default=None, annotation=_given(str(field.type)))
            for field in dataclasses.fields(options)
        ]
        vars(function)["__signature__"] = signature.replace(parameters=[*own[:first], *shown, *own[first:]])
        return function

    return show


def _given(kind: str) -> str:
    """What a caller may give for a field of this type: one instead of several, and None for the default."""
    kind = kind.replace("tuple[tuple[int, ...], ...]", "Sequence[Sequence[int]]")
    kind = re.sub(r"tuple\[(\w+), \.\.\.\]", r"\1 | Sequence[\1]", kind)
    return kind if kind.endswith(("None", "Any")) else f"{kind} | None"
