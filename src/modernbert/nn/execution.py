"""Who runs a backbone's layers, and what the layers of one kind share in a pass.

Shapes: T real tokens of all texts together, M hidden size, H heads, D head size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from modernbert.config import Config
from modernbert.nn.attention.contract import AttentionBackend
from modernbert.nn.attention.eager import EagerAttention
from modernbert.nn.packing import PackedInputs, Packing
from modernbert.nn.rotary import angle_tables, rope_frequencies, rope_tables

# The attention weights of each layer by its number, for each text (H, L, K): L queries and K keys; or padded.
AttentionWeights = dict[int, list[Tensor] | Tensor]


class Attend(Protocol):
    """How the layers of one kind ("full_attention" or "sliding_attention") attend in one pass."""

    def __call__(self, layer: int, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, dropout: float = 0.0) -> Tensor:
        """Outputs (T, H, D) of one layer, by its number, from rotated queries and keys."""
        ...


class Shared(NamedTuple):
    """What all layers of one kind share in one pass."""

    attend: Attend
    cos_T1D: Tensor
    sin_T1D: Tensor


class Hidden(NamedTuple):
    """What a backbone computes: the last hidden state, packed, and what else was wanted.

    Attributes:
        states: the embeddings and every layer's output, the last one normed, in the caller's shape.
        weights: each layer's attention weights, padded.
    """

    last_TM: Tensor
    states: tuple[Tensor, ...] = ()
    weights: tuple[Tensor, ...] = ()


class Cache(Protocol):
    """What a cache is to the layers."""

    lengths: list[int]  # tokens of each text that it holds; empty before the first pass
    one_by_one: bool  # whether several new tokens of a text are computed as if each had come by itself

    def begin(
        self,
        packing: Packing,
        backend: AttentionBackend,
        dtype: torch.dtype,
        gather: bool,
        weights: AttentionWeights | None,
    ) -> Mapping[str, Attend]:
        """Make room for new tokens, and decide how each kind of layer attends to them and to what it holds.

        Args:
            packing: the new tokens.
            backend: attends where new tokens see each other alone.
            dtype: of queries, keys and values.
            gather: compute every pair of keys, past and new: slow, but with attention weights and gradients.
            weights: where each layer's attention weights go, if they are wanted.
        """
        ...

    def finish(self) -> None:
        """Count the new tokens, after the last layer."""
        ...


class Runner(Protocol):
    """Runs the layers of a frozen backbone instead of its modules."""

    @property
    def goes_one_by_one(self) -> bool:
        """Whether several new tokens of a text can be computed as if each had come by itself.

        See `DecoderCache.one_by_one`.
        """
        ...

    def run(
        self, inputs: PackedInputs, want_states: bool, backend: AttentionBackend | None, cache: Any
    ) -> Hidden | None:
        """The hidden states of packed inputs; None if the modules must run themselves.

        A backend that is given attends instead of the runner's own; the eager one makes attention weights, too. A cache
        is continued and added to.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Planned:
    """Attention within the texts of a pass, by a backend's plan. Attention weights need the eager backend."""

    backend: AttentionBackend
    plan: Any
    weights: AttentionWeights | None = None

    def __call__(self, layer: int, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, dropout: float = 0.0) -> Tensor:
        if self.weights is None:
            return self.backend.attend(q_THD, k_THD, v_THD, self.plan, dropout)
        assert isinstance(self.backend, EagerAttention)
        weights = self.backend.weigh(q_THD, k_THD, self.plan, dropout)
        self.weights[layer] = weights
        if q_THD.requires_grad:
            self.weights[layer], weights = self.backend.shown(weights, self.plan.packing)
        return self.backend.sum_values(weights, v_THD, self.plan)


def attend_by_kind(
    config: Config,
    packing: Packing,
    backend: AttentionBackend,
    dtype: torch.dtype,
    cache: Cache | None = None,
    weights: AttentionWeights | None = None,
    gradients: bool = False,
) -> Mapping[str, Attend]:
    """How each kind of layer attends: within the texts, or with a cache as well.

    Args are those of `Cache.begin`; with `gradients` any are to reach the inputs.
    """
    if cache is not None:
        gather = isinstance(backend, EagerAttention) or (any(cache.lengths) and gradients)
        return cache.begin(packing, backend, dtype, gather, weights)
    attends = {}
    for kind in dict.fromkeys(config.layer_types or ()):
        attends[kind] = Planned(backend, backend.plan(packing, config.reach(kind), dtype), weights)
    return attends


def rope_tables_by_kind(
    config: Config,
    positions_T: Tensor,
    text_T: Tensor | None = None,
    known: Mapping[str, tuple[Tensor, float]] = MappingProxyType({}),
    tables_of: Callable[[Tensor, float, Tensor], tuple[Tensor, Tensor]] = angle_tables,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Rotary tables of each kind of layer, see `rotary.rope_tables`.

    Callers may keep `frequencies`, which are then `known`, and have a kernel for `angle_tables`.
    """
    tables: dict[str, tuple[Tensor, Tensor]] = {}
    ropes = config.rope_parameters or {}
    for kind in dict.fromkeys(config.layer_types or ()):
        like = next((other for other in tables if ropes[other] == ropes[kind]), None)
        if like is not None:
            tables[kind] = tables[like]
        elif kind in known:
            tables[kind] = tables_of(*known[kind], positions_T)
        else:
            context = config.max_position_embeddings
            tables[kind] = rope_tables(ropes[kind], config.head_dim, positions_T, max_positions=context, text_T=text_T)
    return tables


def frequencies(config: Config, device: torch.device) -> dict[str, tuple[Tensor, float]]:
    """The rotary frequencies of each kind of layer; none if one's follow from the texts ("dynamic")."""
    ropes = {kind: (config.rope_parameters or {})[kind] for kind in dict.fromkeys(config.layer_types or ())}
    if any(rope["rope_type"] == "dynamic" for rope in ropes.values()):
        return {}
    return {kind: rope_frequencies(rope, config.head_dim, device) for kind, rope in ropes.items()}


def pad_attention_weights(weights: AttentionWeights | None, inputs: PackedInputs) -> tuple[Tensor, ...]:
    """Each layer's attention weights as one padded tensor; nothing if they are not wanted."""
    found = [weights[i] for i in sorted(weights)] if weights else []
    return tuple(w if isinstance(w, Tensor) else EagerAttention.pad_weights(w, inputs.packing) for w in found)
