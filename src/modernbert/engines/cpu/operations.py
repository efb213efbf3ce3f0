"""What the kernels do, on tensors: products of packed weights, attention, and programs of many of them.

Every row of a result depends on its own inputs alone, bit for bit, whatever the batch and the number of threads.

Shapes: T tokens of all texts together, I inputs, O outputs, H heads, D head size, B texts, N texts with a new token.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import itertools
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modernbert.decoding.continuation import Steps
from modernbert.engines.cpu import library as native
from modernbert.engines.cpu.memory import memory_for
from modernbert.engines.weights import Norm

Angles = tuple[Tensor, Tensor]  # of `nn.rotary.rope_tables`: cosines, and sines with their sign, (T, 1, D) float32
_KINDS = {
    native.Product: ("product", native.PRODUCT),
    native.Normalize: ("normalize", native.NORMALIZE),
    native.Attention: ("attention", native.ATTENTION),
    native.Step: ("step", native.STEP),
    native.Maxima: ("maxima", native.MAXIMA),
    native.Tables: ("tables", native.TABLES),
    native.Activate: ("activate", native.ACTIVATE),
    native.Training: ("training", native.TRAINING),
}
_TRAINING_KINDS = {
    native.Matmul: ("matmul", native.MATMUL),
    native.NormBack: ("norm", native.NORM_BACK),
    native.AttentionBack: ("attention", native.ATTENTION_BACK),
    native.Adam: ("adam", native.ADAM),
}


def _library() -> native.Library:
    found = native.library()
    assert found is not None
    return found


def _operation(struct: ctypes.Structure) -> native.Operation:
    """An operation, with a copy of what it is to do."""
    if type(struct) in _TRAINING_KINDS:
        name, kind = _TRAINING_KINDS[type(struct)]
        training = native.Training(kind)
        setattr(training.body, name, struct)
        struct = training
    name, kind = _KINDS[type(struct)]
    operation = native.Operation(kind)
    setattr(operation.body, name, struct)
    return operation


def _run(operation: native.Operation) -> None:
    _library().run(ctypes.addressof(operation), 1)


def run_one(struct: ctypes.Structure) -> None:
    """Run what a structure of kernels.h describes."""
    _run(_operation(struct))


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
        self._memory = memory_for(_library().size(self.struct))
        self.struct.packed = self._memory.data_ptr()
        self.struct.plain = plain.data_ptr()
        self.struct.bias = None if bias is None else bias.data_ptr()
        _library().lay_out(self.struct, to_packed=True)

    def beside(self) -> Self:
        """The same weight, beside those that were laid out last; see `memory.weights_together`."""
        new = copy.copy(self)
        new._memory = memory_for(len(self._memory)).copy_(self._memory)
        new.struct = native.Weight.from_buffer_copy(self.struct)
        new.struct.packed = new._memory.data_ptr()
        return new

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
    run_one(native.Maxima(texts=len(lengths), starts=starts.data_ptr(), product=product))
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
    run_one(struct)
    return out_THD


def attend_step(qkv_N3HD: Tensor, angles: Angles, step: Steps, layer: int) -> Tensor:
    """Attention of N new tokens that go on from what is stored, each once its key and value are there: (N, H, D).

    Args:
        qkv_N3HD: of the new tokens, not rotated; contiguous.
        angles: theirs, (N, 1, D).
        step: where they go, and what they attend to.
        layer: whose storage it is.
    """
    texts, _, heads, head_dim = qkv_N3HD.shape
    struct = native.Step(texts=texts, heads=heads, head_dim=head_dim, scale=head_dim**-0.5, most=step.most)
    struct.rows, struct.first, struct.length = (t.data_ptr() for t in (step.slots_N, step.first_N, step.held_N))
    struct.skip, struct.ring, struct.in_order = step.skip_N.data_ptr(), step.ring, step.in_order
    if step.left is not None:
        struct.positions, struct.key_positions = step.positions_N.data_ptr(), step.storage.positions_R.data_ptr()
        struct.left = step.left
    struct.cos, struct.sin = (table.data_ptr() for table in angles)
    out_NHD = torch.empty_like(qkv_N3HD[:, 0], memory_format=torch.contiguous_format)
    rows = (*qkv_N3HD.unbind(1), out_NHD, *step.storage.layers[layer])
    for name, x in zip(("q", "k", "v", "out", "keys", "values"), rows, strict=True):
        _point(struct, name, x)
    run_one(struct)
    return out_NHD


class LayerNorm:
    """LayerNorm of the last dimension, of a tensor of the norm's dtype.

    Args:
        norm: its numbers.
    """

    def __init__(self, norm: Norm) -> None:
        self.width, self.dtype = len(norm.weight), norm.weight.dtype
        self.struct = native.Normalize(width=self.width)
        self.norm = point_norm(self.struct, norm)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., M) to (..., M)."""
        if x.dtype != self.dtype or x.dim() < 1 or x.shape[-1] != self.width:
            weight, bias = (None if part is None else part.to(self.dtype) for part in self.norm[:2])
            return F.layer_norm(x, (self.width,), weight, bias, self.norm.eps)  # which says what does not fit
        operation = _operation(self.struct)
        struct, x = operation.body.normalize, x.contiguous()
        out = torch.empty_like(x)
        struct.rows = x.numel() // self.width
        _point(struct, "table", x.view(-1, self.width))
        _point(struct, "out", out.view(-1, self.width))
        _run(operation)
        return out


def activate(name: str, x: Tensor) -> Tensor:
    """An activation, a key of `ACTIVATIONS`, of each number."""
    x = x.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1] if x.dim() else 1
    struct = native.Activate(rows=x.numel() // max(width, 1), width=width, activation=native.ACTIVATIONS[name])
    _point(struct, "x", x.view(-1, max(width, 1)))
    _point(struct, "out", out.view(-1, max(width, 1)))
    run_one(struct)
    return out


def angle_tables(frequencies: Tensor, scale: float, positions_T: Tensor) -> Angles:
    """Those of `nn.rotary.angle_tables` by frequencies (D / 2,), with the same bits on every processor."""
    positions_T, half = positions_T.long().contiguous(), len(frequencies)
    cos, sin = (torch.empty(len(positions_T), 1, 2 * half, dtype=torch.float32, device="cpu") for _ in range(2))
    struct = native.Tables(rows=len(positions_T), half=half, scale=scale, positions=positions_T.data_ptr())
    struct.frequencies, struct.cos, struct.sin = (x.data_ptr() for x in (frequencies, cos, sin))
    run_one(struct)
    return cos, sin


@functools.cache
def _column(struct: type[ctypes.Structure], name: str) -> int:
    """Where a field lies in an operation, in words of eight bytes."""
    offset: int = getattr(struct, name).offset
    before: int = native.Training.body.offset if struct in _TRAINING_KINDS else 0
    return (native.Operation.body.offset + before + offset) // 8


class Program:
    """Operations that run one after another in one call, as a table whose cells can be set.

    Cells that differ from pass to pass are bound to variables, which are set all at once.

    Args:
        structs: what is to be run.
    """

    def __init__(self, structs: list[ctypes.Structure]) -> None:
        table = b"".join(bytes(_operation(struct)) for struct in structs)
        self._words = np.frombuffer(table, dtype=np.int64).reshape(len(structs), -1).copy()
        self.variables: dict[str, int] = {}  # their numbers
        empty = np.empty(0, np.int64)
        self._cells, self._variable, self._offset = empty, empty, empty  # of each bound cell

    def bind(self, variable: str, rows: Any, struct: type[ctypes.Structure], field: str, offsets: Any = 0) -> None:
        """Have a field of rows that hold such a structure be a variable, plus an offset for each row."""
        number = self.variables.setdefault(variable, len(self.variables))
        width = self._words.shape[1]
        cells = np.arange(len(self._words))[rows] * width + _column(struct, field)
        cells = cells.reshape(-1)
        self._cells = np.concatenate([self._cells, cells])
        self._variable = np.concatenate([self._variable, np.full(len(cells), number)])
        self._offset = np.concatenate([self._offset, np.broadcast_to(np.asarray(offsets, np.int64), cells.shape)])

    def begin(self, values: dict[str, int]) -> Program:
        """A copy for one pass, so that several threads may run one program; variables without a value are 0."""
        new = object.__new__(Program)
        new._words = self._words.copy()
        given = np.array([values.get(name, 0) for name in self.variables], np.int64)
        new._words.reshape(-1)[self._cells] = given[self._variable] + self._offset
        return new

    def set(self, rows: Any, struct: type[ctypes.Structure], /, **cells: Any) -> None:
        """Set fields of rows that hold such a structure: to one number or one a row. A tensor means its address."""
        for name, value in cells.items():
            self._words[rows, _column(struct, name)] = value.data_ptr() if isinstance(value, Tensor) else value

    def run(self, first: int = 0, last: int | None = None) -> None:
        """Run rows `first` to `last` - 1."""
        part = self._words[first:last]
        _library().run(part.ctypes.data, len(part))
