"""Weights that are no plain floats: what a room above brings so that models load, save and guard them.

Without one every model is made of floats; nothing in this room knows how such weights are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from modernbert.config import Config
from modernbert.errors import CheckpointError, InputError
from modernbert.io.hub import Source

KEY = "quantization_config"  # in config.json, as everywhere in the field

# Names of tensors in a checkpoint -> file, shape and dtype; see `checkpoint.weight_names`.
Names = Mapping[str, tuple[Any, tuple[int, ...], str]]


def refuse_to_train(config: Config, what: str) -> None:
    """Refuse a quantized checkpoint that is to be trained, before anything is prepared; raises `InputError`."""
    if config.extra.get(KEY) is not None:
        raise InputError(
            f"{what} is quantized: whole numbers have no gradient. Train the float checkpoint, and quantize what comes "
            "out"
        )


class Quantization(Protocol):
    """How a model is quantized.

    Attributes:
        scheme: the scheme's name.
        finer: weights that are rounded more finely than the scheme says, and how, by their modules' names.
        measured: what quantizing cost, by name.
    """

    @property
    def scheme(self) -> str: ...

    @property
    def finer(self) -> dict[str, str]: ...

    @property
    def measured(self) -> dict[str, Any]: ...


class WeightFormat:
    """How weights load, are saved and are counted. The methods here are for floats; a subclass says it for others."""

    def of_config(self, config: Config) -> Quantization | None:
        """What a configuration says; None if the weights are floats."""
        if config.extra.get(KEY) is not None:
            raise CheckpointError("the checkpoint is quantized; import modernbert.quantization, which reads it")
        return None

    def of_model(self, model: nn.Module, config: Config) -> Quantization | None:
        """How a model is quantized; None if its weights are floats."""
        return None

    def resolve(self, given: Any) -> Any:
        """What a caller asked for as `quantization_config`; raises ValueError if it means nothing."""
        raise ValueError(f"quantization_config is {given!r}; import modernbert.quantization, which reads it")

    def quantize(self, model: Any, how: Any, source: Source) -> Any:
        """Quantize a model that was just loaded from `source`, as `resolve` said."""
        return model

    def claims(self, model: Any, names: Names, target: Callable[[str], str]) -> dict[str, str]:
        """The tensors of a checkpoint that are parts of quantized weights, by the names that `target` gives them."""
        return {}

    def put(self, model: Any, origin: str, parts: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Put modules with quantized weights where their parts were read."""

    def state(self, model: Any, weights: dict[str, Tensor]) -> bool:
        """Bring a state dict into the form that is saved, in place; whether it is quantized."""
        return False

    def count(self, model: Any, exclude_embeddings: bool) -> int:
        """How many values the quantized weights stand for, tied ones once."""
        return 0


_FORMATS = [WeightFormat()]


def register_format(weight_format: WeightFormat) -> None:
    """Have models ask this format."""
    _FORMATS.append(weight_format)


def weight_format() -> WeightFormat:
    """The format that models ask: the last one registered."""
    return _FORMATS[-1]
