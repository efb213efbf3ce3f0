"""The options of each task's calls: arguments in Python, flags on the command line. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
from typing import Any

from modernbert.checks import Options, fields_of, option
from modernbert.decoding.options import GenerationOptions

# As `text.encoding` and `nn.pooling` have them, which import torch.
_TRUNCATIONS = ("longest_first", "only_first", "only_second", "do_not_truncate")
_POOLINGS = ("cls", "mean", "max", "last", "weighted_mean", "mean_sqrt_len")


def _truncation(default: bool | None = False, otherwise: str = "") -> Any:
    said = "Cut texts that are longer than the model's context instead of refusing them; or how to cut pairs"
    return option(default, said, choices=_TRUNCATIONS, otherwise=otherwise)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchOptions(Options):
    """How much is computed together; answers do not depend on it."""

    batch_tokens: int | None = option(
        None, "Tokens of a forward pass.", least=1, otherwise="4,096 on a CPU, 65,536 on a GPU"
    )
    batch_size: int | None = option(None, "Most rows of a forward pass.", least=1, otherwise="as batch_tokens allow")


_AS_LAYOUT = "yes for folders of sentence-transformers, no for others"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CuttingOptions(Options):
    truncation: bool | str | None = _truncation(None, "no, but yes with max_length")
    max_length: int | None = option(None, "Longest text in tokens.", least=1, otherwise="the model's context")
    padding: Any = option(None, "Has no effect, because nothing is padded.", otherwise="none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizeOptions(CuttingOptions):
    add_special_tokens: bool = option(True, "Add the special tokens around a text.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FillMaskOptions(Options):
    top_k: int = option(5, "Answers for each mask.", least=1)
    targets: list[str] | None = option(None, "The only words to consider.", otherwise="all", flag="target")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextClassificationOptions(CuttingOptions):
    top_k: int | str | None = option(
        "best",
        "Labels of a text, as a list with the best one first; None gives all of them.",
        choices=("best",),
        least=1,
        otherwise="the best one, by itself",
    )
    function_to_apply: str | None = option(
        None,
        "What makes scores of the model's logits",
        choices=("sigmoid", "softmax", "none"),
        otherwise="softmax for several labels, sigmoid for one or where they do not exclude one another, none for "
        "regression",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroShotClassificationOptions(Options):
    candidate_labels: str | list[str] | None = option(
        None, "The labels to choose from; one string may hold several with commas between.", required=True, flag="label"
    )
    hypothesis_template: str = option("This example is {}.", "Makes a sentence of a label, which stands for {}.")
    multi_label: bool = option(False, "Score each label by itself, instead of sharing one probability among all.")
    truncation: bool | str = _truncation()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenClassificationOptions(Options):
    aggregation_strategy: str = option(
        "none",
        "How tokens make entities. none: each token by itself; simple: neighbours with one label; first, average and "
        "max: a word gets one label first, of its first token, of the mean of its tokens, or of the surest one",
        choices=("none", "simple", "first", "average", "max"),
    )
    ignore_labels: list[str] = option(["O"], "Labels that are left out.")
    is_split_into_words: bool = option(
        False, "A text is a list of words; characters are counted in the words joined by the delimiter."
    )
    delimiter: str = option(" ", "What joins words.", otherwise="a space")
    stride: int | None = option(
        None,
        "Tokens that neighbouring windows of a long text share.",
        least=0,
        otherwise="128, at most a quarter of a window",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionAnsweringOptions(Options):
    top_k: int = option(1, "Answers to a question; several come as a list.", least=1)
    max_seq_len: int | None = option(
        None,
        "Tokens of a window, question and special tokens included; a longer context is read in windows.",
        least=1,
        otherwise="384, at most the model's context",
    )
    doc_stride: int | None = option(
        None,
        "Tokens that neighbouring windows of a long context share.",
        least=0,
        otherwise="128, at most half a window",
    )
    max_question_len: int | None = option(
        None, "Longest question in tokens.", least=1, otherwise="what leaves room for the context"
    )
    max_answer_len: int = option(15, "Longest answer in tokens.", least=1)
    handle_impossible_answer: bool = option(False, 'Let "" be an answer, scored by the first token.')
    align_to_words: bool = option(True, "Widen an answer to whole words.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultipleChoiceOptions(Options):
    truncation: bool | str = _truncation()


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureExtractionOptions(Options):
    return_tensors: bool | str = option(False, "Give a tensor instead of nested lists", choices=("pt",))
    truncation: bool | str | None = _truncation(None, "no, but yes with a max_length in tokenize_kwargs")
    tokenize_kwargs: dict[str, Any] = option(
        {}, "A dict of truncation, max_length (in tokens) and add_special_tokens.", otherwise="none"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentenceEmbeddingOptions(Options):
    prompt_name: str | None = option(
        None, "Which of the checkpoint's prompts stands before a text, such as query.", otherwise="the checkpoint's own"
    )
    prompt: str | None = option(None, "What stands before a text.", otherwise="as prompt_name says")
    pooling: str | None = option(
        None,
        "How a vector is made of the tokens' states",
        choices=_POOLINGS,
        otherwise="as the checkpoint says, or mean",
    )
    normalize: bool | None = option(
        None, "Make vectors of length one.", otherwise="as the checkpoint says; yes with multi_vector"
    )
    truncate_dim: int | None = option(
        None,
        "Keep this many first dimensions, for checkpoints that were trained for it (Matryoshka).",
        least=1,
        otherwise="as the checkpoint says, or all",
    )
    multi_vector: bool | None = option(
        None,
        "Give a vector of length one for every token (late interaction; see maxsim).",
        otherwise="as the checkpoint",
    )
    truncation: bool | str | None = _truncation(None, _AS_LAYOUT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankingOptions(Options):
    top_k: int | None = option(None, "How many documents to give.", least=1, otherwise="all")
    truncation: bool | str | None = _truncation(None, _AS_LAYOUT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossEncoderOptions(RankingOptions):
    activation: str = option(
        "sigmoid",
        "What makes scores of a cross-encoder's logits",
        choices=("sigmoid", "none", "tanh"),
        otherwise="as the checkpoint says, or sigmoid",
    )
    prompt: str = option("", "What stands before the query of a cross-encoder.", otherwise="as the checkpoint says")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextScoringOptions(Options):
    max_length: int | None = option(
        None, "Tokens of a window; a longer text is read in several.", least=2, otherwise="the model's context"
    )
    stride: int | None = option(
        None, "New tokens that each window after the first one scores.", least=1, otherwise="half a window"
    )
    add_special_tokens: bool = option(True, "Add the special tokens around a text.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContinuationOptions(Options):
    return_full_text: bool | None = option(None, "Give the prompt too, before what continues it.", otherwise="yes")
    return_tensors: bool = option(False, "Give ids of tokens instead of text.")
    stop_sequence: str | list[str] | None = option(None, "The same as stop_strings.", otherwise="none")
    seed: int | None = option(
        None,
        "Makes sampling repeatable: each text draws from a stream of its own, by the seed and its number.",
        least=0,
        most=2**32 - 1,
        otherwise="PyTorch's own",
    )
    add_special_tokens: bool | None = option(None, "Give the prompt to the model with special tokens.", otherwise="yes")


_USUAL = {
    "max_length": "no limit of its own",
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
        fields.append((field.name, field.kind | None, dataclasses.field(default=None, metadata=metadata)))
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
    "text-ranking": CrossEncoderOptions,
    "text-generation": TextGenerationOptions,
    "text-scoring": TextScoringOptions,
}
