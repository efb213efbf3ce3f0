"""What the tasks of fine-tuning share.

A task is a class in a file of its own, and a line in the table of `modernbert.training.tasks.catalog`. It makes
examples of rows (`prepare`), labels of examples (`labels`), and metrics of the model's outputs (`evaluate_on`).
"""

from __future__ import annotations

import abc
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from tokenizers import Encoding
from torch import Tensor, nn

from modernbert.auto import AutoConfig
from modernbert.config import Config
from modernbert.errors import InputError
from modernbert.io.tables.columns import Field
from modernbert.models.formats import refuse_to_train
from modernbert.models.sentence_layout import load_tokenizer
from modernbert.nn.losses import IGNORED
from modernbert.text.tokenizer import Tokenizer
from modernbert.training.adapters import has_adapters, load_adapters
from modernbert.training.contract import Batch, Evaluation, Objective, Pass, summed
from modernbert.training.examples import Example, by_tokens, pack_rows
from modernbert.training.tasks.data import Row
from modernbert.training.tasks.options import FinetuneOptions

_BUDGET = 8192  # tokens of a forward pass of an evaluation
_SHOWN = 50  # wrong examples that a report lists


class Task(Objective):
    """One task of fine-tuning, which is the objective of its runs; see `modernbert.training.contract.Objective`.

    Args:
        options: of the task's own kind.

    Attributes:
        notes: what users should know of their data, such as texts that were cut.
        class_weights: what an example of each class counts for in training, (classes,); None is one for all.
        tokenizer, max_length: see `set_tokenizer`.
        held_out: examples to evaluate on.
    """

    name: ClassVar[str]
    fields: ClassVar[tuple[Field, ...]]
    auto_model: ClassVar[Any]
    ranked: ClassVar[tuple[str, str]]  # of tasks that a teacher serves: the fields of the query and its right document
    group_field: ClassVar[str | None] = None  # rows with equal values of it are held out together
    usual_length: ClassVar[int] = 512  # `max_length` if it is not given and the context is not shorter
    greater_is_better: bool = True
    reads_more_at_the_end: bool = False
    tokenizer: Tokenizer
    max_length: int

    def __init__(self, options: Any) -> None:
        self.options = options
        self.notes: list[str] = []
        self.class_weights: Tensor | None = None
        self.held_out: list[Example] = []

    # The model and its tokenizer

    def fit_labels(self, rows: Sequence[Row]) -> None:
        """Find what only the training rows can say, such as the names of labels."""
        return

    def align_labels(self, config: Config) -> None:
        """Take the order of labels from a checkpoint that has them."""
        return

    def config_changes(self) -> dict[str, Any]:
        """Fields of the configuration that the task sets."""
        return {}

    def load(self, name: str | Path, options: FinetuneOptions) -> Any:
        """The model to train, float32."""
        config = AutoConfig.from_pretrained(name, revision=options.revision)
        refuse_to_train(config, str(name))
        self.align_labels(config)
        return self.auto_model.from_pretrained(
            name,
            dtype=torch.float32,
            revision=options.revision,
            attn_implementation=options.attn_implementation,
            **self.config_changes(),
        )

    def load_tokenizer(self, name: str | Path, options: FinetuneOptions) -> Tokenizer:
        """The tokenizer of the model."""
        return load_tokenizer(name, revision=options.revision)

    def set_tokenizer(self, tokenizer: Tokenizer, context: int) -> None:
        """Set the tokenizer and `max_length`, which a context of so many tokens must hold."""
        self.tokenizer = tokenizer
        given = self.options.max_length
        if given is not None and given > context:
            raise InputError(f"max_length is {given}; the model's context holds {context} tokens")
        self.max_length = min(context, self.usual_length) if given is None else given

    # Examples

    @abc.abstractmethod
    def prepare(self, rows: Sequence[Row], training: bool) -> list[Example]:
        """Examples of rows.

        Raises:
            InputError: nothing can be learned from a row; the message names the row and the reason.
        """

    def encode(self, firsts: list[Any], seconds: list[str] | None = None, **options: Any) -> list[Encoding]:
        """Encode texts, pairs of texts, or lists of words, cut to `max_length`; a note says how many were cut."""
        cut = {"truncation": True, "max_length": self.max_length, **options}
        encodings = self.tokenizer(firsts, seconds, **cut).encodings
        assert encodings is not None
        if count := sum(bool(encoding.overflowing) for encoding in encodings):
            verbs = ("is", "was") if count == 1 else ("are", "were")
            cut_texts = f"{count} of {len(encodings)} texts {verbs[0]} longer than {self.max_length} tokens"
            self.notes.append(f"{cut_texts} and {verbs[1]} cut")
        return list(encodings)

    def labels(self, examples: Sequence[Example]) -> Batch:
        """Arguments of the model that hold the labels of a batch; (B,) numbers."""
        return {"labels": torch.tensor([example.label for example in examples])}

    # The objective of a run

    def at_step(self, step: int, total: int) -> None:
        return

    def collate(self, examples: Sequence[Example], seeds: Sequence[int]) -> Batch:
        return {**pack_rows([row for example in examples for row in example.rows]), **self.labels(examples)}

    def count(self, batch: Batch) -> float:
        counted = batch["labels"][batch["labels"] != IGNORED]
        return float(counted.numel() if self.class_weights is None else self.class_weights[counted].sum())

    def losses(self, model: nn.Module, batches: Sequence[Batch], total: float, one_pass: Pass) -> Tensor:
        if self.class_weights is None:
            return summed(model, batches, total, one_pass)
        return summed(model, batches, total, one_pass, self._weighted_loss)

    def _weighted_loss(self, model: nn.Module, batch: Batch, total: float) -> Tensor:
        """The classes' cross-entropy, each label with its class's weight; of several classes a text, each for itself,
        with the weight on the texts that have it."""
        assert self.class_weights is not None
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits.float()
        labels, weights = batch["labels"], self.class_weights.to(logits.device)
        if labels.is_floating_point():
            losses = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=weights, reduction="sum")
        else:
            losses = F.cross_entropy(logits, labels, weights, ignore_index=IGNORED, reduction="sum")
        return losses / total

    def evaluate(self, model: Any, at_the_end: bool) -> Evaluation | None:
        return self.evaluate_on(model, self.held_out) if self.held_out else None

    def save(self, model: Any, folder: Path) -> None:
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def load_weights(self, model: Any, folder: Path) -> None:
        if has_adapters(model):
            load_adapters(model, folder)
        else:
            model.load_state_dict(type(model).from_pretrained(folder, dtype=torch.float32).state_dict())

    # Evaluation

    @abc.abstractmethod
    def evaluate_on(self, model: Any, examples: Sequence[Example]) -> Evaluation:
        """Metrics, predictions and errors of a model on examples."""

    def answers(self, output: Any) -> Tensor:
        """What an evaluation keeps of a model's output: one item for each row of the examples, or for each token."""
        logits: Tensor = output.logits
        return logits.float()

    def kept(self, answers: Tensor) -> Any:
        """What is kept of an example's `answers` until the evaluation is done."""
        return answers

    def extra_inputs(self, rows: Sequence[Any]) -> dict[str, Any]:
        """What the model is given in an evaluation besides the ids of rows."""
        return {}

    def outputs(self, model: Any, examples: Sequence[Example]) -> list[Any]:
        """The `answers` for each example, on the CPU; examples of similar lengths share a forward pass."""
        found: dict[int, Any] = {}
        order = sorted(range(len(examples)), key=lambda i: examples[i].tokens)
        device = next(model.parameters()).device
        for group in by_tokens([examples[i].tokens for i in order], _BUDGET):
            chosen = [order[i] for i in group]
            rows = [row for i in chosen for row in examples[i].rows]
            batch = pack_rows(rows)
            given = {"input_ids": batch["input_ids"].to(device), "cu_seqlens": batch["cu_seqlens"]}
            answers = self.answers(model(**given, **self.extra_inputs(rows))).cpu()
            by_row = len(answers) == len(rows)
            sizes = [len(examples[i].rows) if by_row else examples[i].tokens for i in chosen]
            found.update(zip(chosen, map(self.kept, answers.split(sizes)), strict=True))
        return [found[i] for i in range(len(examples))]


def worst(rows: Iterable[tuple[float, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The errors that a report lists: rows by falling numbers, with cells that fit a table."""
    first = sorted(rows, key=lambda pair: -pair[0])[:_SHOWN]
    return [{name: _cell(value) for name, value in row.items()} for _, row in first]


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    value = ", ".join(value) if isinstance(value, list) else value
    return textwrap.shorten(value, 200, placeholder=" ...") if isinstance(value, str) else value


def texts_in(row: Row, name: str) -> list[str]:
    """A field that is a list of texts that are not blank; none if the row has no such field."""
    texts = row.values.get(name) or []
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(f"{row.where} has the {name} {texts!r}; each must be a text that is not blank")
    return list(texts)
