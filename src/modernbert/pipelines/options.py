"""The options of each task's calls: arguments in Python, flags on the command line. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
import logging
import typing
from collections.abc import Mapping
from typing import Any

from modernbert.checks import Options, fields_of, kinds_of, option
from modernbert.decoding.options import GenerationOptions
from modernbert.errors import InputError, listed, shown

logger = logging.getLogger(__name__)

# As `text.encoding` and `nn.pooling` have them, which import torch.
_TRUNCATIONS = ("longest_first", "only_first", "only_second", "do_not_truncate")
_POOLINGS = ("cls", "mean", "max", "last", "weighted_mean", "mean_sqrt_len")


def _truncation(otherwise: str) -> Any:
    said = "Cut texts that are longer than the model's context, instead of refusing them; a name says how to cut pairs"
    return option(None, said, choices=_TRUNCATIONS, otherwise=otherwise)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchOptions(Options):
    """How much is computed together; answers do not depend on it."""

    batch_tokens: int | None = option(
        None, "Most tokens in a forward pass.", least=1, otherwise="4,096 on a CPU, 65,536 on a GPU"
    )
    batch_size: int | None = option(None, "Most rows in a forward pass.", least=1, otherwise="no limit")


_AS_LAYOUT = "yes for folders of sentence-transformers, no for others"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CuttingOptions(Options):
    truncation: bool | str | None = _truncation("no, but yes with max_length")
    max_length: int | None = option(None, "Longest text in tokens.", least=1, otherwise="the model's context")
    padding: Any = option(None, "Has no effect, because nothing is padded.", otherwise="none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizeOptions(CuttingOptions):
    add_special_tokens: bool = option(True, "Add the special tokens around a text.")

    @property
    def tokenizing(self) -> dict[str, Any]:
        """These options alone."""
        return {name: getattr(self, name) for name in kinds_of(TokenizeOptions)}


# What callers of transformers' pipelines give and has no effect here -> the values that mean nothing, and the reason.
_IDLE: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_workers": ((None, 0), "texts are tokenized in this process"),
    "trust_remote_code": ((None, False), "no code of a repository is ever executed"),
    "use_fast": ((None, True), "there is one tokenizer, the fast one"),
    "binary_output": ((None, False), "answers are values of Python"),
    "timeout": ((None,), "texts are tokenized in this process"),
    "padding": ((None, False), "nothing is padded"),
    "truncation": ((None, False), "a long text is read in windows"),
}
_OF_OTHERS = {  # what makes sense elsewhere alone -> what it may be
    "framework": (None, "pt"),
    **dict.fromkeys(("feature_extractor", "image_processor", "processor", "modelcard", "pipeline_class"), (None,)),
}
_DICTS = ("tokenizer_kwargs", "tokenize_kwargs")
_WINDOWED = ("question-answering", "text-scoring")


def own_options(values: Mapping[str, Any], task: str, options: type[Options]) -> dict[str, Any]:
    """A task's own options, of all that a caller gave; what has no effect is logged.

    Those of tokenizing may come in a dict. None is left out where it is no value of the option.
    """
    fields = kinds_of(options)
    out: dict[str, Any] = {}
    for name, value in values.items():
        if name in fields:
            out |= {name: value} if value is not None or type(None) in typing.get_args(fields[name]) else {}
        elif name in _IDLE and (name != "truncation" or task in _WINDOWED):
            if value not in _IDLE[name][0]:
                logger.info("%s has no effect on %s: %s", name, task, _IDLE[name][1])
        elif name not in _OF_OTHERS and name not in _DICTS:
            out[name] = value  # which is refused as unknown
        elif value not in _OF_OTHERS.get(name, (value,)):
            known = " or ".join(map(str, _OF_OTHERS[name]))
            raise InputError(f"{name} is {shown(value)}; {task} takes texts and runs in PyTorch: it must be {known}")
    # Elsewhere max_length is of something else.
    names = [one for one in kinds_of(TokenizeOptions) if one != "max_length" or issubclass(options, CuttingOptions)]
    for given in _DICTS:
        more = {} if values.get(given) is None else values[given]
        if not isinstance(more, Mapping):
            raise InputError(f"{given} is {shown(more)}; give a dict of {', '.join(names)}")
        if unknown := sorted(set(more) - set(names)):
            raise InputError(f"{given} has no option {listed(unknown)}; there are {', '.join(names)}")
        if twice := [one for one in more if out.get(one) is not None]:
            raise InputError(f"{twice[0]} is given twice, as an argument and in {given}; give it once")
        out |= own_options(more, task, options) if more else {}
    return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class FillMaskOptions(TokenizeOptions):
    top_k: int = option(5, "Number of answers for each mask.", least=1)
    targets: list[str] | None = option(None, "Consider only these words.", otherwise="all", flag="target")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextClassificationOptions(TokenizeOptions):
    top_k: int | str | None = option(
        "best",
        "Number of labels to give, as a list with the best first.",
        choices=("best",),
        least=1,
        otherwise="the best one, not in a list",
    )
    function_to_apply: str | None = option(
        None,
        "How the model's logits become scores",
        choices=("sigmoid", "softmax", "none"),
        otherwise="softmax for several labels, sigmoid for one label or if several can apply, none for regression",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroShotClassificationOptions(TokenizeOptions):
    candidate_labels: str | list[str] | None = option(
        None, "The labels to choose from; one string may hold several with commas between.", required=True, flag="label"
    )
    hypothesis_template: str = option("This example is {}.", "Sentence to test for each label, which replaces {}.")
    multi_label: bool = option(False, "Score each label independently; otherwise scores add up to 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenClassificationOptions(CuttingOptions):
    aggregation_strategy: str = option(
        "none",
        "How tokens are joined to entities. none: not at all; simple: neighbours with the same label; first, average, "
        "max: first each word gets one label, by its first token, its tokens' mean score, or its highest score",
        choices=("none", "simple", "first", "average", "max"),
    )
    ignore_labels: list[str] = option(["O"], "Labels to leave out of the answer.")
    is_split_into_words: bool = option(
        False, "Texts are lists of words; start and end are places in the words joined by delimiter."
    )
    delimiter: str = option(" ", "Text between the words that is_split_into_words gives.", otherwise="a space")
    truncation: bool | str | None = _truncation("no, but yes with max_length; long texts are read in windows")
    stride: int | None = option(
        None,
        "Tokens shared by neighbouring windows of a long text.",
        least=0,
        otherwise="128, at most a quarter of a window",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionAnsweringOptions(Options):
    top_k: int = option(1, "Number of answers to a question; several come as a list.", least=1)
    max_seq_len: int | None = option(
        None,
        "Longest window in tokens, the question included; a longer context is read in several.",
        least=1,
        otherwise="384, at most the model's context",
    )
    doc_stride: int | None = option(
        None,
        "Tokens shared by neighbouring windows of a long context.",
        least=0,
        otherwise="128, at most half a window",
    )
    max_question_len: int | None = option(
        None, "Longest question in tokens.", least=1, otherwise="what leaves room for the context"
    )
    max_answer_len: int = option(15, "Longest answer in tokens.", least=1)
    handle_impossible_answer: bool = option(False, 'Allow the answer "", meaning that the context holds none.')
    align_to_words: bool = option(True, "Extend answers to whole words.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultipleChoiceOptions(TokenizeOptions):
    pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureExtractionOptions(TokenizeOptions):
    return_tensors: bool | str = option(False, "Return a tensor instead of nested lists", choices=("pt",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentenceEmbeddingOptions(TokenizeOptions):
    prompt_name: str | None = option(
        None, "Name of the checkpoint's prompt before each text, such as query.", otherwise="the checkpoint's own"
    )
    prompt: str | None = option(None, "Prompt before each text.", otherwise="that of prompt_name")
    pooling: str | None = option(
        None, "How the tokens' states become one vector", choices=_POOLINGS, otherwise="the checkpoint's, or mean"
    )
    normalize: bool | None = option(
        None, "Scale vectors to length one.", otherwise="the checkpoint's setting; yes with multi_vector"
    )
    truncate_dim: int | None = option(
        None,
        "Keep only this many dimensions, the first ones, for checkpoints trained for it (Matryoshka).",
        least=1,
        otherwise="the checkpoint's, or all",
    )
    multi_vector: bool | None = option(
        None, "Return a vector of length one for every token (late interaction).", otherwise="the checkpoint's setting"
    )
    truncation: bool | str | None = _truncation(_AS_LAYOUT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseEmbeddingOptions(TokenizeOptions):
    is_query: bool = option(False, "Encode texts as queries, and not as documents.")
    top_k: int | None = option(None, "Most weights of a text.", least=1, otherwise="the checkpoint's, or all")
    form: str = option("arrays", "What each text gives", choices=("arrays", "tokens"))
    prompt_name: str | None = option(
        None, "Name of the checkpoint's prompt before each text.", otherwise="query or document where there are these"
    )
    prompt: str | None = option(None, "Prompt before each text.", otherwise="that of prompt_name")
    truncation: bool | str | None = _truncation(_AS_LAYOUT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LateInteractionOptions(CuttingOptions):
    is_query: bool = option(False, "Encode texts as queries, and not as documents.")
    pool_factor: float | None = option(
        None,
        "Keep one vector for so many tokens of a document, those of similar ones averaged.",
        least=1,
        otherwise="the checkpoint's, or 1",
    )
    prompt_name: str | None = option(
        None, "Name of the checkpoint's prompt before each text.", otherwise="query or document where there are these"
    )
    prompt: str | None = option(None, "Prompt before each text.", otherwise="that of prompt_name")
    truncation: bool | str | None = _truncation("yes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankingOptions(TokenizeOptions):
    top_k: int | None = option(None, "Number of documents to return, the best first.", least=1, otherwise="all")
    truncation: bool | str | None = _truncation(_AS_LAYOUT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossEncoderOptions(RankingOptions):
    activation: str = option(
        "sigmoid",
        "How a cross-encoder's logits become scores",
        choices=("sigmoid", "none", "tanh"),
        otherwise="the checkpoint's, or sigmoid",
    )
    prompt: str = option("", "Prompt before the query of a cross-encoder.", otherwise="the checkpoint's")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextScoringOptions(Options):
    max_length: int | None = option(
        None, "Longest window in tokens; a longer text is read in several.", least=2, otherwise="the model's context"
    )
    stride: int | None = option(
        None, "New tokens that each window after the first scores.", least=1, otherwise="half a window"
    )
    add_special_tokens: bool = option(True, "Add the special tokens around a text.")
    token_scores: bool = option(
        False, "Give each scored token's place in the text and its part of the log-likelihood, too."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContinuationOptions(Options):
    truncation: bool | str | None = _truncation("no; with yes, a prompt is cut to the context")
    return_full_text: bool | None = option(None, "Return the prompt too, before its continuation.", otherwise="yes")
    return_tensors: bool = option(False, "Return the ids of tokens instead of text.")
    stop_sequence: str | list[str] | None = option(None, "The same as stop_strings.", otherwise="none")
    seed: int | None = option(
        None,
        "Random seed; with it a text does not depend on the others of its batch.",
        least=0,
        most=2**32 - 1,
        otherwise="none: texts differ each time",
    )
    add_special_tokens: bool | None = option(None, "Add the special tokens to the prompt.", otherwise="yes")
    prefix: str = option("", "Text before each prompt, which is not returned.")
    clean_up_tokenization_spaces: bool = option(False, "Take out the space before punctuation.")
    generation_config: Any = option(None, "A GenerationConfig with options.")
    logits_processor: Any = option(None, "Callables that take ids and scores and return scores.")
    stopping_criteria: Any = option(None, "Callables that take ids and say which texts end.")
    prefix_allowed_tokens_fn: Any = option(None, "Takes the number of a text and ids, returns allowed ids.")
    streamer: Any = option(None, "Gets the ids of one text as they come, such as a TextStreamer.")
    assistant_model: Any = option(None, "A smaller decoder with the same vocabulary, which guesses tokens ahead.")


_USUAL = {
    "max_length": "not limited",
    "max_new_tokens": "256, at most to the end of the context",
    "do_sample": "yes",
    "temperature": "0.7",
    "eos_token_id": "the model's",
    "pad_token_id": "the model's",
}


def _not_given() -> list[tuple[str, Any, Any]]:
    """The fields of `GenerationOptions`, None where the checkpoint's own values count."""
    fields = []
    for field in fields_of(GenerationOptions):
        usual = _USUAL.get(field.name, field.usual)
        metadata = {"help": field.help, "choices": field.choices, "limits": field.limits, "otherwise": usual}
        kind = field.kind if field.kind is Any else field.kind | None
        fields.append((field.name, kind, dataclasses.field(default=None, metadata=metadata)))
    return fields


TextGenerationOptions: type[ContinuationOptions] = dataclasses.make_dataclass(
    "TextGenerationOptions", _not_given(), bases=(ContinuationOptions,), frozen=True, kw_only=True
)

# The options of each task; text-ranking by vectors has those of `RankingOptions` alone.
OPTIONS: dict[str, type[Options]] = {
    "fill-mask": FillMaskOptions,
    "text-classification": TextClassificationOptions,
    "zero-shot-classification": ZeroShotClassificationOptions,
    "token-classification": TokenClassificationOptions,
    "question-answering": QuestionAnsweringOptions,
    "multiple-choice": MultipleChoiceOptions,
    "feature-extraction": FeatureExtractionOptions,
    "sentence-embedding": SentenceEmbeddingOptions,
    "sparse-embedding": SparseEmbeddingOptions,
    "late-interaction": LateInteractionOptions,
    "text-ranking": CrossEncoderOptions,
    "text-generation": TextGenerationOptions,
    "text-scoring": TextScoringOptions,
}
