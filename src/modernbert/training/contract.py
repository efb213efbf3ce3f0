"""What a run takes and what it gives: a feed of steps and an objective; progress, evaluations, an outcome."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

Batch = dict[str, Any]
# Whether a pass is the last of its step -> a context that gives what takes the loss.
Pass = Callable[[bool], AbstractContextManager[Callable[[Tensor], None]]]


@dataclasses.dataclass
class Evaluation:
    """How a model does on examples that it was not trained on.

    Attributes:
        metrics: by their usual names.
        classes, confusion: counts of [true class][predicted class], where there are classes.
        errors: examples that it got wrong, the worst first; rows of a table.
        predictions: a record for each example.
    """

    metrics: dict[str, float]
    classes: list[str] = dataclasses.field(default_factory=list)
    confusion: list[list[int]] = dataclasses.field(default_factory=list)
    errors: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    predictions: list[dict[str, Any]] = dataclasses.field(default_factory=list)


class Step(NamedTuple):
    """What one step trains on.

    Attributes:
        passes: the items of each forward pass; an item has `tokens`, how many it is of, and a `record` for messages.
        epoch: passes over the data that are done after it.
        place: what the feed needs to continue from here, for JSON.
    """

    passes: list[list[Any]]
    epoch: float
    place: dict[str, Any]


class Feed(Protocol):
    """What a run trains on, step by step; each step is the same at every run.

    Attributes:
        total: steps of the run.
        between: steps between evaluations by default.
        fingerprint: equal for equal data.
    """

    total: int
    between: int
    fingerprint: str

    def steps(self, first: int, place: Mapping[str, Any] | None) -> Iterator[Step]:
        """Steps from a number on.

        Args:
            first: number of the first step to give, from 0.
            place: of the step before it; None where it is not known.
        """
        ...


class Objective(Protocol):
    """What a model is trained for."""

    metric: str
    greater_is_better: bool
    reads_more_at_the_end: bool

    def collate(self, examples: Sequence[Any], seeds: Sequence[int]) -> Batch:
        """A packed batch: what the model is called with, labels included.

        Args:
            examples: items of the pass.
            seeds: one of each item, for what is drawn at random.
        """
        ...

    def at_step(self, step: int, total: int) -> None:
        """Called before each step: what changes over a run, such as the rate of masking, changes here."""
        ...

    def count(self, batch: Batch) -> float:
        """What the sum of the batch's losses is divided by to be their mean."""
        ...

    def losses(self, model: nn.Module, batches: Sequence[Batch], total: float, one_pass: Pass) -> Tensor:
        """Go through the batches of a step; the loss, without gradient.

        Args:
            model: in training mode.
            batches: of one step, on the model's device.
            total: `count` of the whole step.
            one_pass: `with one_pass(is_last) as backward` goes around each forward and its `backward(loss)`.
        """
        ...

    def evaluate(self, model: Any, at_the_end: bool) -> Evaluation | None:
        """How the model does on held-out examples; None without any.

        Args:
            model: as it is.
            at_the_end: whether it is the finished model. Evaluations before the end are compared with each other.
        """
        ...

    def save(self, model: Any, folder: Path) -> None:
        """Write the model, with all that is needed to use it."""
        ...

    def load_weights(self, model: Any, folder: Path) -> None:
        """Read the weights that `save` wrote into a model of the same form."""
        ...


def summed(
    model: nn.Module,
    batches: Sequence[Batch],
    total: float,
    one_pass: Pass,
    loss_of: Callable[[nn.Module, Batch, float], Tensor] = lambda model, batch, n: (
        model(**batch, num_items_in_batch=n).loss
    ),
) -> Tensor:
    """`Objective.losses` of a model that gives the loss of a batch as a share of the step's, or of another loss."""
    loss = torch.zeros(())
    for i, batch in enumerate(batches):
        with one_pass(i == len(batches) - 1) as backward:
            part = loss_of(model, batch, total)
            backward(part)
        loss = loss.to(part.device) + part.detach()
    return loss


class ShardedObjective(Objective, Protocol):
    """An objective for runs in which every process holds a part of the weights."""

    def save_frame(self, folder: Path) -> None:
        """Write all of the model but its weights."""
        ...

    def without_labels(self, batch: Batch) -> Batch:
        """The batch with nothing to predict, for a process that only takes part."""
        ...

    def rebuild(self, weights: Mapping[str, Tensor]) -> Any:
        """A whole model of these weights, on the CPU."""
        ...


@dataclasses.dataclass(frozen=True)
class Progress:
    """The state of a run after a step; `metrics` are those of an evaluation, if there was one."""

    step: int
    steps: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    seconds: float
    seconds_left: float
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Outcome:
    """The result of a run.

    Attributes:
        model: the trained model, in evaluation mode.
        evaluation: of the weights that it ended with.
        steps: steps that were done in all.
        best_step: the step of the best evaluation, if any.
        seconds: of training, evaluations not counted.
        tokens: real tokens that were trained on.
        stopped: why it ended before its last step, if it did.
        wall_seconds: of the loop with its evaluations and checkpoints, and of the run that it continued.
    """

    model: Any
    evaluation: Evaluation | None
    steps: int
    best_step: int | None
    seconds: float
    tokens: int
    stopped: str = ""
    wall_seconds: float = 0.0
