"""Options of training runs: one dataclass whose fields are arguments in Python, flags and keys of a YAML file.

Nothing here imports torch, so that a command line can describe its options at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from modernbert.checks import Options, kinds_of, option
from modernbert.errors import InputError

OPTIMIZERS = ("adamw", "stableadamw", "muon")
SCHEDULES = ("linear", "cosine", "wsd", "constant")
PRECISIONS = ("auto", "float32", "bfloat16")


def changed(options: Any, name: str, default: Any, **metadata: Any) -> Any:
    """A field of the options of this name with another default, and perhaps another description."""
    before = options.__dataclass_fields__[name].metadata
    return dataclasses.field(default=default, metadata={**before, **metadata})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions(Options):
    """How a run trains, whatever it trains for.

    Attributes:
        base_lr: the default learning rate at base size; see `modernbert.training.schedules.peak_rate`.

    Raises:
        InputError: an option is impossible; the message names it, its value and what is allowed.
    """

    base_lr: ClassVar[float] = 5e-5

    output: str = option("", "Folder for metrics, checkpoints, the finished model and its report.", required=True)
    epochs: float = option(3.0, "Number of passes over the training data.", above=0)
    max_steps: int | None = option(None, "Optimizer steps, instead of epochs.", least=1, otherwise="set by epochs")
    micro_tokens: int = option(8192, "Most tokens in a forward pass; larger steps accumulate gradients.", least=1)
    lr: float | None = option(None, "Peak learning rate.", least=0, otherwise="by the model's size; 5e-05 at base size")
    optimizer: str = option("stableadamw", "Optimizer.", choices=OPTIMIZERS)
    weight_decay: float = option(8e-6, "Decoupled weight decay of weight matrices.", least=0)
    beta1: float = option(0.9, "Decay of the running mean of gradients.", least=0, below=1)
    beta2: float = option(0.98, "Decay of the running variance of gradients.", least=0, below=1)
    eps: float = option(1e-6, "Added to the square root of the variance.", above=0)
    schedule: str = option(
        "linear", "Shape of the learning rate; wsd is warmup, constant, 1 - sqrt.", choices=SCHEDULES
    )
    warmup: float = option(0.06, "Share of the steps, 0 to 1, in which the learning rate rises.", least=0, most=1)
    decay: float = option(0.2, "wsd: share of the steps, at the end, in which the rate falls.", least=0, most=1)
    max_grad_norm: float = option(1.0, "Clip gradients to this norm; 0 does not.", least=0)
    layer_decay: float = option(1.0, "Learning rate of a layer, as a share of the next one's.", above=0, most=1)
    freeze_embeddings: bool = option(False, "Do not train the token embeddings.")
    freeze_layers: str | int = option(
        0,
        "Do not train the embeddings and this many layers, the first ones; all leaves the whole encoder as it is, so "
        "that models of several tasks can share it.",
        choices=("all",),
        least=0,
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass, to save memory.")
    activation_memory: float | None = option(
        None, "GiB of activations to keep for the backward pass; other layers are recomputed.", least=0, otherwise="all"
    )
    precision: str = option("auto", "Type of products; auto is bfloat16 if the device has it.", choices=PRECISIONS)
    seed: int = option(0, "Random seed of new weights, order, masks and dropout.", least=0)
    eval_every: int | None = option(None, "Steps between evaluations.", least=1, otherwise="an epoch")
    save_every: int | None = option(None, "Steps between checkpoints.", least=1, otherwise="eval_every")
    patience: int | None = option(
        None, "Stop after this many evaluations without improvement.", least=1, otherwise="never"
    )
    keep_best: bool = option(True, "Finish with the weights of the best evaluation, not of the last.")
    tracker: list[str] = option([], "Trackers of Accelerate, such as tensorboard.", otherwise="none")
    device: str | None = option(None, "Device to train on.", choices=("cpu",), otherwise="a GPU if there is one")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise InputError(f"warmup {self.warmup} and decay {self.decay} are shares of the steps, at most 1 together")

    @classmethod
    def of(cls, values: Mapping[str, Any], source: str = "the options") -> Self:
        """Options of keyword arguments or of a YAML file's keys; numbers and paths may stand where texts are wanted."""
        kinds = kinds_of(cls)
        return super().of({k: _as_text(v) if "str" in str(kinds.get(k)) else v for k, v in values.items()}, source)


def _as_text(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_as_text(part) for part in value]
    return str(value) if isinstance(value, int | float | Path) and not isinstance(value, bool) else value
