"""Attention of new tokens to keys that lie in a cache: the pieces that a forward pass with a cache is made of.

Each piece serves some texts of the batch, named by the rows of their new tokens. How a text is served depends on that
text alone, so its numbers do not depend on its batch.

Storage may be of a wider dtype than the new tokens, whose results are then rounded to theirs.

Shapes: T new tokens of all texts together, P of them in a piece, R rows of storage, N texts of a piece, W rows of a
window, K keys, H heads, D head size.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modernbert.nn.attention.contract import AttentionBackend
from modernbert.nn.attention.dense import dense_attention
from modernbert.nn.attention.eager import EagerAttention, EagerPlan

_CHUNK = 256  # queries a call where the mask is a tensor


@dataclasses.dataclass(frozen=True)
class Piece(abc.ABC):
    """Some of the new tokens.

    Attributes:
        rows_P: which of the T rows; None is all of them, in order.
    """

    rows_P: Tensor | None

    @abc.abstractmethod
    def attend(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, stored: tuple[Tensor, Tensor] | None) -> Tensor:
        """Attention outputs of the piece's rows, (T, H, D) to (P, H, D). `stored` are the layer's keys and values."""

    def take(self, x_THD: Tensor) -> Tensor:
        """The piece's rows of new queries, keys or values."""
        return x_THD if self.rows_P is None else x_THD.index_select(0, self.rows_P)


@dataclasses.dataclass(frozen=True)
class Fresh(Piece):
    """Texts that have no past: they attend to themselves, as without a cache."""

    backend: AttentionBackend
    plan: Any

    def attend(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, stored: tuple[Tensor, Tensor] | None) -> Tensor:
        """(T, H, D) to (P, H, D)."""
        return self.backend.attend(self.take(q_THD), self.take(k_THD), self.take(v_THD), self.plan)


@dataclasses.dataclass(frozen=True)
class Extended(Piece):
    """Several new tokens of texts with a past, before they are written: each text as its tail and its new tokens.

    Attributes:
        tail_rows: rows of storage that hold the texts' tails.
        order: for each row of the extended texts its place in the tails followed by the P new rows.
        new_P: the extended rows that are new.
        plan: of the extended texts.
    """

    backend: AttentionBackend
    tail_rows: Tensor
    order: Tensor
    new_P: Tensor
    plan: Any

    def join(self, new_THD: Tensor, tail: Tensor) -> Tensor:
        """Tails and new rows, text by text."""
        return torch.cat([tail, self.take(new_THD)]).index_select(0, self.order)

    def attend(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, stored: tuple[Tensor, Tensor] | None) -> Tensor:
        """(T, H, D) to (P, H, D); the tails' own queries are not known and not wanted."""
        assert stored is not None
        k_tail, v_tail = (x.index_select(0, self.tail_rows).to(k_THD.dtype) for x in stored)
        q = self.join(q_THD, q_THD.new_zeros((len(self.tail_rows), *q_THD.shape[1:])))
        out = self.backend.attend(q, self.join(k_THD, k_tail), self.join(v_THD, v_tail), self.plan)
        return out.index_select(0, self.new_P)


@dataclasses.dataclass(frozen=True)
class Gathered:
    """The slow, obvious way for all texts: past and new keys put together, and every pair of tokens looked at.

    The oracle of the other pieces, the only one that gives attention weights, and the one that gradients pass.

    Attributes:
        tail_rows, order: as of `Extended`.
        plan: of the new tokens as queries and the extended texts as keys.
        forgotten: how many of each text's first tokens are no longer held.
    """

    tail_rows: Tensor
    order: Tensor
    plan: EagerPlan
    forgotten: list[int]

    def attend_with_weights(
        self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, stored: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, list[Tensor]]:
        """(T, H, D) to (T, H, D), and for each text its weights (H, new tokens, all tokens)."""
        if stored is not None:
            k_tail, v_tail = (x.index_select(0, self.tail_rows).to(k_THD.dtype) for x in stored)
            k_THD = torch.cat([k_tail, k_THD]).index_select(0, self.order)
            v_THD = torch.cat([v_tail, v_THD]).index_select(0, self.order)
        out_THD, weights = EagerAttention().attend_with_weights(q_THD, k_THD, v_THD, self.plan)
        return out_THD, [F.pad(w, (lost, 0)) for w, lost in zip(weights, self.forgotten, strict=True)]


@dataclasses.dataclass(frozen=True)
class Windowed(Piece):
    """One new token each of texts whose last tokens lie in rings, all in one call.

    Attributes:
        slots: (N * W,) rows of storage of the texts' rings; None where they are all of it, in order.
        width: W.
        bias_N11W: hides rows that are out of reach or hold nothing; of storage's dtype.
    """

    slots: Tensor | None
    width: int
    bias_N11W: Tensor

    def attend(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, stored: tuple[Tensor, Tensor] | None) -> Tensor:
        """(T, H, D) to (N, H, D)."""
        assert stored is not None
        k, v = (
            (x if self.slots is None else x.index_select(0, self.slots)).unflatten(0, (-1, self.width)).transpose(1, 2)
            for x in stored
        )
        return dense_attention(self.take(q_THD)[:, :, None], k, v, self.bias_N11W)[:, :, 0]


@dataclasses.dataclass(frozen=True)
class Stretch(Piece):
    """One new token each of N texts of one length that lie one after another in storage.

    Attributes:
        start: first row of the first text.
        texts: N.
        capacity: rows from one text to the next.
        length: K, tokens of each text.
    """

    start: int
    texts: int
    capacity: int
    length: int

    def attend(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, stored: tuple[Tensor, Tensor] | None) -> Tensor:
        """(T, H, D) to (N, H, D)."""
        assert stored is not None
        k, v = (
            x[self.start : self.start + self.texts * self.capacity]
            .unflatten(0, (self.texts, self.capacity))[:, : self.length]
            .transpose(1, 2)
            for x in stored
        )
        return dense_attention(self.take(q_THD)[:, :, None], k, v)[:, :, 0]


@dataclasses.dataclass(frozen=True)
class Continued(Piece):
    """Several new tokens of one text that attend to all before them, in storage already.

    Attributes:
        start: first row of the text.
        past: tokens before the new ones.
    """

    start: int
    past: int

    def attend(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, stored: tuple[Tensor, Tensor] | None) -> Tensor:
        """(T, H, D) to (P, H, D), some queries at a time."""
        assert stored is not None
        outs, q_PHD = [], self.take(q_THD)
        for first in range(0, len(q_PHD), _CHUNK):
            q = q_PHD[first : first + _CHUNK]
            keys = self.past + first + len(q)
            k, v = (x[self.start : self.start + keys].transpose(0, 1) for x in stored)
            token = torch.arange(keys - len(q), keys, device=q.device)
            hidden = torch.arange(keys, device=q.device) > token[:, None]
            bias = k.new_zeros((len(q), keys)).masked_fill_(hidden, float("-inf"))
            out = dense_attention(q.transpose(0, 1)[None], k[None], v[None], bias)
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)
