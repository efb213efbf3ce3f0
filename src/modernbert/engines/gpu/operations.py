"""What the kernels do, on tensors: products with what stands before and after them, LayerNorm, rotation, the gate.

Where these serve is asked of `serving`; nothing here imports Triton before that.

Shapes: T tokens of all texts together, I inputs, O outputs, M width, H heads, D head size, N texts.
"""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from modernbert.engines.weights import Norm

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh", "sigmoid")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Set by tests, which run the kernels without a card, in Triton's interpreter.
interpreted = False


@functools.cache
def _triton_is_there() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _has_matrix_units(device: torch.device) -> bool:
    """AMD's cards, and NVIDIA's from Ampere on: what the kernels are written for."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def serving(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels serve numbers of this dtype there."""
    if dtype not in DTYPES:
        return False
    if device.type == "cuda":
        return _triton_is_there() and _has_matrix_units(device)
    return interpreted and device.type == "cpu"


@functools.cache
def _kernels() -> ModuleType:
    from modernbert.engines.gpu import kernels

    return kernels


def _run(name: str, programs: tuple[int, ...], *given: Any, **constants: Any) -> None:
    """Run this number of programs of a kernel, which may be none, on the device of its first tensor."""
    if 0 in programs:
        return
    kernel, device = getattr(_kernels(), name)[programs], getattr(given[0], "base", given[0]).device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel(*given, **constants)
    else:
        with torch.cuda.device(device):
            kernel(*given, **constants)


class Tiles(NamedTuple):
    """How a product is cut. A sum's order follows from `inputs` alone, which depends on nothing but card and dtype."""

    rows: int  # of a tile
    outputs: int  # of a tile; of a gated product half of them are gates
    inputs: int  # summed at once
    warps: int  # of a program
    stages: int  # how many tiles of inputs are under way at once


@functools.cache
def tiles(dtype: torch.dtype, shared_memory: int) -> tuple[Tiles, ...]:
    """The tiles for a card whose programs have this much shared memory, in bytes; the largest, the best, first."""
    if dtype == torch.float32:
        return (Tiles(64, 64, 32, 4, 2),)
    if shared_memory >= 200 * 1024:  # Hopper and later
        return Tiles(128, 256, 64, 8, 3), Tiles(64, 128, 64, 4, 4), Tiles(64, 64, 64, 4, 5)
    return (Tiles(128, 128, 64, 8, 3 if shared_memory >= 96 * 1024 else 2),)


@functools.cache
def _card(device: torch.device) -> tuple[int, int]:
    """Bytes of shared memory of a program, and how many programs of large tiles run at once."""
    if device.type != "cuda":
        return 0, 1
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 64 * 1024), properties.multi_processor_count


@functools.cache
def _copies(device: torch.device) -> bool:
    """Whether a unit of the card copies tiles: on NVIDIA's from Hopper on. Elsewhere pointers are faster."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.lru_cache(maxsize=4096)
def _launch(
    T: int, columns: int, inputs: int, dtype: torch.dtype, device: torch.device, gated: bool
) -> tuple[Tiles, tuple[int], dict[str, Any]]:
    """Tiles and programs of a product of so many rows and columns, and the constants that they are built with.

    Small tiles serve where large ones would leave most of the card idle.
    """
    memory, at_once = _card(device)
    for chosen in tiles(dtype, memory) if memory else (Tiles(64, 64, 64, 1, 1),):
        width = chosen.outputs // 2 if gated else chosen.outputs
        count = -(-T // chosen.rows) * -(-columns // width)
        if 2 * count > at_once:
            break
    copied = _copies(device)
    constants: dict[str, Any] = {
        # Triton's interpreter has no products of bfloat16 numbers.
        "WIDEN": interpreted and dtype == torch.bfloat16,
        "COPIED": copied,
        "EVEN": inputs % chosen.inputs == 0,
        "TILE_T": chosen.rows,
        "TILE_O": chosen.outputs,
        "TILE_I": chosen.inputs,
        "GROUP": 8,
    }
    if device.type == "cuda":
        constants |= {"num_warps": chosen.warps, "num_stages": chosen.stages}
    # Where tiles are copied by a unit of its own, a program reads its next tile while it writes the last one.
    return chosen, (min(count, at_once) if copied else count,), constants


def _matrix(x: Tensor, *tile: int) -> tuple[Any, int]:
    """What kernels take for a matrix that they read or write by such tiles, and its numbers from a row to the next."""
    if not _copies(x.device) or not x.numel():
        return x, x.stride(-2)
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(tile)), x.stride(-2)


def _is_aligned(x: Tensor) -> bool:
    """Whether every row begins at a multiple of 16 bytes and holds numbers side by side, as descriptors need it."""
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(n * x.itemsize % 16 == 0 for n in x.stride()[:-1])


def _aligned(x: Tensor) -> Tensor:
    return x if _is_aligned(x) else _empty(x, *x.shape).copy_(x)


def _empty(like: Tensor, *shape: int) -> Tensor:
    """Aligned rows; there may be room between them."""
    most = 16 // like.itemsize
    return like.new_empty((*shape[:-1], -(-shape[-1] // most) * most))[..., : shape[-1]]


def _either(bias: Tensor | None, weight: Tensor) -> Tensor:
    return weight if bias is None else bias  # a kernel takes a tensor where it reads none


def product(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    *,
    activation: str = "",
    add_to: Tensor | None = None,
) -> Tensor:
    """activation(x @ weight.T + bias), (T, O), or `add_to` plus that, in place.

    Args:
        x_TI: (T, I).
        weight_OI: (O, I).
        bias_O: (O,).
        activation: of `ACTIVATIONS`, or none.
        add_to: (T, O).
    """
    (T, inputs), outputs = x_TI.shape, weight_OI.shape[0]
    tile, programs, constants = _launch(T, outputs, inputs, x_TI.dtype, x_TI.device, False)
    out = _empty(x_TI, T, outputs) if add_to is None else _aligned(add_to)
    _run(
        "product", programs,
        *_matrix(_aligned(x_TI), tile.rows, tile.inputs), *_matrix(_aligned(weight_OI), tile.outputs, tile.inputs),
        _either(bias_O, weight_OI), *_matrix(out, tile.rows, tile.outputs // 2), T, inputs, outputs,
        BIAS=bias_O is not None, ACTIVATION=activation, ADD=add_to is not None, **constants,
    )  # fmt: skip
    return out if add_to is None or out is add_to else add_to.copy_(out)


def gated_product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, activation: str) -> Tensor:
    """activation(first half) * second half of the outputs of x @ weight.T + bias: (T, O / 2)."""
    (T, inputs), half = x_TI.shape, weight_OI.shape[0] // 2
    tile, programs, constants = _launch(T, half, inputs, x_TI.dtype, x_TI.device, True)
    out, weight_2PI, width = _empty(x_TI, T, half), _aligned(weight_OI).unflatten(0, (2, half)), tile.outputs // 2
    _run(
        "gated_product", programs,
        *_matrix(_aligned(x_TI), tile.rows, tile.inputs), *_matrix(weight_2PI, 2, width, tile.inputs),
        _either(bias_O, weight_OI), *_matrix(out, tile.rows, width), T, inputs, half,
        BIAS=bias_O is not None, ACTIVATION=activation, **constants,
    )  # fmt: skip
    return out


def rotated_product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    """Queries, keys and values of rows, (T, 3, H, D), queries and keys rotated by their tokens' angles.

    Args:
        x_TI: (T, I).
        weight_OI: (3 * H * D, I).
        bias_O: (3 * H * D,).
        cos_T1D, sin_T1D: of `nn.rotary.rope_tables`, contiguous.
    """
    (T, inputs), outputs, D = x_TI.shape, weight_OI.shape[0], cos_T1D.shape[-1]
    tile, programs, constants = _launch(T, outputs, inputs, x_TI.dtype, x_TI.device, False)
    out, heads = x_TI.new_empty((T, outputs)), outputs // (3 * D)
    if tile.outputs % D or not _is_aligned(out):  # heads that do not fit into tiles
        q_THD, k_THD, v_THD = product(x_TI, weight_OI, bias_O).unflatten(1, (3, heads, D)).unbind(1)
        return rotate(q_THD, k_THD, v_THD, cos_T1D, sin_T1D)
    _run(
        "rotated_product", programs,
        *_matrix(_aligned(x_TI), tile.rows, tile.inputs), *_matrix(_aligned(weight_OI), tile.outputs, tile.inputs),
        _either(bias_O, weight_OI), *_matrix(out, tile.rows, tile.outputs), cos_T1D, sin_T1D, T, inputs, outputs,
        2 * heads * D, HALF=D // 2, DTYPE=_triton_dtype(out.dtype), BIAS=bias_O is not None, **constants,
    )  # fmt: skip
    return out.view(T, 3, heads, D)


@functools.cache
def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


_WIDEST_WINDOW = 256  # tokens on each side; beyond them FlashAttention's kernels waste less


def serves_window(qkv_T3HD: Tensor, window: tuple[int, int]) -> bool:
    """Whether `attend_window` takes these, and is the faster."""
    return max(window) <= _WIDEST_WINDOW and qkv_T3HD.is_contiguous() and qkv_T3HD.shape[-1] <= 128


def attend_window(qkv_T3HD: Tensor, cu_seqlens: Tensor, longest: int, window: tuple[int, int]) -> Tensor:
    """Attention outputs (T, H, D) of packed texts, each token to those near it in its text.

    Args:
        qkv_T3HD: rotated already, contiguous.
        cu_seqlens: (B + 1,) int32, where each text begins, and the end.
        longest: tokens of the longest text; there may be fewer.
        window: how many tokens before and after it a token sees.
    """
    T, _, H, D = qkv_T3HD.shape
    out, tile, keys = qkv_T3HD.new_empty((T, H, D)), 64, 64
    _run(
        "attend_window", (-(-longest // tile), H, len(cu_seqlens) - 1),
        qkv_T3HD, out, cu_seqlens, H, 3 * H * D, D**-0.5 * 1.4426950408889634, LEFT=window[0], RIGHT=window[1],
        D=D, FOLDED=max(_power(D), 16), BEHIND=-(-window[0] // keys) * keys,
        AHEAD=-(-(tile + window[1]) // keys) * keys, TILE_Q=tile, TILE_K=keys,
        WIDEN=interpreted and qkv_T3HD.dtype == torch.bfloat16, num_warps=4, num_stages=1,
    )  # fmt: skip
    return out


def normalize(table: Tensor, norm: Norm, ids_T: Tensor | None = None) -> Tensor:
    """LayerNorm of rows (T, M), or of the rows of a table that ids (T,) name."""
    rows, width = len(table) if ids_T is None else len(ids_T), table.shape[1]
    out = table.new_empty((rows, width))
    weight, bias, eps = norm
    tile = 4 if table.is_cuda else 64  # on a card a row a warp
    _run(
        "normalize", (-(-rows // tile),),
        table, table if ids_T is None else ids_T, weight, _either(bias, weight), out, rows, width,
        table.stride(0), width, eps, IDS=ids_T is not None, BIAS=bias is not None, TILE_T=tile,
        WIDTH=_power(width), num_warps=4,
    )  # fmt: skip
    return out


def rotate(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor, back: bool = False) -> Tensor:
    """Queries and keys turned by their tokens' angles, or `back`, and values: one tensor (T, 3, H, D)."""
    T, H, D = q_THD.shape
    if not q_THD.stride() == k_THD.stride() == v_THD.stride() or q_THD.stride(2) != 1:
        q_THD, k_THD, v_THD = (x.contiguous() for x in (q_THD, k_THD, v_THD))
    out = q_THD.new_empty((T, 3, H, D))
    tile = 32
    _run(
        "rotate", (-(-T * H // tile), 3),
        q_THD, k_THD, v_THD, cos_T1D, sin_T1D, out, T * H, H, q_THD.stride(0), q_THD.stride(1),
        HALF=D // 2, FOLDED=_power(D // 2), BACK=back, TILE=tile,
    )  # fmt: skip
    return out


def geglu(x_TO: Tensor) -> Tensor:
    """gelu(first half) * second half of rows; with gradients."""
    out: Tensor = _GeGLU.apply(x_TO)
    return out


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TO: Tensor) -> Tensor:
        ctx.save_for_backward(x_TO)
        T, half, tile = len(x_TO), x_TO.shape[1] // 2, 1024
        out = x_TO.new_empty((T, half))
        _run("geglu", (T, -(-half // tile)), x_TO.contiguous(), out, half, TILE=tile)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x_TO,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # of these gradients there may be gradients
            first, second = x_TO.chunk(2, dim=-1)
            return torch.autograd.grad(F.gelu(first) * second, x_TO, grads[0], create_graph=True)[0]
        T, half, tile = len(x_TO), x_TO.shape[1] // 2, 1024
        out = torch.empty_like(x_TO, memory_format=torch.contiguous_format)
        _run("geglu_backward", (T, -(-half // tile)), x_TO.contiguous(), grads[0].contiguous(), out, half, TILE=tile)
        return out


def cross_entropy(logits_TV: Tensor, labels_T: Tensor, ignored: int) -> Tensor:
    """-log softmax of each row at its label, (T,) float32, 0 where the label is `ignored`; with gradients.

    The logits are read once and kept as they are: no float32 copy, and no probabilities.
    """
    losses: Tensor = _CrossEntropy.apply(_rows(logits_TV), labels_T, ignored)
    return losses


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, labels_T: Tensor, ignored: int) -> Tensor:
        labels_T = labels_T.contiguous()
        T, V = logits_TV.shape
        losses_T, totals_T = (torch.empty(T, dtype=torch.float32, device=logits_TV.device) for _ in range(2))
        _run(
            "cross_entropy", (T,), logits_TV, labels_T, losses_T, totals_T, V, logits_TV.stride(0), ignored,
            TILE=4096, num_warps=8,
        )  # fmt: skip
        ctx.save_for_backward(logits_TV, labels_T, totals_T)
        ctx.ignored = ignored
        return losses_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits_TV, labels_T, totals_T = ctx.saved_tensors
        if torch.is_grad_enabled():
            losses_T = F.cross_entropy(logits_TV.float(), labels_T, ignore_index=ctx.ignored, reduction="none")
            return torch.autograd.grad(losses_T, logits_TV, grads[0], create_graph=True)[0], None, None
        T, V = logits_TV.shape
        out, tile = torch.empty((T, V), dtype=logits_TV.dtype, device=logits_TV.device), 4096
        _run(
            "cross_entropy_backward", (T, -(-V // tile)), logits_TV, labels_T, totals_T,
            grads[0].float().contiguous(), out, V, logits_TV.stride(0), ctx.ignored, TILE=tile, num_warps=8,
        )  # fmt: skip
        return out, None, None


class Look(NamedTuple):
    """How one new token each of N texts looks back at a cache."""

    rows_N: Tensor  # the row of the cache that each goes to
    first_N: Tensor  # the first row that each looks at
    length_N: Tensor  # how many rows that is; 0 where there is no text
    positions_N: Tensor  # of the tokens
    key_positions: Tensor  # (1,) the address of the rows' positions
    left: int | None  # how far back a token sees; None is to its text's beginning


def attend_step(qkv_N3HD: Tensor, look: Look, keys: Tensor, values: Tensor) -> Tensor:
    """Attention outputs (N, H, D) of one new token of each text, whose keys and values go into the cache.

    Args:
        qkv_N3HD: rotated already.
        look: where each looks.
        keys, values: (1,) int64, addresses of the cache's rows (R, H, D) of the same dtype.
    """
    N, _, H, D = qkv_N3HD.shape
    out = qkv_N3HD.new_empty((N, H, D))
    q, k, v = qkv_N3HD.unbind(1)
    _run(
        "attend_step", (N, H),
        q, k, v, keys, values, look.rows_N, look.first_N, look.length_N, look.positions_N, look.key_positions, out,
        H, 0 if look.left is None else look.left, D**-0.5, qkv_N3HD.stride(0),
        WINDOW=look.left is not None, D=D, FOLDED=_power(D), TILE=64,
    )  # fmt: skip
    return out


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()


class TritonWeight:
    """A weight that the kernels multiply by, in its plain layout.

    Args:
        weight_OI: (O, I), on a card.
        bias_O: (O,) or None.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        self.weight = _aligned(weight_OI.detach())
        self.bias = bias_O

    def product(self, x_TI: Tensor) -> Tensor:
        """(T, I) to (T, O)."""
        return product(_rows(x_TI), self.weight, self.bias)

    def to_dense(self) -> Tensor:
        """The weight, (O, I)."""
        return self.weight


def _rows(x_TI: Tensor) -> Tensor:
    return x_TI if x_TI.stride(-1) == 1 else x_TI.contiguous()
