"""The compiled kernels: found, loaded, and what they take as kernels.h lays it out.

The library is built when the package is installed, where there is a C compiler; without it everything runs on PyTorch
alone. Which vector instructions serve is chosen when it is loaded. `MODERNBERT_KERNELS` names others: avx512bf16,
avx512vnni, avx512, avx2; neonbf16, neondot, neon on ARM; portable, exact, or none for PyTorch alone.

Every row of a result depends on its own inputs alone, bit for bit, whatever the batch and the number of threads. In
float32 and with integers all kernels give the same bits, except that "portable" rounds once more on x86, where a
processor may lack the instruction that does not; "exact" imitates it there, slowly (docs/invariance.md).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import sys
import threading
from collections.abc import Iterator
from ctypes import c_float, c_int64, c_void_p
from pathlib import Path
from typing import Any, ClassVar

import torch

from modernbert.errors import BackendError

logger = logging.getLogger(__name__)

FILE = Path(__file__).parents[2] / "native" / ("_kernels.dll" if sys.platform == "win32" else "_kernels.so")
_NAMES = ("avx512bf16", "avx512vnni", "avx512", "avx2", "neonbf16", "neondot", "neon", "portable", "exact")
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
WRITE, ADD, GATE, LARGEST, UNGATE = 0, 1, 2, 3, 4
_LAYOUT = 9  # of kernels.h
_LARGE = 2**18  # numbers of a weight for each thread that lays it out
PRODUCT, NORMALIZE, ATTENTION, STEP, MAXIMA, TABLES, ACTIVATE, TRAINING = 0, 1, 2, 3, 4, 5, 6, 7
MATMUL, NORM_BACK, ATTENTION_BACK, ADAM = 0, 1, 2, 3
SQUARES, ADAMW, STABLE_ADAMW = 0, 1, 2
CHUNK = 1 << 14  # numbers of a tensor that one task of `Adam` takes
# The activations that the kernels know, by configurations' names.
ACTIVATIONS = {"gelu": 0, "gelu_new": 1, "gelu_pytorch_tanh": 1, "relu": 2, "silu": 3, "swish": 3}


# The structures of kernels.h, which says what each field is. Nested ones are spelled out; all fields take eight bytes.
_POINTERS = (
    "data", "ids", "packed", "plain", "bias", "norm_weight", "norm_bias", "positions", "starts", "scales", "columns",
    "kept_weights", "cos", "sin", "frequencies", "packed_a", "packed_b", "weight", "weight_grad", "shares"
)  # fmt: skip


def _fields(names: str) -> list[tuple[str, Any]]:
    def kind(name: str) -> Any:
        if name in ("epsilon", "scale"):
            return c_float
        return c_void_p if name.endswith(_POINTERS) or name.startswith("key") else c_int64

    return [(name, kind(name)) for name in names.split()]


def _rows(*names: str) -> str:
    return " ".join(f"{name}_data {name}_stride {name}_dtype" for name in names)


class Weight(ctypes.Structure):
    _fields_: ClassVar = _fields(
        "outputs inputs gated dtype packed plain bias group scales kept columns kept_weights float_rows"
    )


class Product(ctypes.Structure):
    _fields_: ClassVar = [
        *_fields(f"rows {_rows('x')} norm_weight norm_bias epsilon"),
        ("weight", Weight),
        *_fields(f"epilogue activation {_rows('out')}"),
    ]


class Normalize(ctypes.Structure):
    _fields_: ClassVar = _fields(f"rows width ids {_rows('table')} norm_weight norm_bias epsilon {_rows('out')}")


class Attention(ctypes.Structure):
    _fields_: ClassVar = _fields(
        "texts heads head_dim starts positions key_positions left right cos sin key_cos key_sin "
        f"scale {_rows('q', 'k', 'v', 'out')}"
    )


class Step(ctypes.Structure):
    _fields_: ClassVar = _fields(
        "texts heads head_dim rows first length skip ring in_order most positions key_positions left cos sin scale "
        + _rows("q", "k", "v", "out", "keys", "values")
    )


class Maxima(ctypes.Structure):
    _fields_: ClassVar = [*_fields("texts starts"), ("product", Product)]


class Tables(ctypes.Structure):
    _fields_: ClassVar = _fields("rows half positions frequencies scale cos sin")


class Activate(ctypes.Structure):
    _fields_: ClassVar = _fields(f"rows width activation {_rows('x', 'out')}")


class Matmul(ctypes.Structure):
    _fields_: ClassVar = _fields(
        "rows columns depth a_turned b_turned narrowed epilogue packed_a packed_b "
        + _rows("a", "b", "plus", "gates", "out")
    )


class NormBack(ctypes.Structure):
    _fields_: ClassVar = _fields(f"rows width weight weight_grad shares epsilon {_rows('x', 'grad', 'plus', 'out')}")


class AttentionBack(ctypes.Structure):
    _fields_: ClassVar = _fields(
        "texts heads head_dim narrowed starts positions left right cos sin scale "
        + _rows("q", "k", "v", "out", "grad", "q_grad", "k_grad", "v_grad")
    )


class Slice(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("weight", "grad", "mean", "square")),
        *((name, c_int64) for name in ("count", "first")),
        *((name, c_float) for name in ("lr", "decay", "of_mean", "of_square")),
    ]


class Adam(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, c_int64) for name in ("chunks", "kind")),
        *((name, c_void_p) for name in ("slices", "owners", "sums")),
        *((name, c_float) for name in ("of_grad", "of_square", "of_new", "eps", "shrink")),
    ]


class _TrainingBody(ctypes.Union):
    _fields_: ClassVar = [("matmul", Matmul), ("norm", NormBack), ("attention", AttentionBack), ("adam", Adam)]


class Training(ctypes.Structure):
    _fields_: ClassVar = [("kind", c_int64), ("body", _TrainingBody)]


class _Body(ctypes.Union):
    _fields_: ClassVar = [
        ("product", Product),
        ("normalize", Normalize),
        ("attention", Attention),
        ("step", Step),
        ("maxima", Maxima),
        ("tables", Tables),
        ("activate", Activate),
        ("training", Training),
    ]


class Operation(ctypes.Structure):
    _fields_: ClassVar = [("kind", c_int64), ("body", _Body)]


class Library:
    """The loaded kernels of one kind of processor.

    Args:
        file: the compiled library.
        wanted: a name of `MODERNBERT_KERNELS`, or "" for the best that run here.

    Raises:
        OSError, AttributeError: the file cannot be loaded, or is of another version.
        BackendError: these kernels do not run on this processor.
    """

    def __init__(self, file: Path, wanted: str = "") -> None:
        c = ctypes.CDLL(str(file))
        c.modernbert_kernels.restype = c_void_p
        c.modernbert_packed_bytes.restype = c.modernbert_multiplies.restype = c_int64
        c.modernbert_layout.restype = c_int64
        expected = (
            _LAYOUT * 1_000_000 + ctypes.sizeof(Operation) * 1000 + ctypes.sizeof(Weight) + ctypes.sizeof(Normalize)
        )
        if c.modernbert_layout() != expected:
            raise OSError("it is of another version; install again")
        found = ctypes.c_char_p()
        kernels = c.modernbert_kernels(wanted.encode(), ctypes.byref(found))
        if not kernels or not found.value:
            raise BackendError(f"the kernels {wanted!r} do not run on this processor; choose among {', '.join(_NAMES)}")
        self.name = found.value.decode()
        self._kernels = c_void_p(kernels)
        self._c = c
        self._flush, self._move = c.modernbert_flush_denormals, c.modernbert_move
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

    def size(self, weight: Weight) -> int:
        """Bytes of a packed weight."""
        return int(self._c.modernbert_packed_bytes(self._kernels, ctypes.byref(weight)))

    def run(self, operations: int, count: int) -> None:
        """Run the `Operation`s at an address, one after another, on as many threads as PyTorch takes."""
        threads = torch.get_num_threads()
        if self._c.modernbert_run(self._kernels, c_void_p(operations), c_int64(count), c_int64(threads)):
            raise MemoryError("no memory for the kernels' work")

    def flush_denormals(self, on: bool) -> None:
        """Have PyTorch's threads take numbers below the normal ones as zero, or no more."""
        self._flush(int(on), c_int64(torch.get_num_threads()))

    def lay_out(self, weight: Weight, to_packed: bool) -> None:
        """Pack or unpack a weight, on as many threads as PyTorch takes where it is large."""
        parts = max(1, min(torch.get_num_threads(), weight.outputs * weight.inputs // _LARGE))

        def move(part: int) -> None:
            self._move(self._kernels, ctypes.byref(weight), c_int64(part), c_int64(parts), int(to_packed))

        others = [threading.Thread(target=move, args=(part,)) for part in range(1, parts)]
        for thread in others:
            thread.start()
        move(0)
        for thread in others:
            thread.join()


@functools.cache
def library() -> Library | None:
    """The kernels of this machine, or None where PyTorch serves alone; the reason is logged, once."""
    wanted = os.environ.get("MODERNBERT_KERNELS", "")
    if wanted == "none":
        return None
    if wanted and wanted not in _NAMES:
        raise BackendError(f"MODERNBERT_KERNELS is {wanted!r}; choose one of {', '.join(_NAMES)}, none")
    if not FILE.exists():
        logger.warning("modernbert was installed without its compiled kernels; PyTorch's are slower")
        return None
    try:
        found = Library(FILE, wanted)
    except (OSError, AttributeError) as error:
        logger.warning("the compiled kernels cannot be loaded (%s); PyTorch's are slower", error)
        return None
    logger.info("kernels: %s", found.name)
    return found


def serving(dtype: torch.dtype, device: torch.device) -> Library | None:
    """The kernels, if they are what numbers of a dtype on a device are best computed by."""
    if device.type != "cpu" or dtype not in DTYPES:
        return None
    if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        return None  # matrix units: oneDNN has them
    return library()


@contextlib.contextmanager
def denormals_flushed() -> Iterator[None]:
    """Numbers below the smallest normal one (1e-38) count as zero within, on a CPU.

    Such numbers make products a hundred times slower where they occur, and in the gradients of attention they do.
    PyTorch's own switch reaches the calling thread alone; the kernels reach those that share its work.
    """

    def switch(on: bool) -> None:
        torch.set_flush_denormal(on)
        found = library()
        if found is not None:
            found.flush_denormals(on)

    before = float(torch.tensor(1e-30) * torch.tensor(1e-10)) == 0.0  # PyTorch does not say
    switch(True)
    try:
        yield
    finally:
        switch(before)
