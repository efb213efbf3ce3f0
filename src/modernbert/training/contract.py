"""What a run takes and what it gives: the objective, its evaluations, the progress, the outcome."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from modernbert.training.examples import Example

Batch = dict[str, Any]
# Whether a pass is the last of its step -> a context that gives what takes the loss.
Pass = Callable[[bool], AbstractContextManager[Callable[[Tensor], None]]]


@dataclasses.dataclass
class Evaluation:
    """How a model does on examples that it was not trained on.

    Attributes:
        figures: metrics by name, as the field names them.
        classes, confusion: counts of [true class][predicted class], where there are classes.
        errors: examples that it got wrong, the worst first; rows of a table.
        predictions: a record for each example.
    """

    figures: dict[str, float]
    classes: list[str] = dataclasses.field(default_factory=list)
    confusion: list[list[int]] = dataclasses.field(default_factory=list)
    errors: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    predictions: list[dict[str, Any]] = dataclasses.field(default_factory=list)


class Objective(Protocol):
    """What a model is trained for."""

    metric: str
    greater_is_better: bool

    def collate(self, examples: Sequence[Example], generator: torch.Generator) -> Batch:
        """A packed batch: what the model is called with, labels included."""
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

    def evaluate(self, model: Any) -> Evaluation | None:
        """How the model does on held-out examples; None without any."""
        ...

    def save(self, model: Any, folder: Path) -> None:
        """Write the model, with all that is needed to use it."""
        ...

    def load_weights(self, model: Any, folder: Path) -> None:
        """Read the weights that `save` wrote into a model of the same form."""
        ...


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a run says of itself after a step; `figures` are those of an evaluation, where there was one."""

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
    figures: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Outcome:
    """What a run came to.

    Attributes:
        model: the trained model, in evaluation mode.
        evaluation: of the weights that it ended with.
        steps: steps that were done in all.
        best_step: the step of the best evaluation, if any.
        seconds: of training, evaluations not counted.
        tokens: real tokens that were trained on.
        stopped: why it ended before its last step, if it did.
    """

    model: Any
    evaluation: Evaluation | None
    steps: int
    best_step: int | None
    seconds: float
    tokens: int
    stopped: str = ""
