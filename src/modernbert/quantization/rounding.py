"""Floats to whole numbers: which columns stay floats, where each group's scale lies, and how each number is rounded.

Rounding a column of a weight leaves an error in what it multiplies. Where it is known how the inputs vary together, the
columns that are rounded later make up for it (GPTQ, arXiv:2210.17323).

Shapes: I inputs, O outputs, G groups of J inputs, K kept columns.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from modernbert.quantization.weight import LARGEST, QuantizedWeight, pack_halves

_BLOCK = 64  # columns whose errors are handed on together
_AT_ONCE = 2**17  # numbers that are rounded at a time, few enough to stay in a core's cache
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
    largest_I = torch.maximum(weight_OI.amax(0), weight_OI.amin(0).neg())
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
    weight_OI = weight_OI.detach().float()
    if moments_II is None:
        whole_OI, scales_OG = _to_nearest(weight_OI, scheme, columns.long())
        kept_OK = weight_OI[:, columns.long()]
    else:
        whole_OI, scales_OG, kept_OK = _made_up_for(weight_OI, scheme, columns.long(), moments_II)
    return QuantizedWeight(
        codes=whole_OI if scheme.bits == 8 else pack_halves(whole_OI),
        scales=scales_OG if scheme.group_of(weight_OI.shape[1]) >= weight_OI.shape[1] else scales_OG.to(torch.bfloat16),
        columns=columns.to(torch.int32),
        kept=kept_OK.to(torch.float16).contiguous(),
        bits=scheme.bits,
        group=scheme.group_of(weight_OI.shape[1]),
        float_rows=scheme.float_rows,
    )


def _to_nearest(weight_OI: Tensor, scheme: Scheme, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Each number by itself: whole numbers (O, I) int8, 0 in the columns that stay floats, and scales (O, G)."""
    outputs, inputs = weight_OI.shape
    group = scheme.group_of(inputs)
    whole_OI = torch.zeros(outputs, inputs, dtype=torch.int8)
    scales_OG = torch.empty(outputs, -(-inputs // group))
    taken_I = torch.zeros(inputs, dtype=torch.bool).index_fill(0, columns, True)
    members = [group * g + (~of).nonzero().squeeze(1) for g, of in enumerate(taken_I.split(group))]
    empty = [g for g, of in enumerate(members) if not len(of)]
    at_once = _AT_ONCE // (inputs if scheme.bits == 8 else group)
    for first in range(0, outputs, max(1, at_once)):
        rows = slice(first, min(first + max(1, at_once), outputs))
        if scheme.bits == 8:
            # Columns that stay floats are zeros here, which change no scale and round to 0.
            part_OI = weight_OI[rows].masked_fill(taken_I, 0.0)
            part_OI = F.pad(part_OI, (0, -inputs % group)) if inputs % group else part_OI
            part_OGJ = part_OI.unflatten(1, (len(members), -1))
            scale_OG = _scale(part_OGJ, None, scheme, group < inputs)
            scale_OG[:, empty] = 1.0
            whole_OI[rows] = _rounded(part_OGJ, scale_OG, scheme.bits).flatten(1)[:, :inputs]
            scales_OG[rows] = scale_OG
            continue
        for g, of in enumerate(members):
            part_OJ = weight_OI[rows, of]
            scales_OG[rows, g] = scale_O = _scale(part_OJ, None, scheme, group < inputs)
            whole_OI[rows, of] = _rounded(part_OJ, scale_O, scheme.bits).to(torch.int8)
    return whole_OI, scales_OG


def _rounded(part_J: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Whole numbers nearest to (..., J) numbers, written over them, as floats."""
    return part_J.div_(scale[..., None]).round_().clamp_(-LARGEST[bits] - (bits == 4), LARGEST[bits])


def _made_up_for(
    weight_OI: Tensor, scheme: Scheme, columns: Tensor, moments_II: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Column after column, each handing its error on: what `_to_nearest` gives, and the columns that stay floats.

    The columns lie in the order in which they are rounded, as rows: what is computed with is contiguous.
    """
    outputs, inputs = weight_OI.shape
    group = scheme.group_of(inputs)
    others = torch.ones(inputs, dtype=torch.bool).index_fill(0, columns, False).nonzero().squeeze(1)
    order = torch.cat((others, columns))  # what stays floats comes last and makes up for the rest
    spread_II = _spread(moments_II, order)
    importance_I = moments_II.diagonal()[order]
    left_IO = weight_OI.mT.contiguous()[order]
    whole_IO = torch.zeros(inputs, outputs, dtype=torch.int8)
    scales: list[Tensor] = []
    cuts = torch.arange(0, inputs + group, group).clamp_max(inputs)
    for begin, end in itertools.pairwise(torch.searchsorted(others, cuts).tolist()):
        part_OJ = left_IO[begin:end].mT.contiguous()
        scale_O = _scale(part_OJ, importance_I[begin:end], scheme, group < inputs)
        scales.append(scale_O)
        for first in range(begin, end, _BLOCK):
            last = min(first + _BLOCK, end)
            whole_IO[others[first:last]] = _round_block(left_IO, scale_O, first, last, spread_II, scheme.bits)
    kept_OK = left_IO[len(others) :].mT
    return whole_IO.mT.contiguous(), torch.stack(scales, dim=1), kept_OK


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


def _scale(part_J: Tensor, importance_J: Tensor | None, scheme: Scheme, short: bool) -> Tensor:
    """The scale (...) of each group of (..., J) numbers, as it will be stored."""
    largest = LARGEST[scheme.bits]
    if not part_J.shape[-1]:
        return part_J.new_ones(part_J.shape[:-1])
    top = torch.maximum(part_J.amax(-1), part_J.amin(-1).neg_()).clamp_min_(1e-20)
    if scheme.bits == 8:
        return _stored(top / largest, short)
    # With few steps it pays to look: the furthest number may be cut off, or take the one step that is without a twin.
    signed = part_J.gather(-1, part_J.abs().argmax(-1, keepdim=True)).squeeze(-1)
    turned = torch.where(signed < 0, top, -top) / (largest + 1)
    best, least = torch.ones_like(top), torch.full_like(top, torch.inf)
    lost_J = torch.empty_like(part_J)
    for base in (top / largest, turned):
        for share in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75):
            scale = _stored(base * share, short)
            torch.div(part_J, scale[..., None], out=lost_J).round_().clamp_(-largest - 1, largest)
            lost_J.mul_(scale[..., None]).sub_(part_J).square_()
            lost = (lost_J if importance_J is None else lost_J.mul_(importance_J)).sum(-1)
            best = torch.where(lost < least, scale, best)
            least = torch.minimum(lost, least)
    return best


def _stored(scale: Tensor, short: bool) -> Tensor:
    return scale.to(torch.bfloat16).float() if short else scale


def _round_block(left_IO: Tensor, scale_O: Tensor, first: int, last: int, spread_II: Tensor, bits: int) -> Tensor:
    """Round columns `first` to `last` - 1 of the order, (columns, O) int8, and hand their errors on to later ones."""
    lowest = -LARGEST[bits] - (bits == 4)
    columns_BO, own_BB = left_IO[first:last], spread_II[first:last, first:last]
    whole_BO, errors_BO = torch.empty_like(columns_BO), torch.empty_like(columns_BO)
    steps = own_BB.diagonal().tolist()
    for i, step in enumerate(steps):
        whole_O, error_O = whole_BO[i], errors_BO[i]
        torch.div(columns_BO[i], scale_O, out=whole_O).round_().clamp_(lowest, LARGEST[bits])
        torch.sub(columns_BO[i], whole_O * scale_O, out=error_O).div_(step)
        columns_BO[i + 1 :] -= own_BB[i, i + 1 :, None] * error_O
    left_IO[last:] -= spread_II[first:last, last:].mT @ errors_BO
    return whole_BO.to(torch.int8)
