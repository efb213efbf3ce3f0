"""Options of fine-tuning, a dataclass for each task; see `modernbert.training.options`.

Defaults of the optimizer are those of the fine-tuning runs of the ModernBERT paper (arXiv:2412.13663): StableAdamW, a
short warm-up, then a linear decrease. Each task's number of epochs suits data of a few thousand rows; the learning rate
follows the model's size.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from modernbert.checks import Limits, Options, option
from modernbert.errors import InputError
from modernbert.training.options import TrainingOptions, changed

PROBLEMS = ("auto", "single-label", "multi-label", "regression")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneOptions(TrainingOptions):
    """What every task has."""

    train: list[str] = option([], "File or datasets folder to train on; FILE#PART is one of its parts.", required=True)
    eval: list[str] = option([], "File to evaluate on.", otherwise="held_out of the training rows")
    model: str | None = option(None, "Start from this folder or Hub repository.", otherwise="the package's small model")
    revision: str | None = option(None, "Branch, tag or commit of the repository.", otherwise="the newest")
    column: list[str] = option([], "FIELD=COLUMN: the column that holds a field.", otherwise="found by their names")
    header: str | None = option(
        None, "Names of the columns, as a,b,c, of tables that have no header line.", otherwise="the first line"
    )
    held_out: float = option(
        0.1, "Share of the training rows to evaluate on if there is no eval file; 0 means none.", least=0, below=1
    )
    group_by: str | None = option(
        None, "Column of groups: rows with the same value are held out together, or not at all.", otherwise="none"
    )
    batch_size: int = option(32, "Examples per step.", least=1)
    batch_tokens: int | None = option(
        None, "Tokens per step, instead of batch_size examples.", least=1, otherwise="none"
    )
    lora_rank: int = option(
        0, "Train adapters (LoRA) of this rank instead of the weights; 0 trains the weights.", least=0
    )
    lora_alpha: float | None = option(None, "Scale of the adapters (LoRA's alpha).", otherwise="twice the rank")
    max_length: int | None = option(
        None, "Longest text in tokens; longer ones are cut off.", least=3, otherwise="the model's context, at most 512"
    )
    attn_implementation: str = option("auto", "Attention backend, such as eager or sdpa; auto chooses a fast one.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelOptions(FinetuneOptions):
    """Of tasks whose labels have names."""

    labels: str | None = option(
        None, "Names of the labels in order: a,b,c, or a file of them.", otherwise="the data's or the model's"
    )
    class_weights: list[str] = option(
        [],
        "LABEL=WEIGHT, what examples of a label count for in training; or balanced, by how rare the labels are.",
        otherwise="1 for each",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextClassificationOptions(LabelOptions):
    """Classify texts or pairs of texts, or predict a number."""

    problem: str = option("auto", "Kind of labels; auto decides by the whole column.", choices=PROBLEMS)
    separator: str = option(",", "multi-label: separates the labels of a cell.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenClassificationOptions(LabelOptions):
    """Tag words, such as names of people and places."""

    epochs: float = changed(FinetuneOptions, "epochs", 5.0)
    batch_size: int = changed(FinetuneOptions, "batch_size", 16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionAnsweringOptions(FinetuneOptions):
    """Find the span of a text that answers a question."""

    epochs: float = changed(FinetuneOptions, "epochs", 2.0)
    batch_size: int = changed(FinetuneOptions, "batch_size", 12, help="Windows per step.")
    max_length: int | None = option(
        None, "Longest window in tokens, question included.", least=3, otherwise="384, at most the model's context"
    )
    stride: int | None = option(None, "Tokens that windows share.", least=0, otherwise="128, at most half a window")
    max_answer_len: int = option(30, "Longest answer in evaluations, in tokens.", least=1)
    n_best: int = option(20, "Answers to each question in predictions.jsonl.", least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultipleChoiceOptions(FinetuneOptions):
    """Choose one of several continuations."""

    batch_size: int = changed(FinetuneOptions, "batch_size", 16, help="Prompts per step.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelOptions(FinetuneOptions):
    """Predict the next token; long texts are split and never cut off."""

    max_length: int | None = changed(FinetuneOptions, "max_length", None, limits=Limits(least=5))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLMOptions(LanguageModelOptions):
    """Predict masked tokens; long texts are split and never cut off."""

    mask_rate: float = option(0.3, "Share of the tokens to mask in training; evaluations mask 0.15.", above=0, below=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationOptions(FinetuneOptions):
    """Of tasks that compare a query with documents, and may learn the scores of a teacher."""

    distilled: ClassVar[tuple[str, ...]] = ("margin-mse", "kl")

    loss: str = option("", "")
    teacher: str | None = option(
        None,
        "Cross-encoder whose scores are learned: a folder or Hub repository. It scores every row once, at the start.",
        otherwise="the column of scores",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher is not None and not self.is_distilled:
            raise InputError(f"teacher is given, and loss is {self.loss}; give loss {' or '.join(self.distilled)}")

    @property
    def is_distilled(self) -> bool:
        """Whether scores of a teacher are learned."""
        return self.loss in self.distilled


_LOSS = "{} tells right documents from wrong ones; margin-mse and kl learn a teacher's scores of a row's documents."


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContrastiveOptions(DistillationOptions):
    """Of tasks that make vectors, and compare each pair of a step with all others."""

    base_lr = 8e-5

    batch_size: int = changed(
        FinetuneOptions,
        "batch_size",
        64,
        help="Pairs per step; each is compared with all others of its step and process.",
    )
    lr: float | None = changed(FinetuneOptions, "lr", None, otherwise="by the model's size; 8e-05 at base size")
    epochs: float = changed(FinetuneOptions, "epochs", 1.0)
    warmup: float = changed(FinetuneOptions, "warmup", 0.05)
    temperature: float = option(0.05, "Divide similarities by this before the softmax of the loss.", above=0)
    query_prompt: str = option(
        "", "Put before every anchor, and saved as the prompt 'query'.", otherwise="the model's own"
    )
    document_prompt: str = option(
        "", "Put before all other texts, and saved as the prompt 'document'.", otherwise="the model's own"
    )
    loss: str = option("contrastive", _LOSS.format("contrastive"), choices=("contrastive", "margin-mse", "kl"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentenceEmbeddingOptions(ContrastiveOptions):
    """Make vectors that are close for texts that belong together."""

    matryoshka: list[int] = option([], "Also train the first dimensions, this many, as a vector.", otherwise="none")
    pooling: str = option("mean", "How a bare encoder's tokens become a vector.", choices=("mean", "cls", "max"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LateInteractionOptions(ContrastiveOptions):
    """Make a vector of every token, so that queries find documents by MaxSim."""

    # MaxSim adds up a query's cosines: 1 for the sum of 20 to 32 is 0.03 to 0.05 for their mean.
    temperature: float | None = changed(  # type: ignore[assignment]
        ContrastiveOptions, "temperature", None, otherwise="1; 0.05 for a model of the similarity meanmaxsim"
    )
    dimensions: int = option(128, "Dimensions of the vectors, where the model has no projection yet.", least=1)
    query_length: int | None = option(
        None, "Tokens of a query.", least=3, otherwise="the model's own; 32 for a new projection"
    )
    document_length: int | None = option(
        None, "Tokens that documents are cut to.", least=3, otherwise="the model's own; 300 for a new projection"
    )
    expansion: str = option(
        "auto",
        "Make queries longer by mask tokens: fixed cuts them, too; min does not. auto is the model's, or fixed.",
        choices=("auto", "none", "fixed", "min"),
    )
    attend_expansion: bool = option(False, "Let the tokens of a query see those that made it longer.")
    skipped_words: str | None = option(
        None,
        "Tokens whose vectors documents leave out, with spaces between; or punctuation, or none.",
        otherwise="the model's own; punctuation for a new projection",
    )
    layout: str = option(
        "auto",
        "Library that the folder is written for; auto is pylate, which all read, where it can hold the model.",
        choices=("auto", "sentence-transformers", "pylate", "stanford"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseEmbeddingOptions(ContrastiveOptions):
    """Make sparse vectors over the vocabulary (SPLADE) that are similar for texts that belong together."""

    base_lr = 5e-5

    lr: float | None = changed(FinetuneOptions, "lr", None)
    temperature: float = changed(ContrastiveOptions, "temperature", 1.0)
    query_flops: float = option(0.0003, "Weight of the FLOPS of queries in the loss: more makes them sparser.", least=0)
    document_flops: float = option(0.0001, "Weight of the FLOPS of documents in the loss.", least=0)
    flops_warmup: float = option(
        0.33, "Share of the steps, 0 to 1, in which these weights rise, quadratically.", least=0, most=1
    )
    start_entries: int = option(
        256,
        "Mean number of weights of a document when a masked language model becomes a sparse encoder: a constant is "
        "subtracted from its logits, which changes none of its probabilities; 0 does not.",
        least=0,
    )
    top_k: int | None = option(
        None, "Most entries of a vector when the model is used.", least=1, otherwise="the model's own, or all"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRankingOptions(DistillationOptions):
    """Score documents for a query, which is read together with each."""

    negatives: int = option(
        4, "Other rows' documents to use as wrong ones for each query, if the data has none.", least=0
    )
    loss: str = option("cross-entropy", _LOSS.format("cross-entropy"), choices=("cross-entropy", "margin-mse", "kl"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MineOptions(Options):
    """Find hard negatives: for each query of a table of pairs the best-ranked documents that do not belong to it."""

    pairs: list[str] = option([], "File of pairs; FILE#PART is one of its parts.", required=True)
    model: str = option(
        "", "Folder or Hub repository that ranks: of a sentence, sparse or late-interaction encoder.", required=True
    )
    output: str = option("", "File to write, .jsonl, .csv, .tsv or .parquet, which finetune reads.", required=True)
    corpus: list[str] = option([], "File of the documents to choose from.", otherwise="all documents of the pairs")
    column: list[str] = option(
        [], "FIELD=COLUMN: the column of the anchor or positive, or of the corpus' text.", otherwise="found by names"
    )
    revision: str | None = option(None, "Branch, tag or commit of the model's repository.", otherwise="the newest")
    negatives: int = option(4, "Negatives of each query.", least=1)
    skip: int = option(0, "Leave out this many of the best-ranked documents, which may be right ones.", least=0)
    margin: float | None = option(
        None, "Leave out documents that score more than the positive's score minus this.", otherwise="no limit"
    )
    most_similar: float | None = option(
        None, "Leave out documents that score more than this share of the positive's score.", least=0, otherwise="none"
    )
    teacher: str | None = option(
        None, "Cross-encoder whose scores are written too, and may leave out documents.", otherwise="none"
    )
    teacher_margin: float | None = option(
        None, "Leave out documents whose teacher's logit is above the positive's minus this.", otherwise="no limit"
    )
    candidates: int | None = option(
        None, "Documents of each query that the teacher scores.", least=1, otherwise="four times the negatives"
    )
    device: str | None = option(None, "Device to compute on.", choices=("cpu",), otherwise="a GPU if there is one")
    overwrite: bool = option(False, "Replace the output if it exists.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("teacher_margin", "candidates"):
            if getattr(self, name) is not None and self.teacher is None:
                raise InputError(f"{name} is given without a teacher; give a cross-encoder (teacher=FOLDER)")
        if self.candidates is not None and self.candidates < self.negatives:
            raise InputError(f"candidates is {self.candidates} and negatives {self.negatives}; give at least as many")


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
    "late-interaction": LateInteractionOptions,
    "sparse-embedding": SparseEmbeddingOptions,
}
