"""Checkpoints into models: names matched, shapes checked, nothing held twice."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modernbert.errors import CheckpointError, listed
from modernbert.io.checkpoint import read_weights
from modernbert.models.formats import Names, weight_format
from modernbert.models.initialization import initialize

logger = logging.getLogger("modernbert.models.base")

# Every head's parameters begin with one of these. A checkpoint of another head may hold them beside the encoder.
_HEADS = ("head.", "lm_head.", "decoder.", "classifier.")
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # other dtypes stand for nothing by themselves
# What wrappers of PyTorch's put into names: parallel training, the compiler, recomputation.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,6})\.")
_FRESH = 2**26  # values that a checkpoint may lack beside those that it holds


def check_layers(layers: int, names: Iterable[str], origin: str) -> None:
    """Refuse a checkpoint that holds fewer layers than its configuration names, before a model of that size is made."""
    held = {int(found[1]) for name in names if (found := _LAYER.search(name))}
    if layers > len(held):
        raise CheckpointError(
            f"{origin} is incomplete; num_hidden_layers is {layers}, and its weights hold {len(held)} layers"
        )


def load_weights(
    model: Any, origin: str, files: list[Path], names: Names, device: torch.device, dtype: torch.dtype, relabelled: bool
) -> None:
    """Read a checkpoint into a model on the meta device, one tensor at a time, floats as `dtype`.

    `origin` is what messages call it; `names` is what its files hold; `relabelled` is whether another number of labels
    is wanted than it has. Raises `CheckpointError` if a tensor is unexpected, missing or of the wrong shape: one that
    has no place is not left out, since without it the model would be another one than was saved.
    """
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    target = _match_names(model, origin, names, shapes)
    quantized = weight_format().claims(model, names, target)
    tied = model.tied_weights if model.config.tie_word_embeddings else {}
    kept: dict[str, str] = {}  # name in the checkpoint -> name in the model
    unexpected: list[str] = []
    misshapen: list[str] = []
    of_other_heads: list[str] = []
    for name, (_, shape, kind) in names.items():
        mine, is_float = target(name), kind in _FLOATS
        if name in quantized or (is_float and mine in tied):
            continue  # some writers store a tied weight twice
        if not is_float or mine not in shapes:
            what = name if is_float else f"{name} ({kind})"
            (of_other_heads if mine.startswith(_HEADS) else unexpected).append(what)
        elif shapes[mine] == shape:
            kept[name] = mine
        elif not (relabelled and mine.startswith("classifier.")):
            misshapen.append(f"{name} is {tuple(shape[:4])}, the model wants {shapes[mine]}")
    if unexpected or misshapen:
        problems = [f"unexpected: {listed(unexpected)}"] if unexpected else []
        problems += [listed(misshapen, most=3)] if misshapen else []
        raise CheckpointError(f"{origin} does not fit {type(model).__name__}; {'; '.join(problems)}")
    if of_other_heads:
        logger.info("%s: weights of another head are left out: %s", origin, listed(of_other_heads))

    def place(name: str, value: Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value))

    parts: dict[str, Tensor] = {}
    for name, tensor in read_weights(files, lambda name: name in kept or name in quantized):
        if name in quantized:
            parts[quantized[name]] = tensor.to(device=device, copy=True)
        else:
            place(kept[name], tensor.to(device=device, dtype=dtype, copy=True))
    weight_format().put(model, origin, parts, dtype)
    model.tie_weights()
    missing = sorted(name for name, p in model.named_parameters() if p.is_meta)
    body = "" if model.base_model is model else f"{model.base_model_prefix}."  # anything beside it is a head's
    lost = [name.removeprefix(body) for name in missing if name.startswith(body)]
    if lost:
        raise CheckpointError(f"{origin} is incomplete; it lacks {listed(lost)}")
    fresh = sum(math.prod(shapes[name]) for name in missing)
    if not relabelled and fresh > max(_FRESH, sum(math.prod(shape) for _, shape, _ in names.values())):
        raise CheckpointError(
            f"{origin} asks for {fresh:,} numbers that it does not hold, for {listed(missing)}; where they are "
            "wanted fresh, say so: num_labels=..."
        )
    for name in missing:
        place(name, torch.empty(shapes[name], device=device, dtype=dtype))
    if quantized:
        model.requires_grad_(False)
    if missing:
        initialize(model, model.config, only=set(missing))
        logger.warning("%s has no weights for %s; they get random values", origin, listed(missing, most=8))


def _match_names(model: Any, origin: str, names: Iterable[str], shapes: Mapping[str, Any]) -> Callable[[str], str]:
    """How the checkpoint's names become this model's.

    A bare encoder's names have no `model.` prefix, wrappers of PyTorch's put words into names, and of a tied pair some
    writers keep the output's name alone.
    """
    prefix = f"{model.base_model_prefix}."
    plain = {name: _WRAPPERS.sub("", name) for name in names}
    if len(set(plain.values())) < len(plain):
        twice = sorted(name for name in plain if name != plain[name] and plain[name] in plain)
        raise CheckpointError(f"{origin} holds tensors twice, as they are and with a wrapper's name: {listed(twice)}")
    theirs = any(name.startswith(prefix) for name in plain.values())
    ours = any(name.startswith(prefix) for name in shapes)

    def place(name: str) -> str:
        if theirs and not ours:
            return name.removeprefix(prefix)
        return prefix + name if ours and not theirs and not name.startswith(_HEADS) else name

    matched = {name: place(of) for name, of in plain.items()}
    embedding = f"{prefix if ours else ''}embeddings.tok_embeddings.weight"
    if model.config.tie_word_embeddings and embedding not in matched.values():
        matched |= {name: embedding for name, of in plain.items() if of == "decoder.weight"}
    return matched.__getitem__
