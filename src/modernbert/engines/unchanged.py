"""Whether a model that was made ready to serve is still the one it was then, and whether anyone waits for its modules.

What runs in the place of modules holds their weights. It may only run while they are the same, nobody hooked into what
it leaves out, and no gradient is wanted.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch import Tensor, nn

from modernbert.engines.cpu.operations import NativeWeight, same_bytes, version_of
from modernbert.engines.freeze import FrozenWeight
from modernbert.engines.gpu.operations import TritonWeight
from modernbert.nn.layers import MLP, Attention, Layer, Linear

_SMALL = 1 << 14  # numbers of a parameter that is compared as a whole: norms and biases
_IS_TRAINING, _PACKED = operator.attrgetter("training"), operator.attrgetter("packed")


class Unchanged:
    """What a model was when this was made.

    Args:
        model: the module whose own attributes count.
        parts: modules whose insides count too.
    """

    def __init__(self, model: nn.Module, parts: list[nn.Module]) -> None:
        modules = [m for part in parts for m in part.modules()]
        self._all = [model, *modules]
        self._children = [module._modules for module in self._all]
        self._child_lists = [list(children.values()) for children in self._children]
        self._own = [module.__dict__ for module in modules]
        linear = [module for module in modules if isinstance(module, Linear)]
        self._packed = linear, [module.packed for module in linear]
        named = [(m._parameters, name, p) for m in modules for name, p in m._parameters.items()]
        self._parameters = [owner for owner, _, _ in named], [name for _, name, _ in named], [p for _, _, p in named]
        self._held = [p for p in self._parameters[2] if p is not None and type(p) is not FrozenWeight]
        small = [p.is_contiguous() and p.device.type == "cpu" and p.numel() <= _SMALL for p in self._held]
        self._large = [p for p, is_small in zip(self._held, small, strict=True) if not is_small]
        self._states = list(map(_state, self._large))
        self._small = [p for p, is_small in zip(self._held, small, strict=True) if is_small]
        self._copies = [p.detach().clone() for p in self._small]
        self._bytes = [c.data_ptr() for c in self._copies], [c.nbytes for c in self._copies]
        self._hooks: list[Any] = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]

    def holds(self) -> bool:
        """Whether the model is still the one whose weights were packed."""
        # Run before every pass: in a step of generation a loop of Python here would take as long as a layer.
        modules, packed = self._packed
        owners, names, held = self._parameters
        return not (
            any(map(operator.ne, map(list, map(dict.values, self._children)), self._child_lists))
            or any(map(operator.contains, self._own, itertools.repeat("forward")))
            or any(map(operator.is_not, map(_PACKED, modules), packed))
            or any(map(operator.is_not, map(dict.get, owners, names), held))
            or any(map(operator.ne, map(_state, self._large), self._states))
            or any(map(same_bytes, map(Tensor.data_ptr, self._small), *self._bytes))
        )

    def is_quiet(self, given: Tensor) -> bool:
        """Whether nothing listens, and no gradient, training or autocast is wanted of what is given."""
        if torch.is_grad_enabled() and (given.requires_grad or any(p.requires_grad for p in self._held)):
            return False
        return not (
            any(self._hooks)
            or any(map(_IS_TRAINING, self._all))
            or nn.modules.module._has_any_global_hook()
            or torch.is_autocast_enabled(given.device.type)
            or torch.compiler.is_compiling()
        )


def _state(parameter: Tensor) -> tuple[int, int | None]:
    """What changes when a parameter gets other numbers."""
    return parameter.data_ptr(), version_of(parameter)


def as_made(layer: nn.Module, packed: type[NativeWeight] | type[TritonWeight]) -> bool:
    """Whether a layer is as this package made it, and all of its weights are packed as objects of this class."""
    if type(layer) is not Layer or type(layer.mlp) is not MLP or not isinstance(layer.attn, Attention):
        return False
    norms = (layer.mlp_norm, layer.attn_norm)
    weights = (layer.attn.packed_projection, *(getattr(m, "packed", None) for m in (layer.attn.Wo, layer.mlp.Wo)))
    gate = getattr(layer.mlp.Wi, "packed", None)
    return (
        all(type(norm) in (nn.LayerNorm, nn.Identity) for norm in norms)
        and all(isinstance(weight, packed) and not weight.gated for weight in weights)
        and isinstance(gate, packed)
        and gate.gated
    )
