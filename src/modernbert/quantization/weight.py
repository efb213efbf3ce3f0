"""Weights of 8 or 4 bits, and their products with rows that are brought to 8 bits on the way.

A weight is cut into groups of inputs; each output has a scale a group. A row is cut the same way, and each of its
groups divided by its own largest number: what a row becomes depends on nothing but the row. Products of integers are
exact in any order, so nothing depends on the batch, on any machine (docs/invariance.md). A few columns may stay floats:
inputs that reach far beyond the others would leave those no digits.

`QuantizedWeight.product` is the definition, in PyTorch's own operations; the kernels of `engines.cpu` are the fast way.

Shapes: T rows, I inputs, O outputs, G groups, K kept columns.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from modernbert.engines.cpu.library import Weight, library
from modernbert.engines.cpu.operations import NativeWeight
from modernbert.errors import InputError
from modernbert.nn.linear import linear

BITS = {8: 2, 4: 3}  # kernels.h
LARGEST = {8: 127, 4: 7}
GROUP = 32  # inputs that share a scale, where a weight has more than one scale an output


class QuantizedRows(NamedTuple):
    """Rows as whole numbers of -127 to 127, (T, G, group) in floats, and the scale of each group, (T, G)."""

    whole: Tensor
    scales: Tensor


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A weight of (O, I) numbers of 8 or 4 bits.

    Raises:
        InputError: a sum over a group of whole numbers may not fit 32 bits.
    """

    codes: Tensor  # (O, I) int8, -127 to 127; of 4 bits (O, I / 2) uint8, two numbers 8 too large a byte, the first low
    scales: Tensor  # (O, G), float32 or bfloat16
    columns: Tensor  # (K,) int32, inputs whose numbers are floats; their codes stand for 0
    kept: Tensor  # (O, K) float16, those numbers
    bits: int  # 8 or 4
    group: int  # inputs that share a scale, a multiple of 4; the last group may be shorter
    float_rows: bool = False  # whether rows stay floats, and the weight alone is quantized

    def __post_init__(self) -> None:
        # Kernels add up products of unsigned weights and signed bytes.
        most = (2**31 - 1) // ((255 if self.bits == 8 else 15) * LARGEST[8])
        if self.group > most and not self.float_rows:
            raise InputError(
                f"a weight of {self.shape[1]:,} inputs has {self.group:,} of them in a group; "
                f"sums of int{self.bits} products hold {most:,} at most; choose a weight-only scheme"
            )

    @property
    def shape(self) -> torch.Size:
        """(O, I)."""
        outputs, stored = self.codes.shape
        return torch.Size((outputs, stored if self.bits == 8 else 2 * stored))

    def whole(self, rows: Tensor | None = None) -> Tensor:
        """The codes as whole numbers, (O, I) int8; of these rows alone where given."""
        codes = self.codes if rows is None else self.codes[rows]
        if self.bits == 8:
            return codes
        return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).to(torch.int8) - 8

    def outputs(self, rows: slice) -> QuantizedWeight:
        parts: dict[str, Any] = {name: getattr(self, name)[rows].contiguous() for name in ("codes", "scales", "kept")}
        return dataclasses.replace(self, **parts, columns=self.columns.clone())

    def to_dense(self, rows: Tensor | None = None) -> Tensor:
        """The numbers that the codes stand for, (O, I) float32; of these rows alone where given."""
        whole = self.whole(rows)
        scales, kept = (x.float() if rows is None else x[rows].float() for x in (self.scales, self.kept))
        inputs = self.shape[1]
        dense = whole.float() * scales.repeat_interleave(self.group, dim=-1)[..., :inputs]
        if len(self.columns):
            dense[..., self.columns.long()] = kept
        return dense

    def product(self, x_TI: Tensor) -> Tensor:
        """(T, I) to (T, O), of the dtype of x: what the kernels compute, slowly."""
        with torch.autocast(x_TI.device.type, enabled=False):
            return self._product(x_TI.float()).to(x_TI.dtype)

    def _product(self, x_TI: Tensor) -> Tensor:
        if self.float_rows:
            return linear(x_TI, self.to_dense())
        columns = self.columns.long()
        rows = quantize_rows(x_TI.index_fill(1, columns, 0.0), self.group)
        whole_OI = F.pad(self.whole().float(), (0, -self.shape[1] % self.group))
        out_TO = x_TI.new_zeros(len(x_TI), len(whole_OI))
        if len(columns):
            out_TO = linear(x_TI[:, columns].contiguous(), self.kept.float())
        # Floats hold these sums of integers exactly, in pieces of 1,024 products of at most 127 squared.
        for g, codes_OI in enumerate(whole_OI.split(self.group, dim=1)):
            pieces = zip(rows.whole[:, g].split(1024, dim=1), codes_OI.split(1024, dim=1), strict=True)
            sums_TO = sum((a @ b.mT for a, b in pieces), start=out_TO.new_zeros(()))
            out_TO = out_TO + sums_TO * (self.scales[:, g].float() * rows.scales[:, g, None])
        return out_TO

    def is_cut_like(self, other: QuantizedWeight) -> bool:
        """Whether two weights that read the same inputs can become one."""
        cut = (self.bits, self.group, self.float_rows) == (other.bits, other.group, other.float_rows)
        return cut and torch.equal(self.columns, other.columns)

    @staticmethod
    def together(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """Weights that read the same inputs and are cut alike, as one."""
        joined: dict[str, Any] = {
            name: torch.cat([getattr(weight, name) for weight in weights]) for name in ("codes", "scales", "kept")
        }
        return dataclasses.replace(weights[0], **joined)

    def map(self, move: Callable[[Tensor], Tensor]) -> QuantizedWeight:
        moved: dict[str, Any] = {name: move(getattr(self, name)) for name in ("codes", "scales", "columns", "kept")}
        return dataclasses.replace(self, **moved)


def quantize_rows(x_TI: Tensor, group: int) -> QuantizedRows:
    """Divide each group of each row by 1/127 of its largest number, and round."""
    parts = F.pad(x_TI.float(), (0, -x_TI.shape[1] % group)).unflatten(1, (-1, group))
    top = parts.abs().amax(-1)
    inverse = torch.where(top > 1e-30, 127.0 / top, 0.0)
    return QuantizedRows((parts * inverse[..., None]).round(), top / 127.0)


def pack_halves(whole_OI: Tensor) -> Tensor:
    """Whole numbers of -8 to 7, (O, I) with an even I, two in a byte: (O, I / 2) uint8."""
    low, high = (whole_OI + 8).to(torch.uint8).unflatten(1, (-1, 2)).unbind(-1)
    return low | high << 4


class Integers(abc.ABC):
    """A quantized weight as it is multiplied by, with the bias as it was then."""

    bias: Tensor | None

    @abc.abstractmethod
    def to_quantized(self) -> QuantizedWeight:
        """The weight in its plain layout."""

    def to_dense(self) -> Tensor:
        """The numbers that the codes stand for, (O, I) float32."""
        return self.to_quantized().to_dense()

    def holds(self, bias_O: Tensor | None) -> bool:
        """Whether this is the bias that was laid out; PyTorch counts no writes through `.data`, so it is compared."""
        if bias_O is None or self.bias is None:
            return bias_O is self.bias
        return not self.bias.is_meta and torch.equal(bias_O, self.bias)


class PackedIntegers(Integers, NativeWeight):
    """Laid out for the kernels.

    Args:
        weight: on the CPU.
        bias_O: (O,) or None.
        gated: lay the first half of the outputs beside the second half, which gates it.
    """

    def __init__(self, weight: QuantizedWeight, bias_O: Tensor | None = None, gated: bool = False) -> None:
        # What is kept here beside the panels is small: scales, and a few columns.
        self.parts = dataclasses.replace(weight, codes=weight.codes.new_empty(0))
        self.shape, self.dtype, self.gated = weight.shape, torch.float32, gated
        self.bias = None if bias_O is None else bias_O.detach().clone()
        scales, kept = weight.scales.float().contiguous(), weight.kept.float().contiguous()
        self._columns = weight.columns.contiguous()
        self.struct = Weight(*weight.shape, gated, BITS[weight.bits], group=weight.group, scales=scales.data_ptr())
        self.struct.kept, self.struct.columns = len(self._columns), self._columns.data_ptr()
        self.struct.kept_weights, self.struct.float_rows = kept.data_ptr(), weight.float_rows
        self._lay_out(weight.codes.contiguous(), bias_O)

    def to_quantized(self) -> QuantizedWeight:
        outputs, inputs = self.shape
        dtype, stored = (torch.int8, inputs) if self.parts.bits == 8 else (torch.uint8, inputs // 2)
        codes = torch.empty(outputs, stored, dtype=dtype, device="cpu")
        self._unpack_into(codes)
        return dataclasses.replace(self.parts, codes=codes)


class PlainIntegers(Integers):
    """As it is, where there are no kernels."""

    def __init__(self, weight: QuantizedWeight, bias_O: Tensor | None = None) -> None:
        self.weight, self.bias = weight, None if bias_O is None else bias_O.detach().clone()

    def product(self, x_TI: Tensor) -> Tensor:
        out_TO = self.weight.product(x_TI)
        return out_TO if self.bias is None else out_TO + self.bias.to(out_TO.dtype)

    def to_quantized(self) -> QuantizedWeight:
        return self.weight


def pack_quantized(
    weight: QuantizedWeight, bias_O: Tensor | None = None, gated: bool = False
) -> PackedIntegers | PlainIntegers:
    if weight.codes.device.type == "cpu" and library() is not None:
        return PackedIntegers(weight, bias_O, gated)
    return PlainIntegers(weight, bias_O)
