"""Floats to whole numbers: which columns stay floats, where each group's scale lies, and how each number is rounded.

Rounding a column of a weight leaves an error in what it multiplies. Where it is known how the inputs vary together, the
columns that are rounded later make up for it (GPTQ, arXiv:2210.17323).

Shapes: I inputs, O outputs, G groups, K kept columns.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from modernbert.quantization.weight import LARGEST, QuantizedWeight, pack_halves

_BLOCK = 64  # columns whose errors are handed on together
_FAR = 1.5  # times the median: an input, or a column of the weight, that takes digits from the others


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a weight is cut and rounded."""

    bits: int  # 8 or 4
    group: int | None  # inputs that share a scale; None is a whole row
    float_rows: bool = False  # whether the inputs stay floats
    kept: int = 64  # one column in this many may stay a float

    def __str__(self) -> str:
        return f"int{self.bits}" + ("" if self.group is None else f" in groups of {self.group}")

    def group_of(self, inputs: int) -> int:
        """The size of a group of a weight of so many inputs: a multiple of 4."""
        return -(-min(self.group or inputs, inputs) // 4) * 4


def choose_columns(weight_OI: Tensor, top_I: Tensor | None, scheme: Scheme) -> Tensor:
    """The columns that stay floats, (K,) int32, rising: where inputs or weights reach furthest beyond the median."""
    largest_I = weight_OI.abs().amax(0)
    reach_I = _over_median(largest_I)
    if top_I is not None and not scheme.float_rows:
        reach_I = torch.maximum(reach_I, _over_median(top_I))
    reach_I = reach_I.masked_fill(largest_I > torch.finfo(torch.float16).max, 0.0)
    far, columns = reach_I.topk(weight_OI.shape[1] // scheme.kept)
    return columns[far > _FAR].sort().values.to(torch.int32)


def _over_median(x_I: Tensor) -> Tensor:
    return x_I / x_I.median().clamp_min(1e-30)


def round_weight(
    weight_OI: Tensor, scheme: Scheme, columns: Tensor, moments_II: Tensor | None = None
) -> QuantizedWeight:
    """Quantize a weight.

    Args:
        weight_OI: (O, I).
        scheme: how.
        columns: (K,) those that stay floats.
        moments_II: (I, I) sum of inputs' products over many tokens; None rounds each number to the nearest.
    """
    inputs = weight_OI.shape[1]
    group = scheme.group_of(inputs)
    left_OI = weight_OI.detach().float().clone()
    others = torch.ones(inputs, dtype=torch.bool).index_fill(0, columns.long(), False).nonzero().squeeze(1)
    order = torch.cat((others, columns.long()))  # what stays floats comes last and makes up for the rest
    spread_II = None if moments_II is None else _spread(moments_II, order)
    importance_I = None if moments_II is None else moments_II.diagonal()
    whole_OI = torch.zeros_like(left_OI)
    scales: list[Tensor] = []
    for begin in range(0, inputs, group):
        members = others[(others >= begin) & (others < begin + group)]
        part_OI = left_OI[:, members]
        scale_O = _scale(part_OI, None if importance_I is None else importance_I[members], scheme, group < inputs)
        scales.append(scale_O)
        for block in members.split(_BLOCK):
            _round_block(left_OI, whole_OI, scale_O, block, order, spread_II, scheme.bits)
    scales_OG = torch.stack(scales, dim=1)
    return QuantizedWeight(
        codes=whole_OI.to(torch.int8) if scheme.bits == 8 else pack_halves(whole_OI),
        scales=scales_OG if group >= inputs else scales_OG.to(torch.bfloat16),
        columns=columns.to(torch.int32),
        kept=left_OI[:, columns.long()].to(torch.float16),
        bits=scheme.bits,
        group=group,
        float_rows=scheme.float_rows,
    )


def _spread(moments_II: Tensor, order: Tensor) -> Tensor:
    """How each column's error is made up for by the later ones: the Cholesky factor of the inverse, (I, I) upper."""
    moments = moments_II.double()[order][:, order]
    mean = moments.diagonal().mean().clamp_min(1e-12)
    for damping in (0.01, 0.1, 1.0):
        damped = moments + damping * mean * torch.eye(len(moments), dtype=torch.float64)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()
    raise AssertionError("a damped matrix of moments has a factor")


def _scale(part_OI: Tensor, importance_I: Tensor | None, scheme: Scheme, short: bool) -> Tensor:
    """One scale an output, (O,), for a group of inputs; as it will be stored."""
    largest = LARGEST[scheme.bits]
    if not part_OI.shape[1]:
        return part_OI.new_ones(len(part_OI))
    top_O = part_OI.abs().amax(1).clamp_min(1e-20)

    def stored(scale_O: Tensor) -> Tensor:
        return scale_O.to(torch.bfloat16).float() if short else scale_O

    if scheme.bits == 8:
        return stored(top_O / largest)
    # With few steps it pays to look: the furthest number may be cut off, or take the one step that is without a twin.
    signed_O = part_OI.gather(1, part_OI.abs().argmax(1, keepdim=True)).squeeze(1)
    turned_O = torch.where(signed_O < 0, top_O, -top_O) / (largest + 1)
    weights_I = part_OI.new_ones(part_OI.shape[1]) if importance_I is None else importance_I
    best_O, least_O = torch.ones_like(top_O), torch.full_like(top_O, torch.inf)
    for base_O in (top_O / largest, turned_O):
        for share in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75):
            scale_O = stored(base_O * share)
            rounded = (part_OI / scale_O[:, None]).round_().clamp_(-largest - 1, largest) * scale_O[:, None]
            loss_O = ((rounded - part_OI).square_() * weights_I).sum(1)
            best_O = torch.where(loss_O < least_O, scale_O, best_O)
            least_O = torch.minimum(loss_O, least_O)
    return best_O


def _round_block(
    left_OI: Tensor,
    whole_OI: Tensor,
    scale_O: Tensor,
    block: Tensor,
    order: Tensor,
    spread_II: Tensor | None,
    bits: int,
) -> None:
    """Round these columns, and hand their errors on to those that come later in the order."""
    lowest = -LARGEST[bits] - (bits == 4)
    if spread_II is None:
        whole_OI[:, block] = (left_OI[:, block] / scale_O[:, None]).round().clamp(lowest, LARGEST[bits])
        return
    first = int((order == block[0]).nonzero())
    last = first + len(block)
    columns_OB = left_OI[:, block]
    errors_OB = torch.empty_like(columns_OB)
    own_BB = spread_II[first:last, first:last]
    for i in range(len(block)):
        column_O = columns_OB[:, i]
        whole_O = (column_O / scale_O).round().clamp(lowest, LARGEST[bits])
        whole_OI[:, block[i]] = whole_O
        errors_OB[:, i] = (column_O - whole_O * scale_O) / own_BB[i, i]
        columns_OB[:, i + 1 :] -= torch.outer(errors_OB[:, i], own_BB[i, i + 1 :])
    later = order[last:]
    left_OI[:, later] -= errors_OB @ spread_II[first:last, last:]
