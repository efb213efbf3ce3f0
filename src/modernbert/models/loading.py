"""Checkpoints into models: names matched, shapes checked, nothing held twice."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import math
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modernbert.errors import CheckpointError, listed, printable
from modernbert.models.formats import Names, weight_format
from modernbert.models.initialization import initialize

logger = logging.getLogger("modernbert.models.base")

# Every head's parameters begin with one of these. A checkpoint of another head may hold them beside the encoder.
_HEADS = ("head.", "lm_head.", "decoder.", "classifier.", "linear.")
_BODY = ("embeddings.", "layers.", "final_norm.")
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # other dtypes stand for nothing by themselves
# What wrappers of PyTorch's put into names: parallel training, the compiler, recomputation.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,6})\.")
_FRESH = 2**26  # values that a checkpoint may lack beside those that it holds
_MAPPED: contextvars.ContextVar[list[weakref.ref[nn.Parameter]] | None] = contextvars.ContextVar("mapped", default=None)


@contextlib.contextmanager
def mapped_weights() -> Iterator[None]:
    """In this block, matrices of layers that are loaded lie in their files, as the system maps them to memory.

    Kernels lay weights out anew, so that a copy before that is one too many. At the end of the block what still lies in
    a file is copied, because files may change.
    """
    mapped: list[weakref.ref[nn.Parameter]] = []
    token = _MAPPED.set(mapped)
    try:
        yield
    finally:
        _MAPPED.reset(token)
        for parameter in (reference() for reference in mapped):
            if type(parameter) is nn.Parameter:  # not one of a frozen model, which has no numbers of its own
                parameter.data = parameter.data.clone()


def check_layers(layers: int, names: Iterable[str], origin: str) -> None:
    """Refuse a checkpoint that holds fewer layers than its configuration names, before a model of that size is made."""
    held = {int(found[1]) for name in names if (found := _LAYER.search(name))}
    if layers > len(held):
        raise CheckpointError(
            f"{origin} is incomplete; num_hidden_layers is {layers}, and its weights hold {len(held)} layers"
        )


def load_weights(
    model: Any,
    origin: str,
    read: Callable[[Callable[[str], bool]], Iterator[tuple[str, Tensor]]],
    names: Names,
    device: torch.device,
    dtype: torch.dtype,
    relabelled: bool,
    ignore_mismatched_sizes: bool = False,
    brought: Iterable[str] = (),
) -> dict[str, Any]:
    """Read a checkpoint into a model on the meta device, one tensor at a time, floats as `dtype`.

    Args:
        model: without weights.
        origin: what messages call the checkpoint.
        read: yields those of its tensors whose names are wanted.
        names: what it holds.
        device, dtype: of the weights.
        relabelled: whether another number of labels is wanted than it has.
        ignore_mismatched_sizes: draw weights anew for which it has another shape.
        brought: weights that get other values afterwards, so that fresh ones are not worth a word.

    Returns:
        What `output_loading_info` gives: the model's names under "missing_keys", the checkpoint's under
        "unexpected_keys", and under "mismatched_keys" with both shapes; "error_msgs" is empty.

    Raises:
        CheckpointError: a tensor of the body is missing, or one has the wrong shape. One that has no place in the model
            is left out, with a warning.
    """
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    target = _match_names(model, origin, names, shapes)
    quantized = weight_format().claims(model, names, target)
    tied = model.tied_weights if model.config.tie_word_embeddings else {}
    kept: dict[str, str] = {}  # name in the checkpoint -> name in the model
    unexpected: list[str] = []
    of_other_heads: list[str] = []
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for name, (_, shape, kind) in names.items():
        mine, is_float = target(name), kind in _FLOATS
        if name in quantized or (is_float and mine in tied):
            continue  # some writers store a tied weight twice
        if mine not in shapes:
            (of_other_heads if mine.startswith(_HEADS) and is_float else unexpected).append(name)
        elif not is_float:
            raise CheckpointError(f"{origin} does not fit {type(model).__name__}; {printable(name)} holds {kind}")
        elif shapes[mine] == shape:
            kept[name] = mine
        else:
            mismatched[name] = shape, shapes[mine]
    for_labels = {name for name in mismatched if relabelled and target(name).startswith("classifier.")}
    wrong = [f"{n} is {was[:4]}, the model wants {new}" for n, (was, new) in mismatched.items() if n not in for_labels]
    if wrong and not ignore_mismatched_sizes:
        raise CheckpointError(
            f"{origin} does not fit {type(model).__name__}; {listed(wrong, most=3)}; with ignore_mismatched_sizes=True "
            "they get random values"
        )
    if unexpected:
        where = f"{origin} holds tensors that have no place in {type(model).__name__} and are left out"
        logger.warning("%s: %s", where, listed(unexpected))
    if of_other_heads:
        logger.info("%s: weights of another head are left out: %s", origin, listed(of_other_heads))

    def place(name: str, value: Tensor) -> nn.Parameter:
        owner, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(value)
        setattr(model.get_submodule(owner), leaf, parameter)
        return parameter

    def place_read(name: str, value: Tensor) -> None:
        mapped, there = _MAPPED.get(), torch.empty(0, device=device, dtype=dtype)
        fits = value.device.type == there.device.type == "cpu" and value.dtype == dtype and value.is_contiguous()
        if mapped is not None and fits and value.dim() == 2 and _LAYER.search(name):
            mapped.append(weakref.ref(place(name, value)))
        else:
            place(name, value.to(device=device, dtype=dtype, copy=True))

    parts: dict[str, Tensor] = {}
    for name, tensor in read(lambda name: name in kept or name in quantized):
        if name in quantized:
            parts[quantized[name]] = tensor.to(device=device, copy=True)
        else:
            place_read(kept[name], tensor)
    weight_format().put(model, origin, parts, dtype)
    model.tie_weights()
    missing = sorted(name for name, p in model.named_parameters() if p.is_meta)
    body = _BODY if model.base_model is model else (f"{model.base_model_prefix}.",)  # anything beside it is a head's
    drawn = {target(name) for name in mismatched}
    lost = [
        name.removeprefix(body[0] if body is not _BODY else "")
        for name in missing
        if name.startswith(body) and name not in drawn
    ]
    if lost:
        raise CheckpointError(f"{origin} is incomplete; it lacks {listed(lost)}")
    fresh = sum(math.prod(shapes[name]) for name in missing)
    if (
        not relabelled
        and not ignore_mismatched_sizes
        and fresh > max(_FRESH, sum(math.prod(shape) for _, shape, _ in names.values()))
    ):
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
        if drawn_for_good := [name for name in missing if name not in set(brought)]:
            logger.warning("%s has no weights for %s; they get random values", origin, listed(drawn_for_good, most=8))
    return {
        "missing_keys": set(missing) - drawn,
        "unexpected_keys": {*unexpected, *of_other_heads},
        "mismatched_keys": {(target(name), *sizes) for name, sizes in mismatched.items()},
        "error_msgs": [],
    }


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
    if not any(name.startswith("model.") for name in shapes):  # a class of somebody's own calls its encoder otherwise
        plain = {name: re.sub(r"^model\.", prefix, of) for name, of in plain.items()}
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
