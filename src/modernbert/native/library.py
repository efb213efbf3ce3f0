"""The compiled kernels, called with plain pointers: products of packed weights, attention, LayerNorm.

The library is built when the package is installed, where there is a C compiler; without it everything runs on PyTorch
alone. Which vector instructions serve is chosen when it is loaded. `MODERNBERT_KERNELS` names others: avx512bf16, avx512,
avx2, portable, or none for PyTorch alone.

Every row of a result depends on its own inputs alone, bit for bit, whatever the batch and the number of threads.

Shapes: T tokens of all texts together, I inputs, O outputs, H heads, D head size, B texts.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from ctypes import c_float, c_int64, c_void_p
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from modernbert.errors import BackendError

logger = logging.getLogger(__name__)

FILE = Path(__file__).with_name("_kernels.so")
_NAMES = ("avx512bf16", "avx512", "avx2", "portable")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_WRITE, _ADD, _GATE = 0, 1, 2
# The activations that the kernels know, by configurations' names.
ACTIVATIONS = {"gelu": 0, "gelu_new": 1, "gelu_pytorch_tanh": 1, "relu": 2, "silu": 3, "swish": 3}


def _fields(*names: str) -> list[tuple[str, Any]]:
    """Fields of a structure of kernels.h, nested ones spelled out; all take eight bytes."""
    kinds = {"epsilon": c_float, "scale": c_float}
    pointers = ("data", "ids", "packed", "plain", "bias", "norm_weight", "norm_bias", "positions", "starts", "cos", "sin")
    return [
        (name, kinds.get(name) or (c_void_p if name.endswith(pointers) or name.startswith("key") else c_int64))
        for name in names
    ]


class _Weight(ctypes.Structure):
    _fields_: ClassVar = _fields("outputs", "inputs", "gated", "dtype", "packed", "plain", "bias")


class _Product(ctypes.Structure):
    _fields_: ClassVar = [
        *_fields("rows", "x_data", "x_stride", "x_dtype", "norm_weight", "norm_bias", "epsilon"),
        ("weight", _Weight),
        *_fields("epilogue", "activation", "out_data", "out_stride", "out_dtype"),
    ]


class _Normalize(ctypes.Structure):
    _fields_: ClassVar = _fields(
        *("rows", "width", "ids", "table_data", "table_stride", "table_dtype", "norm_weight", "norm_bias", "epsilon"),
        *("out_data", "out_stride", "out_dtype"),
    )


class _Attention(ctypes.Structure):
    _fields_: ClassVar = _fields(
        *("texts", "heads", "head_dim", "starts", "key_first", "key_length", "positions", "key_positions"),
        *("left", "right", "cos", "sin", "key_cos", "key_sin", "scale"),
        *(f"{x}_{field}" for x in ("q", "k", "v", "out") for field in ("data", "stride", "dtype")),
    )


class Library:
    """The loaded kernels of one kind of processor.

    Args:
        file: the compiled library.
        wanted: a name of `MODERNBERT_KERNELS`, or "" for the best that run here.

    Raises:
        OSError: the file cannot be loaded.
        BackendError: these kernels do not run on this processor.
    """

    def __init__(self, file: Path, wanted: str = "") -> None:
        c = ctypes.CDLL(str(file))
        c.modernbert_kernels.restype = c_void_p
        c.modernbert_packed_bytes.restype = c.modernbert_lanes.restype = c.modernbert_multiplies.restype = c_int64
        found = ctypes.c_char_p()
        kernels = c.modernbert_kernels(wanted.encode(), ctypes.byref(found))
        if not kernels or not found.value:
            raise BackendError(f"the kernels {wanted!r} do not run on this processor; choose among {', '.join(_NAMES)}")
        self.name = found.value.decode()
        self._kernels = c_void_p(kernels)
        self._c = c
        self.lanes = int(c.modernbert_lanes(self._kernels))
        self.multiplies_bfloat16 = bool(c.modernbert_multiplies(self._kernels))
        self._share_threads()

    def _share_threads(self) -> None:
        """Run on PyTorch's own threads, if its OpenMP can be asked to."""
        try:
            openmp = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
        except (OSError, AttributeError):
            logger.debug("PyTorch's OpenMP was not found; the kernels start threads of their own")
            return
        self._c.modernbert_share_threads(ctypes.cast(openmp, c_void_p))

    def size(self, weight: _Weight) -> int:
        """Bytes of a packed weight."""
        return int(self._c.modernbert_packed_bytes(self._kernels, ctypes.byref(weight)))

    def call(self, name: str, operation: ctypes.Structure) -> None:
        """Run an operation on as many threads as PyTorch takes."""
        if getattr(self._c, f"modernbert_{name}")(self._kernels, ctypes.byref(operation), c_int64(torch.get_num_threads())):
            raise MemoryError(f"no memory for the {name} kernel's work")

    def lay_out(self, name: str, weight: _Weight) -> None:
        """Pack or unpack a weight."""
        getattr(self._c, f"modernbert_{name}")(self._kernels, ctypes.byref(weight))


@functools.cache
def library() -> Library | None:
    """The kernels of this machine, or None where PyTorch serves alone; the reason is logged, once."""
    wanted = os.environ.get("MODERNBERT_KERNELS", "")
    if wanted == "none":
        return None
    if wanted and wanted not in _NAMES:
        raise BackendError(f"MODERNBERT_KERNELS is {wanted!r}; choose one of {', '.join(_NAMES)}, none")
    if not FILE.exists():
        logger.warning("modernbert was installed without its compiled kernels; PyTorch's own serve, more slowly")
        return None
    try:
        found = Library(FILE, wanted)
    except OSError as error:
        logger.warning("the compiled kernels cannot be loaded (%s); PyTorch's own serve, more slowly", error)
        return None
    logger.info("kernels: %s", found.name)
    return found


def serving(dtype: torch.dtype, device: torch.device) -> Library | None:
    """The kernels, if they are what numbers of a dtype on a device are best computed by."""
    if device.type != "cpu" or dtype not in _DTYPES:
        return None
    if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        return None  # matrix units: oneDNN has them
    return library()


class Norm(NamedTuple):
    """A LayerNorm's numbers, float32."""

    weight: Tensor
    bias: Tensor | None
    epsilon: float

    @classmethod
    def of(cls, module: torch.nn.LayerNorm) -> Norm:
        """What a module holds now."""
        bias = module.bias.detach().float().contiguous() if module.bias is not None else None
        return cls(module.weight.detach().float().contiguous(), bias, module.eps)

    def write(self, operation: Any) -> None:
        """Point an operation at them."""
        operation.norm_weight = self.weight.data_ptr()
        operation.norm_bias = None if self.bias is None else self.bias.data_ptr()
        operation.epsilon = self.epsilon


class NativeWeight:
    """A weight, with its bias, laid out for `Product`.

    Args:
        weight_OI: (O, I), float32 or bfloat16, on the CPU.
        bias_O: (O,) or None.
        gated: lay the first half of the outputs beside the second half, which gates it.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None, gated: bool = False) -> None:
        found = library()
        assert found is not None
        self.library = found
        self.shape, self.dtype, self.gated = weight_OI.shape, weight_OI.dtype, gated
        plain = weight_OI.detach().contiguous()
        bias = None if bias_O is None else bias_O.detach().float().contiguous()
        self.struct = _Weight(*plain.shape, gated, _DTYPES[plain.dtype])
        self.packed = torch.empty(self.library.size(self.struct) + 64, dtype=torch.uint8)
        self.struct.packed = -(-self.packed.data_ptr() // 64) * 64
        self.struct.plain = plain.data_ptr()
        self.struct.bias = None if bias is None else bias.data_ptr()
        self.library.lay_out("pack", self.struct)

    def product(self, x_TI: Tensor) -> Tensor:
        """(T, I) to (T, O), of the dtype of x."""
        return Product(self)(x_TI if x_TI.stride(1) == 1 else x_TI.contiguous())

    def to_dense(self) -> Tensor:
        """The weight, (O, I)."""
        plain = torch.empty(self.shape, dtype=self.dtype)
        struct = _Weight.from_buffer_copy(self.struct)
        struct.plain = plain.data_ptr()
        self.library.lay_out("unpack", struct)
        return plain


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
        self._base = _Product(weight=weight.struct)
        self._base.epilogue = _GATE if weight.gated else _ADD if add else _WRITE
        self._base.activation = ACTIVATIONS[activation]
        if norm is not None:
            norm.write(self._base)

    def __call__(self, x_TI: Tensor, out_TO: Tensor | None = None) -> Tensor:
        """(T, I) into (T, O), or (T, O / 2) of a gated weight; both may be columns of wider rows."""
        if out_TO is None:
            out_TO = x_TI.new_empty(len(x_TI), self.outputs)
        assert x_TI.stride(1) == out_TO.stride(1) == 1 or not len(x_TI)
        assert x_TI.shape == (len(out_TO), self.weight.shape[1])
        assert out_TO.shape[1] == self.outputs
        operation = _Product.from_buffer_copy(self._base)
        operation.rows = x_TI.shape[0]
        operation.x_data, operation.x_stride, operation.x_dtype = x_TI.data_ptr(), x_TI.stride(0), _DTYPES[x_TI.dtype]
        operation.out_data, operation.out_stride = out_TO.data_ptr(), out_TO.stride(0)
        operation.out_dtype = _DTYPES[out_TO.dtype]
        self.weight.library.call("product", operation)
        return out_TO


def normalize(x_TM: Tensor, norm: Norm, out_TM: Tensor, ids_T: Tensor | None = None) -> Tensor:
    """LayerNorm of rows, or of the rows of a table that `ids_T` (int64) names."""
    found = library()
    assert found is not None
    operation = _Normalize(rows=len(out_TM), width=x_TM.shape[1])
    operation.ids = None if ids_T is None else ids_T.data_ptr()
    operation.table_data, operation.table_stride = x_TM.data_ptr(), x_TM.stride(0)
    operation.table_dtype = _DTYPES[x_TM.dtype]
    norm.write(operation)
    operation.out_data, operation.out_stride = out_TM.data_ptr(), out_TM.stride(0)
    operation.out_dtype = _DTYPES[out_TM.dtype]
    found.call("normalize", operation)
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
    found = library()
    assert found is not None
    assert keys is None or reach == (None, None)
    operation = _Attention(texts=len(starts) - 1, heads=q_THD.shape[1], head_dim=q_THD.shape[2])
    operation.starts = starts.data_ptr()
    operation.left, operation.right = (-1 if r is None else r for r in reach)
    operation.scale = q_THD.shape[2] ** -0.5
    if positions_T is not None and reach != (None, None):
        operation.positions = operation.key_positions = positions_T.data_ptr()
    if angles is not None:
        operation.cos, operation.sin = (t.data_ptr() for t in angles)
        if keys is None:
            operation.key_cos, operation.key_sin = operation.cos, operation.sin
    if keys is not None:
        operation.key_first, operation.key_length = (t.data_ptr() for t in keys)
    for name, x in zip(("q", "k", "v", "out"), (q_THD, k_THD, v_THD, out_THD), strict=True):
        assert x.stride()[1:] == (x.shape[2], 1) or not len(x)
        setattr(operation, f"{name}_data", x.data_ptr())
        setattr(operation, f"{name}_stride", x.stride(0))
        setattr(operation, f"{name}_dtype", _DTYPES[x.dtype])
    found.call("attention", operation)
    return out_THD
