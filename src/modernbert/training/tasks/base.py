"""What the tasks of fine-tuning share: rows in, examples out, packed batches, losses, an evaluation.

A task is a class in a file of its own, and a line in the table of `modernbert.training.tasks`.
"""

from __future__ import annotations

import abc
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modernbert.auto import AutoConfig
from modernbert.config import Config
from modernbert.errors import InputError
from modernbert.io.tables.columns import Field
from modernbert.models.formats import refuse_to_train
from modernbert.text.tokenizer import Tokenizer
from modernbert.training.adapters import has_adapters, load_adapters
from modernbert.training.contract import Batch, Evaluation, Pass, summed
from modernbert.training.examples import Example, by_tokens, pack_rows
from modernbert.training.tasks.data import Row
from modernbert.training.tasks.options import FinetuneOptions

_SHOWN = 50  # wrong examples that a report has room for


class Task(abc.ABC):
    """One kind of training.

    Args:
        options: of the task's own kind.

    Attributes:
        notes: what is worth telling the user, such as texts that were cut.
        tokenizer: set by `use`.
    """

    name: ClassVar[str]
    fields: ClassVar[tuple[Field, ...]]
    auto_model: ClassVar[Any]
    group_field: ClassVar[str | None] = None  # rows with equal values of it are held out together
    metric: str
    greater_is_better: bool = True
    reads_more_at_the_end: bool = False

    def __init__(self, options: Any) -> None:
        self.options = options
        self.notes: list[str] = []
        self.tokenizer: Tokenizer
        self.max_length = 0
        self.held_out: list[Example] = []

    # Data

    def learn(self, rows: Sequence[Row]) -> None:
        """Find out what only the training rows can tell, such as the names of labels."""
        return

    def adopt(self, config: Config) -> None:
        """Take over what the checkpoint knows already, such as the order of labels."""
        return

    def config_changes(self) -> dict[str, Any]:
        """Fields of the configuration that the task sets."""
        return {}

    def load(self, name: str | Path, options: FinetuneOptions) -> Any:
        """The model to train, float32."""
        config = AutoConfig.from_pretrained(name, revision=options.revision)
        refuse_to_train(config, str(name))
        self.adopt(config)
        return self.auto_model.from_pretrained(
            name,
            dtype=torch.float32,
            revision=options.revision,
            attn_implementation=options.attn_implementation,
            **self.config_changes(),
        )

    def load_tokenizer(self, name: str | Path, options: FinetuneOptions) -> Tokenizer:
        """The model's tokenizer."""
        return Tokenizer.from_pretrained(name, revision=options.revision)

    def use(self, tokenizer: Tokenizer, context: int) -> None:
        """Take a tokenizer, and a context that texts must fit in."""
        self.tokenizer = tokenizer
        wanted = self.options.max_length
        if wanted is not None and wanted > context:
            raise InputError(f"max_length is {wanted}; the model's context holds {context} tokens")
        self.max_length = min(context, 512) if wanted is None else wanted

    @abc.abstractmethod
    def prepare(self, rows: Sequence[Row], training: bool) -> list[Example]:
        """Examples of rows.

        Raises:
            InputError: a row cannot be learnt from; the message says which one and why.
        """

    def encode(self, firsts: Sequence[Any], seconds: Sequence[Any] | None = None, **options: Any) -> list[list[int]]:
        """Ids of texts or pairs, cut to `max_length`; how many were cut is noted."""
        cut = {"truncation": True, "max_length": self.max_length, **options}
        encoded = self.tokenizer(list(firsts), None if seconds is None else list(seconds), **cut)
        assert encoded.encodings is not None
        self.note_cut(sum(bool(e.overflowing) for e in encoded.encodings), len(encoded.encodings))
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def note_cut(self, cut: int, texts: int) -> None:
        """Tell that texts were cut."""
        if cut:
            verbs = ("is", "was") if cut == 1 else ("are", "were")
            self.notes.append(
                f"{cut} of {texts} texts {verbs[0]} longer than {self.max_length} tokens and {verbs[1]} cut"
            )

    # Training

    @abc.abstractmethod
    def labels(self, examples: Sequence[Example]) -> Batch:
        """What the model is told of the right answers of a batch."""

    def at_step(self, step: int, total: int) -> None:
        """Change what changes over a run."""
        return

    def collate(self, examples: Sequence[Example], seeds: Sequence[int]) -> Batch:
        """A packed batch."""
        return {**pack_rows([row for example in examples for row in example.rows]), **self.labels(examples)}

    def count(self, batch: Batch) -> float:
        """Labels of a batch."""
        return float((batch["labels"] != -100).sum())

    def losses(self, model: nn.Module, batches: Sequence[Batch], total: float, one_pass: Pass) -> Tensor:
        """The mean loss over a step's labels; see `modernbert.training.contract.Objective`."""
        return summed(model, batches, total, one_pass)

    # Evaluation

    def evaluate(self, model: Any, at_the_end: bool) -> Evaluation | None:
        """Figures on the held-out examples."""
        return self.judge(model, self.held_out) if self.held_out else None

    @abc.abstractmethod
    def judge(self, model: Any, examples: Sequence[Example]) -> Evaluation:
        """Figures on examples."""

    def outputs(self, model: Any, examples: Sequence[Example], budget: int = 8192) -> Iterator[tuple[list[int], Any]]:
        """Outputs of packed passes over examples, with the numbers of the examples in each."""
        order = sorted(range(len(examples)), key=lambda i: examples[i].tokens)
        device = next(model.parameters()).device
        for group in by_tokens([examples[i].tokens for i in order], budget):
            chosen = [order[i] for i in group]
            batch = pack_rows([row for i in chosen for row in examples[i].rows])
            yield chosen, model(input_ids=batch["input_ids"].to(device), cu_seqlens=batch["cu_seqlens"])

    # Folders

    def save(self, model: Any, folder: Path) -> None:
        """Write the model and its tokenizer."""
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def load_weights(self, model: Any, folder: Path) -> None:
        """Read what `save` wrote into a model of the same form."""
        if has_adapters(model):
            load_adapters(model, folder)
        else:
            model.load_state_dict(type(model).from_pretrained(folder, dtype=torch.float32).state_dict())


def worst(rows: Sequence[tuple[float, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows that a report shows: those of the highest number."""
    return [row for _, row in sorted(rows, key=lambda pair: -pair[0])[:_SHOWN]]


def shown(text: str) -> str:
    """A text as a report's cell."""
    return textwrap.shorten(text, 200, placeholder=" ...")
