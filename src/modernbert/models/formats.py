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
    """Refuse a quantized checkpoint where one is to be trained, before anything is prepared; raises `InputError`."""
    if config.extra.get(KEY) is not None:
        raise InputError(
            f"{what} is quantized: whole numbers have no gradient. Train the float checkpoint, and quantize what comes "
            "out"
        )


class Quantization(Protocol):
    """How a model is quantized."""

    @property
    def scheme(self) -> str:
        """The scheme's name."""
        ...

    @property
    def finer(self) -> dict[str, str]:
        """Weights that are cut finer than the scheme says, and how, by their modules' names."""
        ...

    @property
    def measured(self) -> dict[str, Any]:
        """What quantizing cost, by name."""
        ...


class WeightFormat(Protocol):
    """How quantized models load, are saved, and are told from others."""

    def of_config(self, config: Config) -> Quantization | None:
        """What a configuration says; None where the weights are floats."""
        ...

    def of_model(self, model: nn.Module, config: Config) -> Quantization | None:
        """How a model is quantized; None where its weights are floats."""
        ...

    def resolve(self, given: Any) -> Any:
        """What a caller asked for as `quantization_config`; raises ValueError where it means nothing."""
        ...

    def quantize(self, model: Any, how: Any, source: Source) -> Any:
        """Quantize a model that was just loaded from there, as `resolve` said."""
        ...

    def claims(self, model: Any, names: Names, target: Callable[[str], str]) -> dict[str, str]:
        """The tensors of a checkpoint that are parts of quantized weights, and their names in the model.

        Args:
            model: as built from its configuration.
            names: what the checkpoint holds.
            target: from a name in the checkpoint to one in the model.
        """
        ...

    def put(self, model: Any, origin: str, parts: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Put modules with quantized weights where their parts were read."""
        ...

    def state(self, model: Any, weights: dict[str, Tensor]) -> bool:
        """Bring a state dict into the form that is saved, in place; whether it is quantized."""
        ...

    def count(self, model: Any, exclude_embeddings: bool) -> int:
        """How many numbers the quantized weights stand for, tied ones once."""
        ...


class Floats:
    """The format of models whose weights are floats, which is all there is until another one is registered."""

    def of_config(self, config: Config) -> None:
        """Refuse what only another format reads."""
        if config.extra.get(KEY) is not None:
            raise CheckpointError("the checkpoint is quantized; import modernbert.quantization, which reads it")

    def of_model(self, model: nn.Module, config: Config) -> None:
        """It is not quantized."""

    def resolve(self, given: Any) -> Any:
        """Nothing can be asked for."""
        raise ValueError(f"quantization_config is {given!r}; import modernbert.quantization, which reads it")

    def quantize(self, model: Any, how: Any, source: Source) -> Any:
        """Nothing is done."""
        return model

    def claims(self, model: Any, names: Names, target: Callable[[str], str]) -> dict[str, str]:
        """No tensor is claimed."""
        return {}

    def put(self, model: Any, origin: str, parts: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """There is nothing to put."""

    def state(self, model: Any, weights: dict[str, Tensor]) -> bool:
        """It is saved as it is."""
        return False

    def count(self, model: Any, exclude_embeddings: bool) -> int:
        """There are none."""
        return 0


class _Slot:
    """Where the format stands that models ask."""

    format: WeightFormat = Floats()


def register_format(weight_format: WeightFormat) -> None:
    """Have models ask this format."""
    _Slot.format = weight_format


def weight_format() -> WeightFormat:
    """The format that models ask."""
    return _Slot.format
