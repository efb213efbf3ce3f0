"""What a run does to its model: the type of its weights and products, the memory of a step, the copy to evaluate."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from modernbert.models.base import PreTrainedModel
from modernbert.nn.linear import multiplies_bfloat16
from modernbert.training.adapters import has_adapters
from modernbert.training.options import TrainingOptions

logger = logging.getLogger(__name__)


def products(precision: str, device: torch.device) -> str:
    """The type of products, "bfloat16" or "float32": the given one, or for "auto" what the device has."""
    if precision != "auto":
        return precision
    on_card = device.type == "cuda"
    native = torch.cuda.is_bf16_supported(including_emulation=False) if on_card else multiplies_bfloat16()
    return "bfloat16" if native else "float32"


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Products of the type that `products` gives."""
    enabled = products(precision, device) == "bfloat16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def train_in_float32(model: nn.Module) -> None:
    """Convert trainable weights to float32, in place, with one warning: 16 bits would round most of a step away."""
    others = {p.dtype for p in model.parameters() if p.requires_grad and p.dtype in (torch.float16, torch.bfloat16)}
    if others:
        model.float()
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in others))
        logger.warning("the weights are %s; they are trained in float32", names)


def stored_in(dtype: object) -> str:
    """A note about a checkpoint that is stored in 16 bits and trained in float32; empty for others."""
    name = str(dtype).removeprefix("torch.")
    return f"weights are stored in {name} and trained in float32" if name in ("float16", "bfloat16") else ""


def save_memory(model: nn.Module, options: TrainingOptions) -> None:
    """Have the backward pass compute activations again, all or those past a budget, if the options say so."""
    budget = None if options.activation_memory is None else int(options.activation_memory * 2**30)
    if options.gradient_checkpointing or budget is not None:
        for module in list(model.modules()):
            if isinstance(module, PreTrainedModel):
                module.gradient_checkpointing_enable(keep_bytes=budget)


@contextlib.contextmanager
def evaluating(trained: Any, precision: str, device: torch.device, is_sharded: bool = False) -> Iterator[Any]:
    """A model in evaluation mode with the weights of one in training, whose training continues afterwards.

    On a CPU it is an optimized copy.

    Args:
        trained: with adapters or without.
        precision: of its products unless it is a copy.
        device: where it is.
        is_sharded: whether its weights are shared over processes, all of which evaluate it together.
    """
    trained.eval()
    model = trained.get_base_model() if has_adapters(trained) else trained
    is_copy = model is trained and device.type == "cpu" and not is_sharded
    if is_copy:
        model = copy.deepcopy(model).optimize_for_inference()
    with torch.no_grad(), autocast("float32" if is_copy else precision, device):
        yield model
    if is_sharded:
        trained.reshard()  # which a backward pass would do
    trained.train()
