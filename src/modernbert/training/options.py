"""Options of training runs: one dataclass whose fields are arguments in Python, flags and keys of a YAML file.

Nothing here imports torch, so that a command line can describe its options at once.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from modernbert.errors import InputError

OPTIMIZERS = ("adamw", "stableadamw", "muon")
SCHEDULES = ("linear", "cosine", "wsd", "constant")
PRECISIONS = ("auto", "float32", "bfloat16")


def option(
    default: Any, said: str, choices: tuple[str, ...] = (), *, otherwise: str = "", required: bool = False
) -> Any:
    """A field with its description.

    Args:
        default: its value where nobody gives one.
        said: what it is, for a command's help.
        choices: the values that it may have, if these can be listed.
        otherwise: what holds by default, in words, where the default itself does not say it.
        required: whether a run cannot do without it.
    """
    metadata = {"help": said, "choices": choices, "otherwise": otherwise, "required": required}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How a run trains, whatever it trains for.

    Attributes:
        base_lr: what the default learning rate is at base size; see `modernbert.training.schedules.peak_rate`.

    Raises:
        InputError: an option is impossible; the message names it, its value and what is allowed.
    """

    base_lr: ClassVar[float] = 5e-5

    epochs: float = option(3.0, "Passes over the training data.")
    max_steps: int | None = option(None, "Optimizer steps, instead of epochs.", otherwise="as epochs say")
    micro_tokens: int = option(8192, "Tokens of a forward pass; a larger step accumulates gradients.")
    lr: float | None = option(None, "Peak learning rate.", otherwise="by the model's size: 5e-05 at base size")
    optimizer: str = option("stableadamw", "Optimizer.", OPTIMIZERS)
    weight_decay: float = option(8e-6, "Decoupled weight decay of matrices.")
    beta1: float = option(0.9, "Decay of the mean of gradients.")
    beta2: float = option(0.98, "Decay of the variance of gradients.")
    eps: float = option(1e-6, "Added to the root of the variance.")
    schedule: str = option("linear", "Shape of the learning rate; wsd is warm-up, constant, 1 - sqrt.", SCHEDULES)
    warmup: float = option(0.06, "Share of the steps in which the rate rises.")
    decay: float = option(0.2, "wsd: share of the steps, the last ones, in which the rate falls.")
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm; 0 leaves them.")
    layer_decay: float = option(1.0, "Learning rate of each layer as a share of the layer's above it.")
    freeze_embeddings: bool = option(False, "Leave the token embeddings as they are.")
    freeze_layers: int = option(0, "Leave this many layers, from the first on, and the embeddings as they are.")
    gradient_checkpointing: bool = option(False, "Compute activations again in the backward pass: less memory.")
    activation_memory: float | None = option(
        None, "GiB of activations to keep for the backward pass; layers past it are computed again.", otherwise="all"
    )
    precision: str = option("auto", "Of products; auto is bfloat16 where the device has it.", PRECISIONS)
    seed: int = option(0, "Of new weights, order, masks and dropout.")
    eval_every: int | None = option(None, "Steps between evaluations.", otherwise="an epoch")
    save_every: int | None = option(None, "Steps between checkpoints.", otherwise="as between evaluations")
    patience: int | None = option(None, "Stop after this many evaluations without a better one.", otherwise="never")
    keep_best: bool = option(True, "Finish with the weights of the best evaluation, not the last.")
    tracker: list[str] = option(
        [], "Trackers of Accelerate that follow the run, such as tensorboard; repeat.", otherwise="none"
    )
    device: str | None = option(None, "Where to train.", ("cpu",), otherwise="what Accelerate finds, a GPU first")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata.get("choices")
            if choices and value is not None and value not in choices:
                raise InputError(f"{field.name} is {value!r}; choose one of {', '.join(choices)}")
        positive = ("epochs", "max_steps", "micro_tokens", "eval_every", "save_every")
        self.check(lambda x: x > 0, "must be above 0", *positive, "patience", "eps")
        self.check(lambda x: x >= 0, "must not be negative", "lr", "weight_decay", "max_grad_norm")
        self.check(lambda x: x >= 0, "must not be negative", "freeze_layers", "seed", "activation_memory")
        self.check(lambda x: 0 <= x < 1, "must lie in [0, 1)", "beta1", "beta2")
        self.check(lambda x: 0 <= x <= 1, "must lie in [0, 1]", "warmup", "decay")
        self.check(lambda x: 0 < x <= 1, "must lie in (0, 1]", "layer_decay")
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise InputError(f"warmup {self.warmup} and decay {self.decay} are shares of the steps, at most 1 together")

    def check(self, holds: typing.Callable[[Any], bool], said: str, *names: str) -> None:
        """Raise unless all options of these names that are given hold."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise InputError(f"{name} is {value}; it {said}")

    @classmethod
    def of(cls, values: Mapping[str, Any], source: str = "the options") -> Self:
        """Options of a mapping, such as a YAML file's; values take the fields' types.

        Raises:
            InputError: an option does not exist, or a value has another type. A null stands for the option's default.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise InputError(f"{source} has no option {', '.join(unknown)}; there are {', '.join(fields)}")
        hints = typing.get_type_hints(cls)
        # What a file leaves null is not given, unless null is one of its values.
        given = {name: v for name, v in values.items() if v is not None or type(None) in typing.get_args(hints[name])}
        return cls(**{name: _typed(name, value, hints[name]) for name, value in given.items()})


def _typed(name: str, value: Any, wanted: Any) -> Any:
    """A value as its field's type; YAML reads 5e-5 as text, for one."""
    kinds = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    if value is None and type(None) in kinds:
        return None
    if value is None:
        raise InputError(f"{name} holds a null; leave it out")
    kind = next(k for k in kinds if k is not type(None))
    if typing.get_origin(kind) is list:
        inner = typing.get_args(kind)[0]
        return [_typed(name, v, inner) for v in (value if isinstance(value, list | tuple) else [value])]
    try:
        if kind is bool and isinstance(value, bool):
            return value
        if kind in (int, float) and not isinstance(value, bool):
            number = float(value)
            if kind is float or number == int(number):
                return kind(number)
        if kind is str and not isinstance(value, list | dict | bool):
            return str(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise InputError(f"{name} is {value!r}; it must be {_NAMES.get(kind, kind)}")


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
