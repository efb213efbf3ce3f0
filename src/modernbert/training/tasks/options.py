"""Options of fine-tuning, a dataclass for each task; see `modernbert.training.options`.

Defaults of the optimizer are those of the fine-tuning runs of the ModernBERT paper (arXiv:2412.13663): StableAdamW, a
short warm-up, then a linear decrease. Each task's number of epochs suits data of a few thousand rows; the learning rate
follows the model's size.
"""

from __future__ import annotations

import dataclasses

from modernbert.checks import Limits, option
from modernbert.training.options import TrainingOptions, changed

PROBLEMS = ("auto", "single-label", "multi-label", "regression")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneOptions(TrainingOptions):
    """What every task has."""

    train: list[str] = option(
        [], "File or datasets folder to train on; FILE#PART for a part of one; repeat.", required=True
    )
    eval: list[str] = option([], "File to evaluate on; repeat.", otherwise="held_out of the training rows")
    model: str | None = option(None, "Folder or Hub repository.", otherwise="the package's small model")
    revision: str | None = option(None, "Branch, tag or commit of the repository.", otherwise="its main branch")
    column: list[str] = option(
        [], "FIELD=COLUMN: which column holds a field; repeat.", otherwise="found by their names"
    )
    header: str | None = option(
        None, "Names of the columns of tables without a header line: a,b,c.", otherwise="the first line"
    )
    held_out: float = option(
        0.1, "Share of the training rows to evaluate on if no file is given; 0 is none.", least=0, below=1
    )
    group_by: str | None = option(
        None, "Column whose equal values stay on one side when rows are held out.", otherwise="none"
    )
    batch_size: int = option(32, "Examples a step.", least=1)
    batch_tokens: int | None = option(
        None, "Tokens a step, instead of batch_size examples.", least=1, otherwise="as batch_size says"
    )
    lora_rank: int = option(
        0, "Train adapters of this rank (LoRA) instead of the weights; 0 trains the weights.", least=0
    )
    lora_alpha: float | None = option(None, "Scale of the adapters.", otherwise="twice the rank")
    max_length: int | None = option(
        None, "Tokens of a text, which is cut off there.", least=3, otherwise="the model's context, 512 at the most"
    )
    attn_implementation: str = option("auto", "Attention backend, such as eager or sdpa; auto picks the fastest.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelOptions(FinetuneOptions):
    """Of tasks whose labels have names."""

    labels: str | None = option(
        None, "Names of the labels, in order: a,b,c, or a file with one a line.", otherwise="the data's or the model's"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextClassificationOptions(LabelOptions):
    """Classes or values of whole texts, or of pairs."""

    problem: str = option("auto", "What labels are; auto decides by the whole column.", choices=PROBLEMS)
    separator: str = option(",", "multi-label: what stands between the labels of a cell.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenClassificationOptions(LabelOptions):
    """Classes of words."""

    epochs: float = changed(FinetuneOptions, "epochs", 5.0)
    batch_size: int = changed(FinetuneOptions, "batch_size", 16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionAnsweringOptions(FinetuneOptions):
    """Answers that are spans of a text."""

    epochs: float = changed(FinetuneOptions, "epochs", 2.0)
    batch_size: int = changed(FinetuneOptions, "batch_size", 12, help="Windows a step.")
    max_length: int | None = option(
        None, "Tokens of a window, question included.", least=3, otherwise="384, or the model's context"
    )
    stride: int | None = option(None, "Tokens that windows share.", least=0, otherwise="128, or half a window")
    max_answer_len: int = option(30, "Longest answer in tokens, in evaluation.", least=1)
    n_best: int = option(20, "Answers of each question that predictions hold.", least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultipleChoiceOptions(FinetuneOptions):
    """One of several continuations."""

    batch_size: int = changed(FinetuneOptions, "batch_size", 16, help="Questions a step.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelOptions(FinetuneOptions):
    """Tokens of raw text; long texts are split and never cut off."""

    max_length: int | None = changed(FinetuneOptions, "max_length", None, limits=Limits(least=5))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLMOptions(LanguageModelOptions):
    """Tokens behind the mask."""

    mask_rate: float = option(
        0.3, "Share of the tokens to predict in training; evaluations hide 15 %.", above=0, below=1
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentenceEmbeddingOptions(FinetuneOptions):
    """Vectors of texts that belong together."""

    base_lr = 8e-5

    batch_size: int = changed(
        FinetuneOptions,
        "batch_size",
        64,
        help="Pairs a step; each is contrasted with all others of its step and process.",
    )
    lr: float | None = changed(FinetuneOptions, "lr", None, otherwise="by the model's size: 8e-05 at base size")
    epochs: float = changed(FinetuneOptions, "epochs", 1.0)
    warmup: float = changed(FinetuneOptions, "warmup", 0.05)
    temperature: float = option(0.05, "Similarities are divided by this before the softmax.", above=0)
    matryoshka: list[int] = option(
        [], "Also train this many first dimensions as vectors of their own; repeat.", otherwise="none"
    )
    pooling: str = option("mean", "How tokens become a vector, of a bare encoder.", choices=("mean", "cls", "max"))
    query_prompt: str = option(
        "", "Put before every anchor, and saved as the prompt 'query'.", otherwise="the model's own"
    )
    document_prompt: str = option(
        "", "Put before every positive and negative, and saved as the prompt 'document'.", otherwise="the model's own"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRankingOptions(FinetuneOptions):
    """Scores of documents for a query, read together."""

    negatives: int = option(4, "Other rows' documents beside each right one, if the data names no wrong ones.", least=0)


# Task -> its options. The class of a task is in `modernbert.training.tasks`.
OPTIONS: dict[str, type[FinetuneOptions]] = {
    "text-classification": TextClassificationOptions,
    "token-classification": TokenClassificationOptions,
    "question-answering": QuestionAnsweringOptions,
    "multiple-choice": MultipleChoiceOptions,
    "masked-lm": MaskedLMOptions,
    "causal-lm": LanguageModelOptions,
    "sentence-embedding": SentenceEmbeddingOptions,
    "text-ranking": TextRankingOptions,
}
