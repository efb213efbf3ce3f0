"""What the kernels do, on tensors: products of packed weights, attention, and programs of many of them.

Every row of a result depends on its own inputs alone, bit for bit, whatever the batch and the number of threads.

Shapes: T tokens of all texts together, I inputs, O outputs, H heads, D head size, B texts, N texts with a new token.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modernbert.decoding.continuation import Steps
from modernbert.engines.cpu import library as native
from modernbert.engines.weights import Norm

Angles = tuple[Tensor, Tensor]  # of `nn.rotary.rope_tables`: cosines, and sines with their sign, (T, 1, D) float32
_KINDS = {
    native.Product: ("product", native.PRODUCT),
    native.Normalize: ("normalize", native.NORMALIZE),
    native.Attention: ("attention", native.ATTENTION),
    native.Step: ("step", native.STEP),
    native.Maxima: ("maxima", native.MAXIMA),
}


def _library() -> native.Library:
    found = native.library()
    assert found is not None
    return found


def _operation(struct: ctypes.Structure) -> native.Operation:
    """An operation, with a copy of what it is to do."""
    name, kind = _KINDS[type(struct)]
    operation = native.Operation(kind)
    setattr(operation.body, name, struct)
    return operation


def _run(operation: native.Operation) -> None:
    _library().run(ctypes.addressof(operation), 1)


def _point(struct: Any, name: str, x: Tensor) -> None:
    """Rows of a tensor as a field `name`_data, _stride, _dtype of a structure."""
    assert x.device.type == "cpu"
    setattr(struct, f"{name}_data", x.data_ptr())
    setattr(struct, f"{name}_stride", x.stride(0))
    setattr(struct, f"{name}_dtype", native.DTYPES[x.dtype])


def point_norm(struct: Any, norm: Norm) -> Norm:
    """Have a structure read a LayerNorm's numbers: those of the float32 copy that is returned, to be kept alive."""
    weight = norm.weight.detach().float().clone()
    bias = None if norm.bias is None else norm.bias.detach().float().clone()
    struct.norm_weight, struct.epsilon = weight.data_ptr(), norm.eps
    struct.norm_bias = None if bias is None else bias.data_ptr()
    return Norm(weight, bias, norm.eps)


class NativeWeight:
    """A weight, with its bias, laid out for `Product`.

    Args:
        weight_OI: (O, I), float32 or bfloat16, on the CPU.
        bias_O: (O,) or None.
        gated: lay the first half of the outputs beside the second half, which gates it.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None, gated: bool = False) -> None:
        self.shape, self.dtype, self.gated = weight_OI.shape, weight_OI.dtype, gated
        self.struct = native.Weight(*weight_OI.shape, gated, native.DTYPES[weight_OI.dtype])
        self._lay_out(weight_OI.detach().contiguous(), bias_O)

    def _lay_out(self, plain: Tensor, bias_O: Tensor | None) -> None:
        bias = None if bias_O is None else bias_O.detach().float().contiguous()
        self._memory = torch.empty(_library().size(self.struct) + 64, dtype=torch.uint8, device="cpu")
        self.struct.packed = -(-self._memory.data_ptr() // 64) * 64
        self.struct.plain = plain.data_ptr()
        self.struct.bias = None if bias is None else bias.data_ptr()
        _library().lay_out(self.struct, to_packed=True)

    def product(self, x_TI: Tensor) -> Tensor:
        """(T, I) to (T, O), of the dtype of x."""
        return Product(self)(x_TI if x_TI.stride(1) == 1 else x_TI.contiguous())

    def to_dense(self) -> Tensor:
        """The weight, (O, I)."""
        plain = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        self._unpack_into(plain)
        return plain

    def _unpack_into(self, plain: Tensor) -> None:
        struct = native.Weight.from_buffer_copy(self.struct)
        struct.plain = plain.data_ptr()
        _library().lay_out(struct, to_packed=False)


class Product:
    """norm(x) @ weight.T + bias, written, added to what is there, or gated.

    Args:
        weight: the packed weight.
        norm: LayerNorm of the rows before.
        add: add to the output instead of writing it.
        activation: of a gated weight's first half, a key of `ACTIVATIONS`.
    """

    def __init__(
        self, weight: NativeWeight, norm: Norm | None = None, add: bool = False, activation: str = "gelu"
    ) -> None:
        assert not (weight.gated and add)
        self.outputs = weight.shape[0] // 2 if weight.gated else weight.shape[0]
        self.struct = native.Product(weight=weight.struct)
        self.struct.epilogue = native.GATE if weight.gated else native.ADD if add else native.WRITE
        self.struct.activation = native.ACTIVATIONS[activation]
        self.weight = weight  # kept alive, as the norm
        self.norm = None if norm is None else point_norm(self.struct, norm)

    def __call__(self, x_TI: Tensor, out_TO: Tensor | None = None) -> Tensor:
        """(T, I) into (T, O), or (T, O / 2) of a gated weight; both may be columns of wider rows."""
        if out_TO is None:
            out_TO = x_TI.new_empty(len(x_TI), self.outputs)
        assert x_TI.stride(1) == out_TO.stride(1) == 1 or not len(x_TI)
        assert x_TI.shape == (len(out_TO), self.weight.shape[1])
        assert out_TO.shape[1] == self.outputs
        operation = _operation(self.struct)  # a copy: several threads may run one product
        struct = operation.body.product
        struct.rows = len(x_TI)
        _point(struct, "x", x_TI)
        _point(struct, "out", out_TO)
        _run(operation)
        return out_TO


def maxima(weight: NativeWeight, x_TI: Tensor, lengths: Sequence[int]) -> Tensor:
    """Of each output the largest product with the rows of each text, (B, O) float32; the products are never stored.

    Args:
        weight: (O, I), not gated, without a bias.
        x_TI: the texts' rows, of the weight's dtype.
        lengths: rows of each text, at least 1.
    """
    x_TI = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int64)
    assert x_TI.shape == (int(starts[-1]), weight.shape[1])
    out_BO = torch.empty(len(lengths), weight.shape[0], dtype=torch.float32, device="cpu")
    product = native.Product(rows=len(x_TI), weight=weight.struct, epilogue=native.LARGEST)
    _point(product, "x", x_TI)
    _point(product, "out", out_BO)
    _run(_operation(native.Maxima(texts=len(lengths), starts=starts.data_ptr(), product=product)))
    return out_BO


def attention(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    out_THD: Tensor,
    starts: Tensor,
    *,
    reach: tuple[int | None, int | None] = (None, None),
    positions_T: Tensor | None = None,
    angles: Angles | None = None,
) -> Tensor:
    """Softmax attention of each query over its own text's keys within reach, scores scaled by D**-0.5.

    Args:
        q_THD, k_THD, v_THD: heads and their numbers are contiguous, rows may be far apart.
        out_THD: what is written; may be `q_THD`.
        starts: (B + 1,) int64, the first token of each text and the end.
        reach: inclusive (left, right) in positions; None on a side is to the text's end.
        positions_T: (T,) int64, rising within a text; needed for a reach.
        angles: rotate queries and keys on the way.
    """
    heads, head_dim = q_THD.shape[1:]
    left, right = (-1 if end is None else end for end in reach)
    struct = native.Attention(heads=heads, head_dim=head_dim, left=left, right=right, scale=head_dim**-0.5)
    struct.texts, struct.starts = len(starts) - 1, starts.data_ptr()
    if tuple(reach) != (None, None):
        assert positions_T is not None
        struct.positions = struct.key_positions = positions_T.data_ptr()
    if angles is not None:
        struct.cos, struct.sin = struct.key_cos, struct.key_sin = [table.data_ptr() for table in angles]
    for name, x in zip(("q", "k", "v", "out"), (q_THD, k_THD, v_THD, out_THD), strict=True):
        assert x.stride()[1:] == (x.shape[2], 1) or not len(x)
        _point(struct, name, x)
    _run(_operation(struct))
    return out_THD


def attend_step(qkv_N3HD: Tensor, angles: Angles, step: Steps, layer: int) -> Tensor:
    """Attention of one new token of each of N texts, after its key and value were rotated and stored: (N, H, D).

    Args:
        qkv_N3HD: of the new tokens, not rotated; contiguous.
        angles: theirs, (N, 1, D).
        step: where they go, and what they attend to.
        layer: whose storage it is.
    """
    texts, _, heads, head_dim = qkv_N3HD.shape
    struct = native.Step(texts=texts, heads=heads, head_dim=head_dim, scale=head_dim**-0.5, most=step.most)
    struct.rows, struct.first, struct.length = (t.data_ptr() for t in (step.slots_N, step.first_N, step.length_N))
    if step.left is not None:
        struct.positions, struct.key_positions = step.positions_N.data_ptr(), step.storage.positions_R.data_ptr()
        struct.left = step.left
    struct.cos, struct.sin = (table.data_ptr() for table in angles)
    out_NHD = torch.empty_like(qkv_N3HD[:, 0], memory_format=torch.contiguous_format)
    rows = (*qkv_N3HD.unbind(1), out_NHD, *step.storage.layers[layer])
    for name, x in zip(("q", "k", "v", "out", "keys", "values"), rows, strict=True):
        _point(struct, name, x)
    _run(_operation(struct))
    return out_NHD


@functools.cache
def _column(struct: type[ctypes.Structure], name: str) -> int:
    """Where a field lies in an operation, in words of eight bytes."""
    offset: int = getattr(struct, name).offset
    return (native.Operation.body.offset + offset) // 8


class Program:
    """Operations that run one after another in one call, as a table whose cells can be set.

    Args:
        structs: what is to be run.
    """

    def __init__(self, structs: list[ctypes.Structure]) -> None:
        table = b"".join(bytes(_operation(struct)) for struct in structs)
        self._words = np.frombuffer(table, dtype=np.int64).reshape(len(structs), -1).copy()

    def begin(self) -> Program:
        """A copy for one pass, so that several threads may run one program."""
        new = object.__new__(Program)
        new._words = self._words.copy()
        return new

    def set(self, rows: Any, struct: type[ctypes.Structure], /, **cells: Any) -> None:
        """Set fields of rows that hold such a structure: to one number or one a row. A tensor means its address."""
        for name, value in cells.items():
            self._words[rows, _column(struct, name)] = value.data_ptr() if isinstance(value, Tensor) else value

    def run(self, first: int = 0, last: int | None = None) -> None:
        """Run rows `first` to `last` - 1."""
        part = self._words[first:last]
        _library().run(part.ctypes.data, len(part))
