"""Activation checkpointing: what the backward pass needs is kept for some layers, and computed again for the others.

Shapes: T tokens of all texts together, M hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Recompute:
    """Runs layers, and keeps the activations of as many as a budget of bytes allows, the last ones; None keeps none.

    A layer that is computed again needs memory for one layer. The first ones need it when the others' is free again.
    What a layer keeps is not estimated: the last layer of each kind is measured once. `every` computes again only each
    such layer; `offload` holds what the others begin from on the host; `options` are those of PyTorch's `checkpoint`.
    """

    def __init__(
        self, budget: int | None = None, every: int = 1, offload: bool = False, options: dict[str, Any] | None = None
    ) -> None:
        self.budget, self.every, self.offload, self.options = budget, every, offload, options or {}
        self._bytes_a_token: dict[Any, float] = {}

    def plan(self, kinds: Sequence[str], x_TM: Tensor) -> list[bool]:
        """For each layer, by its kind, whether it keeps what it computes."""
        kept = [i % self.every != 0 for i in range(len(kinds))]
        if self.budget is None:
            return kept
        keys = [_key(kind, x_TM) for kind in kinds]
        last = {key: i for i, key in enumerate(keys) if key not in self._bytes_a_token}
        for i in last.values():  # to be measured; the rest of this pass takes no memory that is not known
            kept[i] = True
        if last:
            return kept
        left = float(self.budget)
        for i in reversed(range(len(kinds))):
            left -= self._bytes_a_token[keys[i]] * len(x_TM)
            if left < 0:
                break
            kept[i] = True
        return kept

    def run(self, layer: nn.Module, keep: bool, kind: str, x_TM: Tensor, *given: Any) -> Tensor:
        """(T, M) to (T, M) by a layer."""
        if not keep:
            elsewhere = torch.autograd.graph.save_on_cpu(pin_memory=x_TM.is_cuda)
            with elsewhere if self.offload else contextlib.nullcontext():
                out_TM: Tensor = checkpoint(layer, x_TM, *given, use_reentrant=False, **self.options)
            return out_TM
        key = _key(kind, x_TM)
        if key in self._bytes_a_token or not len(x_TM):
            return layer(x_TM, *given)
        own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
        saved: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            out_TM = layer(x_TM, *given)
        self._bytes_a_token[key] = sum(saved.values()) / len(x_TM)
        return out_TM


def _key(kind: str, x_TM: Tensor) -> Any:
    return kind, x_TM.dtype, torch.is_autocast_enabled(x_TM.device.type)
