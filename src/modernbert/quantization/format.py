"""Quantized checkpoints and models, as `models.formats` asks about them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modernbert.config import Config
from modernbert.errors import CheckpointError
from modernbert.io.hub import Source
from modernbert.models.formats import Names, WeightFormat
from modernbert.quantization.modules import PARTS, QuantizedEmbedding, from_parts, put, quantized_modules
from modernbert.quantization.options import BFLOAT16, QuantizationConfig, Record, resolve

_PARTS = tuple(f".{name}" for name in PARTS.values() if name != "weight")


class Quantized(WeightFormat):
    """The format of this room's weights; see `models.formats.WeightFormat`."""

    def of_config(self, config: Config) -> Record | None:
        return Record.of(config)

    def of_model(self, model: nn.Module, config: Config) -> Record | None:
        return Record.of(config) if quantized_modules(model) else None

    def resolve(self, given: Any) -> QuantizationConfig:
        return resolve(given)

    def quantize(self, model: Any, how: QuantizationConfig, source: Source) -> Any:
        from modernbert.quantization.gate import quantize_loaded  # which needs a tokenizer, unlike loading

        return quantize_loaded(model, how, source)

    def claims(self, model: Any, names: Names, target: Callable[[str], str]) -> dict[str, str]:
        """Those that the model has a place for."""
        if Record.of(model.config) is None:
            return {}
        owners = {target(name).removesuffix(".weight_scale") for name in names if name.endswith(".weight_scale")}
        own = {name for name, _ in model.named_modules()}
        return {
            name: mine
            for name in names
            if (owner := (mine := target(name)).rpartition(".")[0]) in owners & own
            and (mine == f"{owner}.weight" or mine.endswith(_PARTS))
        }

    def put(self, model: Any, origin: str, parts: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Replace layers by quantized ones; a tied output shares the embedding's weight."""
        record = Record.of(model.config)
        if record is None:
            return
        weights = {}
        for owner in (name.removesuffix("weight_scale") for name in parts if name.endswith(".weight_scale")):
            weight = from_parts(parts, owner, record.float_rows)
            wanted = tuple(model.get_parameter(f"{owner}weight").shape)
            if weight.shape != wanted:
                raise CheckpointError(f"{origin}: {owner}weight is {tuple(weight.shape)}, the model wants {wanted}")
            weights[owner[:-1]] = weight
        if model.config.tie_word_embeddings:
            for tied, source in model.tied_weights.items():
                if source.removesuffix(".weight") in weights:
                    weights[tied.removesuffix(".weight")] = weights[source.removesuffix(".weight")]
        put(model, weights, dtype)

    def state(self, model: Any, weights: dict[str, Tensor]) -> bool:
        """Leave out what a tied output shares, and store as bfloat16 what was rounded to it."""
        if any(type(tensor).__module__.startswith("torchao") for tensor in weights.values()):
            raise ValueError("the model was quantized by torchao, whose tensors are not saved; quantize it on the CPU")
        if not quantized_modules(model):
            return False
        record = Record.of(model.config)
        if record is None:
            raise ValueError("a part of the model was quantized by itself; quantize the whole model to save it")
        if model.config.tie_word_embeddings:
            for tied in model.tied_weights:
                for name in PARTS.values():
                    weights.pop(tied.removesuffix("weight") + name, None)
        for name, how in record.finer.items():
            if how == BFLOAT16 and f"{name}.weight" in weights:
                weights[f"{name}.weight"] = weights[f"{name}.weight"].bfloat16()  # as its numbers are
        return True

    def count(self, model: Any, exclude_embeddings: bool) -> int:
        """How many numbers the codes stand for."""
        embedding = model.get_input_embeddings()
        skipped = {embedding} if exclude_embeddings else set()
        if model.config.tie_word_embeddings and isinstance(embedding, QuantizedEmbedding):
            skipped.add(model.get_output_embeddings())
        return sum(math.prod(module.shape) for module in quantized_modules(model).values() if module not in skipped)
