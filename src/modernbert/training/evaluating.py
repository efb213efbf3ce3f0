"""The model of a run as evaluations see it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch

from modernbert.training.adapters import has_adapters
from modernbert.training.precision import autocast


@contextlib.contextmanager
def evaluating(trained: Any, precision: str, device: torch.device, is_sharded: bool = False) -> Iterator[Any]:
    """A model in evaluation mode with the weights of one in training, which goes on training behind it.

    On a CPU it is an optimized copy.

    Args:
        trained: with adapters or without.
        precision: of its products where it is no copy.
        device: where it is.
        is_sharded: whether its weights are shared over processes, all of which evaluate it together.
    """
    trained.eval()
    model = trained.get_base_model() if has_adapters(trained) else trained
    packed = model is trained and device.type == "cpu" and not is_sharded
    if packed:
        model = copy.deepcopy(model).optimize_for_inference()
    with torch.no_grad(), autocast("float32" if packed else precision, device):
        yield model
    if is_sharded:
        trained.reshard()  # which a backward pass would do
    trained.train()
