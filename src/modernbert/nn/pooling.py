"""Pooling: one vector for each text of a packed batch, or for each of any spans of its tokens.

Sums are of one span alone, so that a text's vector does not depend on its batch (docs/invariance.md).

Shapes: T tokens of all texts together, B spans, M hidden size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from modernbert.errors import InputError
from modernbert.nn.packing import on_device

# What each name takes of a span. The first two are what classifiers of this architecture are configured with.
POOLINGS = ("cls", "mean", "max", "last", "weighted_mean", "mean_sqrt_len")


def pool(
    x_TM: Tensor, spans: Sequence[tuple[int, int]], mode: str = "mean", positions_T: Tensor | None = None
) -> Tensor:
    """Pool the tokens of each span into one vector: (T, M) to (B, M), with sums in float32.

    Args:
        x_TM: packed states.
        spans: for each vector its first token and the token after its last one; an empty span gives zeros.
        mode: "cls" (first token), "last" (last token), "mean", "max" (of each dimension), "weighted_mean" (weights
            1, 2, 3, ... by the token's position in its text), "mean_sqrt_len" (sum over the root of the count).
        positions_T: (T,) positions of the tokens in their texts from 0; "weighted_mean" needs them.

    Raises:
        InputError: there is no such mode.
    """
    if mode not in POOLINGS:
        raise InputError(f"pooling is {mode!r}; choose one of {', '.join(POOLINGS)}")
    lengths = [end - start for start, end in spans]
    filled = [i for i, length in enumerate(lengths) if length > 0]
    if len(filled) < len(spans) or not spans:
        out = x_TM.new_zeros((len(spans), x_TM.shape[1]))
        if not filled:
            return out
        index = on_device(filled, x_TM.device)
        return out.index_copy(0, index, pool(x_TM, [spans[i] for i in filled], mode, positions_T))
    if mode in ("cls", "last"):
        chosen = [start if mode == "cls" else end - 1 for start, end in spans]
        return x_TM.index_select(0, on_device(chosen, x_TM.device))
    states, lengths_B = _gather(x_TM, spans).float(), on_device(lengths, x_TM.device)
    if mode == "max":
        return torch.segment_reduce(states, "max", lengths=lengths_B, axis=0).to(x_TM.dtype)
    count_B = lengths_B.float()
    if mode == "weighted_mean":
        assert positions_T is not None
        weights = _gather(positions_T, spans).float() + 1.0
        states = states * weights[:, None]
        count_B = torch.segment_reduce(weights, "sum", lengths=lengths_B, axis=0)
    elif mode == "mean_sqrt_len":
        count_B = count_B.sqrt()
    sum_BM = torch.segment_reduce(states, "sum", lengths=lengths_B, axis=0)
    return (sum_BM / count_B[:, None]).to(x_TM.dtype)


def unit(x: Tensor) -> Tensor:
    """Vectors of length one, (..., D) to (..., D); zeros stay zeros.

    Squares are added in halves, because PyTorch's own sums within a vector depend on the processor; where gradients are
    wanted, PyTorch computes them.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return F.normalize(x, dim=-1)
    wide = x.float()
    sums = wide * wide
    sums = F.pad(sums, (0, (1 << max(sums.shape[-1] - 1, 0).bit_length()) - sums.shape[-1]))
    while sums.shape[-1] > 1:
        first, second = sums.chunk(2, dim=-1)
        sums = first + second
    return (wide / sums.sqrt().clamp_min(1e-12)).to(x.dtype)


def _gather(values_T: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """The tokens of the spans one after another."""
    if all(a[1] == b[0] for a, b in itertools.pairwise(spans)):
        return values_T[spans[0][0] : spans[-1][1]]
    return torch.cat([values_T[start:end] for start, end in spans])
