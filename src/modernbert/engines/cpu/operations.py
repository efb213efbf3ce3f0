"""What the kernels do, on tensors: products of packed weights, LayerNorm, attention, and programs of many of them.

Every row of a result depends on its own inputs alone, bit for bit, whatever the batch and the number of threads.

Shapes: T tokens of all texts together, I inputs, O outputs, M width, H heads, D head size, B texts.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from modernbert.engines.cpu.library import (
    ACTIVATIONS,
    ADD,
    ATTENTION,
    DTYPES,
    GATE,
    NORMALIZE,
    PRODUCT,
    STEP,
    WRITE,
    Attention,
    Library,
    Normalize,
    Operation,
    Step,
    Weight,
    library,
)
from modernbert.engines.cpu.library import Product as ProductStruct


def _library() -> Library:
    found = library()
    assert found is not None
    return found


def _point(struct: Any, name: str, x: Tensor) -> None:
    """Rows of a tensor as a field `name`_data, _stride, _dtype of a structure."""
    assert x.device.type == "cpu"
    setattr(struct, f"{name}_data", x.data_ptr())
    setattr(struct, f"{name}_stride", x.stride(0))
    setattr(struct, f"{name}_dtype", DTYPES[x.dtype])


def _run(operation: Operation) -> None:
    _library().run(ctypes.addressof(operation), 1)


class Norm(NamedTuple):
    """A LayerNorm's numbers, float32."""

    weight: Tensor
    bias: Tensor | None
    epsilon: float

    @classmethod
    def of(cls, norm: Any) -> Norm:
        """A copy of the weight, the bias and the eps that a module or a tuple holds."""
        bias = None if norm.bias is None else norm.bias.detach().float().clone()
        return cls(norm.weight.detach().float().clone(), bias, norm.eps)

    def write(self, struct: Any) -> None:
        """Point a structure at them."""
        struct.norm_weight = self.weight.data_ptr()
        struct.norm_bias = None if self.bias is None else self.bias.data_ptr()
        struct.epsilon = self.epsilon


class NativeWeight:
    """A weight, with its bias, laid out for `Product`.

    Args:
        weight_OI: (O, I), float32 or bfloat16, on the CPU.
        bias_O: (O,) or None.
        gated: lay the first half of the outputs beside the second half, which gates it.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None, gated: bool = False) -> None:
        self.shape, self.dtype, self.gated = weight_OI.shape, weight_OI.dtype, gated
        self.struct = Weight(*weight_OI.shape, gated, DTYPES[weight_OI.dtype])
        self._lay_out(weight_OI.detach().contiguous(), bias_O)

    def _lay_out(self, plain: Tensor, bias_O: Tensor | None) -> None:
        bias = None if bias_O is None else bias_O.detach().float().contiguous()
        self._memory = torch.empty(_library().size(self.struct) + 64, dtype=torch.uint8, device="cpu")
        self.struct.packed = -(-self._memory.data_ptr() // 64) * 64
        self.struct.plain = plain.data_ptr()
        self.struct.bias = None if bias is None else bias.data_ptr()
        _library().lay_out("pack", self.struct)

    def product(self, x_TI: Tensor) -> Tensor:
        """(T, I) to (T, O), of the dtype of x."""
        return Product(self)(x_TI if x_TI.stride(1) == 1 else x_TI.contiguous())

    # A compiler that traced this would warn of the pointers; PyTorch leaves the decorator without types.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def to_dense(self) -> Tensor:
        """The weight, (O, I)."""
        plain = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        self._unpack_into(plain)
        return plain

    def _unpack_into(self, plain: Tensor) -> None:
        struct = Weight.from_buffer_copy(self.struct)
        struct.plain = plain.data_ptr()
        _library().lay_out("unpack", struct)


class Product:
    """norm(x) @ weight.T + bias, written, added to what is there, or gated.

    Args:
        weight: the packed weight.
        norm: LayerNorm of the rows before.
        add: add to the output in place of writing it.
        activation: of a gated weight's first half, a key of `ACTIVATIONS`.
    """

    def __init__(
        self, weight: NativeWeight, norm: Norm | None = None, add: bool = False, activation: str = "gelu"
    ) -> None:
        assert not (weight.gated and add)
        self.weight, self.norm = weight, norm  # kept alive
        self.outputs = weight.shape[0] // 2 if weight.gated else weight.shape[0]
        self.struct = ProductStruct(weight=weight.struct)
        self.struct.epilogue = GATE if weight.gated else ADD if add else WRITE
        self.struct.activation = ACTIVATIONS[activation]
        if norm is not None:
            norm.write(self.struct)

    def __call__(self, x_TI: Tensor, out_TO: Tensor | None = None) -> Tensor:
        """(T, I) into (T, O), or (T, O / 2) of a gated weight; both may be columns of wider rows."""
        if out_TO is None:
            out_TO = x_TI.new_empty(len(x_TI), self.outputs)
        assert x_TI.stride(1) == out_TO.stride(1) == 1 or not len(x_TI)
        assert x_TI.shape == (len(out_TO), self.weight.shape[1])
        assert out_TO.shape[1] == self.outputs
        operation = Operation(PRODUCT)
        operation.body.product = self.struct  # a copy: several threads may run one product
        struct = operation.body.product
        struct.rows = len(x_TI)
        _point(struct, "x", x_TI)
        _point(struct, "out", out_TO)
        _run(operation)
        return out_TO


def normalize(x_TM: Tensor, norm: Norm, out_TM: Tensor, ids_T: Tensor | None = None) -> Tensor:
    """LayerNorm of rows, or of the rows of a table that `ids_T` (int64) names."""
    operation = Operation(NORMALIZE)
    struct = operation.body.normalize
    struct.rows, struct.width = out_TM.shape
    struct.ids = None if ids_T is None else ids_T.data_ptr()
    _point(struct, "table", x_TM)
    _point(struct, "out", out_TM)
    norm.write(struct)
    _run(operation)
    return out_TM


class Angles(NamedTuple):
    """Rotary tables of `ops.rope`: cosines, and sines with the sign that they are added with, (T, 1, D) float32."""

    cos: Tensor
    sin: Tensor


class Keys(NamedTuple):
    """Where the keys of each text lie, if not where its queries do: `length` rows from `first`, (B,) int64 each."""

    first: Tensor
    length: Tensor


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
    keys: Keys | None = None,
) -> Tensor:
    """Softmax attention of each query over its own text's keys within reach, scores scaled by D**-0.5.

    Args:
        q_THD: queries; heads and their numbers are contiguous, rows may be far apart.
        k_THD: keys, likewise.
        v_THD: values, likewise.
        out_THD: what is written; may be `q_THD`.
        starts: (B + 1,) int64, the first query of each text and the end.
        reach: inclusive (left, right) in positions; None on a side is to the text's end.
        positions_T: (T,) int64, rising within a text; needed for a reach.
        angles: rotate queries and keys on the way; queries alone where `keys` are given.
        keys: where the keys lie; then every query of a text sees all of them.
    """
    assert keys is None or tuple(reach) == (None, None)
    operation = Operation(ATTENTION)
    struct = operation.body.attention
    struct.texts, struct.heads, struct.head_dim = len(starts) - 1, q_THD.shape[1], q_THD.shape[2]
    struct.starts = starts.data_ptr()
    struct.left, struct.right = (-1 if r is None else r for r in reach)
    struct.scale = q_THD.shape[2] ** -0.5
    if tuple(reach) != (None, None):
        assert positions_T is not None
        struct.positions = struct.key_positions = positions_T.data_ptr()
    if angles is not None:
        struct.cos, struct.sin = (t.data_ptr() for t in angles)
        if keys is None:
            struct.key_cos, struct.key_sin = struct.cos, struct.sin
    if keys is not None:
        struct.key_first, struct.key_length = (t.data_ptr() for t in keys)
    for name, x in zip(("q", "k", "v", "out"), (q_THD, k_THD, v_THD, out_THD), strict=True):
        assert x.stride()[1:] == (x.shape[2], 1) or not len(x)
        _point(struct, name, x)
    _run(operation)
    return out_THD


def attend_step(
    qkv_N3HD: Tensor,
    angles: Angles,
    rows_N: Tensor,
    looks: tuple[Tensor, Tensor, int],
    keys_RHD: Tensor,
    values_RHD: Tensor,
    seen: tuple[Tensor, Tensor, int] | None,
) -> Tensor:
    """Attention of one new token each of N texts, after its key and value were rotated and stored: (N, H, D).

    Args:
        qkv_N3HD: of the new tokens, not rotated; contiguous.
        angles: theirs, (N, 1, D).
        rows_N: (N,) int64, the stored row that each new key and value goes to.
        looks: (N,) first stored row of each text, (N,) how many there are, and the most of them.
        keys_RHD: stored keys; written to.
        values_RHD: stored values, likewise.
        seen: positions of the new tokens and of all stored rows, and how far back a token sees; None sees all.
    """
    operation = Operation(STEP)
    struct = operation.body.step
    struct.texts, _, struct.heads, struct.head_dim = qkv_N3HD.shape
    first_N, length_N, struct.most = looks
    struct.rows, struct.first, struct.length = (t.data_ptr() for t in (rows_N, first_N, length_N))
    if seen is not None:
        struct.positions, struct.key_positions, struct.left = seen[0].data_ptr(), seen[1].data_ptr(), seen[2]
    struct.cos, struct.sin = (t.data_ptr() for t in angles)
    struct.scale = qkv_N3HD.shape[3] ** -0.5
    out_NHD = torch.empty_like(qkv_N3HD[:, 0], memory_format=torch.contiguous_format)
    new = zip(("q", "k", "v"), qkv_N3HD.unbind(1), strict=True)
    for name, x in (*new, ("out", out_NHD), ("keys", keys_RHD), ("values", values_RHD)):
        _point(struct, name, x)
    _run(operation)
    return out_NHD


@functools.cache
def _column(struct: type[ctypes.Structure], name: str) -> int:
    """Where a field lies in an operation, in words of eight bytes."""
    offset: int = getattr(struct, name).offset
    return (Operation.body.offset + offset) // 8


class Program:
    """Operations that run one after another in one call, as a table whose cells can be set.

    Args:
        structs: what is to be run.
    """

    def __init__(self, structs: list[ProductStruct | Normalize | Attention | Step]) -> None:
        kinds = {
            ProductStruct: ("product", PRODUCT),
            Normalize: ("normalize", NORMALIZE),
            Attention: ("attention", ATTENTION),
            Step: ("step", STEP),
        }
        table = (Operation * len(structs))()
        for operation, struct in zip(table, structs, strict=True):
            name, operation.kind = kinds[type(struct)]
            setattr(operation.body, name, struct)
        self._words = np.frombuffer(bytes(table), dtype=np.int64).reshape(len(structs), -1).copy()

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
