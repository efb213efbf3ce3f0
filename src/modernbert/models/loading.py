"""A checkpoint's tensors into a model that was built without any: names matched, shapes checked, nothing held twice."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modernbert.checkpoint import read_weights
from modernbert.errors import CheckpointError
from modernbert.models.initialization import initialize
from modernbert.models.quantization.modules import PARTS, QuantizedLinear, from_parts, put, quantized_modules
from modernbert.models.quantization.options import Record

if TYPE_CHECKING:
    from modernbert.models.base import PreTrainedModel

logger = logging.getLogger("modernbert.models.base")

# Every head's parameters begin with one of these. A checkpoint of another head may hold them beside the encoder.
_HEADS = ("head.", "lm_head.", "decoder.", "classifier.")
_WHOLE = ("I8", "U8", "I16", "I32", "I64")  # dtypes that stand for nothing by themselves
_PARTS = tuple(f".{name}" for name in PARTS.values() if name != "weight")


def load_weights(
    model: PreTrainedModel,
    origin: str,
    files: list[Path],
    names: Mapping[str, tuple[Path, tuple[int, ...], str]],
    device: torch.device,
    dtype: torch.dtype,
    relabelled: bool,
) -> None:
    """Read a checkpoint into a model on the meta device, one tensor at a time.

    Args:
        model: as built from the configuration.
        origin: what the checkpoint is called in messages.
        files: its safetensors files.
        names: what they hold; see `checkpoint.weight_names`.
        device: where the weights go.
        dtype: of those that are floats.
        relabelled: whether another number of labels is wanted than the checkpoint has.

    Raises:
        CheckpointError: a tensor is unexpected, missing or has the wrong shape.
    """
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    target = _match_names(model.base_model_prefix, names, shapes)
    quantized = _quantized(model, names, target)
    kept: dict[str, str] = {}  # name in the checkpoint -> name in the model
    unexpected: list[str] = []
    misshapen: list[str] = []
    passed_over: list[str] = []
    for name, (_, shape, kind) in names.items():
        mine = target(name)
        if name not in quantized and kind in _WHOLE:
            (passed_over if mine.startswith(_HEADS) else unexpected).append(name)
            continue
        if name in quantized or (mine in model.tied_weights and model.config.tie_word_embeddings):
            continue  # some writers store a tied weight twice
        if mine not in shapes:
            (passed_over if mine.startswith(_HEADS) else unexpected).append(name)
        elif shapes[mine] != shape:
            if relabelled and mine.startswith("classifier."):
                continue
            misshapen.append(f"{name} is {shape}, the model wants {shapes[mine]}")
        else:
            kept[name] = mine
    if unexpected or misshapen:
        what = [f"unexpected: {', '.join(unexpected)}"] if unexpected else []
        raise CheckpointError(f"{origin} does not fit {type(model).__name__}; " + "; ".join(what + misshapen))
    if passed_over:
        logger.info("%s: weights of another head are left out: %s", origin, ", ".join(passed_over))

    def place(name: str, value: Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value))

    parts: dict[str, Tensor] = {}
    for name, tensor in read_weights(files, lambda name: name in kept or name in quantized):
        if name in quantized:
            parts[quantized[name]] = tensor.to(device=device, copy=True)
        else:
            place(kept[name], tensor.to(device=device, dtype=dtype, copy=True))
    _put_quantized(model, origin, parts, dtype)
    model.tie_weights()
    missing = {name for name, p in model.named_parameters() if p.is_meta}
    prefix = f"{model.base_model_prefix}."
    lost = sorted(name for name in missing if not name.startswith(_HEADS))
    if lost:
        raise CheckpointError(f"{origin} is incomplete; it lacks {', '.join(n.removeprefix(prefix) for n in lost)}")
    for name in missing:
        place(name, torch.empty(shapes[name], device=device, dtype=dtype))
    for module in quantized_modules(model).values():
        if isinstance(module, QuantizedLinear):
            module.follow_bias()
    if quantized:
        model.requires_grad_(False)
    if missing:
        initialize(model, model.config, only=missing)
        logger.warning(
            "%s has no weights that fit %s; they are freshly initialised", origin, ", ".join(sorted(missing))
        )


def _match_names(prefix: str, names: Iterable[str], shapes: Mapping[str, Any]) -> Callable[[str], str]:
    """How the checkpoint's names become this model's: a bare encoder's names have no `model.` prefix."""
    prefix = f"{prefix}."
    theirs = any(name.startswith(prefix) for name in names)
    ours = any(name.startswith(prefix) for name in shapes)
    if theirs and not ours:
        return lambda name: name.removeprefix(prefix)
    if ours and not theirs:
        return lambda name: name if name.startswith(_HEADS) else prefix + name
    return lambda name: name


def _quantized(
    model: PreTrainedModel, names: Mapping[str, tuple[Path, tuple[int, ...], str]], target: Callable[[str], str]
) -> dict[str, str]:
    """The tensors of quantized weights that this model has a place for, by their names; and their names there."""
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


def _put_quantized(model: PreTrainedModel, origin: str, parts: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Quantized layers in the places of those whose parts were read; a tied output shares the embedding's."""
    record = Record.of(model.config)
    if record is None:
        return
    owners = [name.removesuffix("weight_scale") for name in parts if name.endswith(".weight_scale")]
    weights = {}
    for owner in owners:
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
