"""Weights as engines hold them: laid out once for their kernels, and apart from the modules that they come from.

Shapes: T tokens, I inputs, O outputs, M hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

# A table (vocabulary, M), or a function from ids (T,) to vectors (T, M).
Embedding = Tensor | Callable[[Tensor], Tensor]


class LaidOut(Protocol):
    """A weight and its bias in the layout of whoever multiplies by them. Engines know the gated ones by their class."""

    def product(self, x_TI: Tensor) -> Tensor:
        """(T, I) to (T, O), of a weight that is not gated."""
        ...

    def to_dense(self) -> Tensor:
        """The weight, (O, I)."""
        ...


AnyLaidOut = TypeVar("AnyLaidOut", bound=LaidOut)


class Norm(NamedTuple):
    """A LayerNorm's numbers, (M,) each."""

    weight: Tensor
    bias: Tensor | None
    eps: float

    @classmethod
    def of(cls, module: nn.LayerNorm) -> Norm:
        """Those of a module, which keeps them."""
        return cls(module.weight.data, None if module.bias is None else module.bias.data, module.eps)


class LayerWeights(NamedTuple, Generic[AnyLaidOut]):
    """What a layer multiplies by."""

    kind: str  # of its attention
    heads: int
    attn_norm: Norm | None  # the first layer has none
    qkv: AnyLaidOut  # the projections to queries, keys and values, as one
    out: AnyLaidOut  # the attention's output projection
    mlp_norm: Norm
    gate: AnyLaidOut  # the MLP's first projection, gated
    down: AnyLaidOut


class BackboneWeights(NamedTuple, Generic[AnyLaidOut]):
    """What an engine needs of a backbone beside its configuration."""

    embedding: Embedding
    first_norm: Norm  # of the embedding
    layers: Sequence[LayerWeights[AnyLaidOut]]
    last_norm: Norm
    dtype: torch.dtype  # of what goes in and comes out
    device: torch.device
