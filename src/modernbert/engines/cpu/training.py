"""A layer in training, forward and back, each as one call of the kernels.

Gradients have the same bits for any number of threads (docs/invariance.md).

PyTorch makes a small operation of every step of a layer, and another one or two of its way back. On short texts these
cost more than the products between them. Here a layer is one function for autograd. What it keeps for the way back is
what PyTorch would, but the gate's output, which is made again.

Weights and states are float32. Under autocast to bfloat16, products of weights are of bfloat16 numbers, narrowed on
their way into the product, and so are those of attention; states and sums stay float32.

Shapes: T tokens of all texts together, M hidden size, H heads, D head size, W = H * D, I intermediate size.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from modernbert.engines.cpu import library as native
from modernbert.engines.cpu.attention import NativePlan
from modernbert.engines.cpu.operations import Program
from modernbert.engines.cpu.optimizer import are_plain
from modernbert.nn.activations import activation
from modernbert.nn.attention.eager import EagerAttention
from modernbert.nn.backbone import is_quiet
from modernbert.nn.execution import Planned, Shared
from modernbert.nn.layers import MLP, EncoderAttention, Layer, Linear

_LINE = 64  # bytes of a cache line
_BLOCK = 64  # rows whose share of the gradient of a LayerNorm's weight is summed at once
_GELU = activation("gelu")


class Sizes(NamedTuple):
    """All that the operations of a layer depend on, but for the tokens."""

    width: int  # M
    heads: int
    head_dim: int
    inside: int  # I
    normed: bool  # whether there is a norm before attention
    eps: tuple[float, float]
    reach: tuple[int, int]  # -1 is endless
    narrowed: bool


class Part(NamedTuple):
    """A structure of kernels.h, with its numbers, and the names of those that are known when it runs."""

    struct: Any
    numbers: dict[str, Any]
    names: dict[str, str]


def _program(parts: Sequence[Part]) -> Program:
    """Operations that run one after another; addresses and numbers of tokens are its variables."""
    program = Program([part.struct(**part.numbers) for part in parts])
    for row, part in enumerate(parts):
        for field, variable in part.names.items():
            program.bind(variable, row, part.struct, field)
    return program


# What goes into products alone, or is rounded on the way anyway.
_NARROW = {"normed", "normed_2", "qkv", "attended", "gates", "gated", "d_gates", "d_qkv"}


def _dtype_of(name: str, narrowed: bool) -> torch.dtype:
    """What a matrix is kept in."""
    parts = name.removesuffix("_k").removesuffix("_v").removesuffix("_R")
    return torch.bfloat16 if narrowed and parts in _NARROW else torch.float32


def _rows(narrowed: bool, **matrices: tuple[str, int]) -> tuple[dict[str, Any], dict[str, str]]:
    """Fields of matrices by the name of what they point to, and how far their rows are apart."""
    numbers = {f"{field}_stride": stride for field, (_, stride) in matrices.items()}
    numbers |= {f"{field}_dtype": native.DTYPES[_dtype_of(name, narrowed)] for field, (name, _) in matrices.items()}
    return numbers, {f"{field}_data": name for field, (name, _) in matrices.items()}


def _matmul(
    size: tuple[int | str, int | str, int | str],
    a: tuple[str, int],
    b: tuple[str, int],
    out: tuple[str, int],
    *,
    turned: str = "",
    narrowed: bool = False,
    epilogue: int = native.WRITE,
    **more: tuple[str, int],
) -> Part:
    """out = a @ b of (rows, columns, depth); `turned` has "a" and "b" in it where these lie the other way."""
    numbers, names = _rows(narrowed, a=a, b=b, out=out, **more)
    for field, value in zip(("rows", "columns", "depth"), size, strict=True):
        if isinstance(value, str):
            names[field] = value
        else:
            numbers[field] = value
    numbers |= {"a_turned": "a" in turned, "b_turned": "b" in turned, "narrowed": narrowed, "epilogue": epilogue}
    return Part(native.Matmul, numbers, {**names, "packed_a": "packed_a", "packed_b": "packed_b"})


def _normalize(size: Sizes, which: int, rows: str, table: str, out: str) -> Part:
    numbers, names = _rows(size.narrowed, table=(table, size.width), out=(out, size.width))
    weight = ("attn_norm", "mlp_norm")[which]
    numbers |= {"width": size.width, "epsilon": size.eps[which]}
    return Part(native.Normalize, numbers, {**names, "rows": rows, "norm_weight": weight})


def _norm_back(size: Sizes, which: int, rows: str, x: str, grad: str, plus: str, out: str) -> Part:
    matrices = {"x": x, "grad": grad, "plus": plus, "out": out}
    numbers, names = _rows(size.narrowed, **{field: (name, size.width) for field, name in matrices.items()})
    weight = ("attn_norm", "mlp_norm")[which]
    numbers |= {"width": size.width, "epsilon": size.eps[which]}
    names |= {"rows": rows, "weight": weight, "weight_grad": f"d_{weight}", "shares": "shares"}
    return Part(native.NormBack, numbers, names)


def _attend(size: Sizes, struct: Any, **more: tuple[str, int]) -> Part:
    wide, width = 3 * size.heads * size.head_dim, size.heads * size.head_dim
    parts = {"q": ("qkv", wide), "k": ("qkv_k", wide), "v": ("qkv_v", wide), "out": ("attended", width)}
    numbers, names = _rows(size.narrowed, **parts, **more)
    left, right = size.reach
    numbers |= {"heads": size.heads, "head_dim": size.head_dim, "left": left, "right": right}
    numbers["scale"] = size.head_dim**-0.5
    names |= {"texts": "texts", "starts": "starts", "cos": "cos", "sin": "sin"}
    windowed = size.reach != (-1, -1)
    if windowed:
        names["positions"] = "positions"
    if struct is native.Attention:
        names |= {"key_cos": "cos", "key_sin": "sin"} | ({"key_positions": "positions"} if windowed else {})
    else:
        numbers["narrowed"] = size.narrowed
    return Part(struct, numbers, names)


# A layer in two halves: what sees all tokens, and what may be wanted of some tokens alone, the rows R.


@functools.lru_cache(maxsize=256)
def _attending(size: Sizes) -> Program:
    M, W = size.width, size.heads * size.head_dim
    parts = [_normalize(size, 0, "T", "x", "normed")] if size.normed else []
    normed = ("normed" if size.normed else "x", M)
    parts.append(_matmul(("T", 3 * W, M), normed, ("Wqkv", M), ("qkv", 3 * W), turned="b", narrowed=size.narrowed))
    return _program([*parts, _attend(size, native.Attention)])


@functools.lru_cache(maxsize=256)
def _feeding(size: Sizes) -> Program:
    M, W, inside = size.width, size.heads * size.head_dim, size.inside
    product = functools.partial(_matmul, turned="b", narrowed=size.narrowed)
    gate = functools.partial(product, epilogue=native.GATE, gates=("gates", 2 * inside))
    return _program([
        product(("R", M, W), ("attended_R", W), ("Wo", W), ("middle", M), plus=("x_R", M)),
        _normalize(size, 1, "R", "middle", "normed_2"),
        gate(("R", 2 * inside, M), ("normed_2", M), ("Wi", M), ("gated", inside)),
        product(("R", M, inside), ("gated", inside), ("down", inside), ("out", M), plus=("middle", M)),
    ])  # fmt: skip


def _of_weight(
    size: Sizes, wanted: frozenset[str], name: str, rows: str, grad: tuple[str, int], x: tuple[str, int]
) -> list[Part]:
    """A weight's gradient, if it is wanted."""
    if name not in wanted:
        return []
    return [_matmul((grad[1], x[1], rows), grad, x, (f"d_{name}", x[1]), turned="a", narrowed=size.narrowed)]


@functools.lru_cache(maxsize=256)
def _feeding_back(size: Sizes, wanted: frozenset[str]) -> Program:
    """The way back, with the gradients of weights that are wanted. Those of norms cost nothing and are always made."""
    M, W, inside = size.width, size.heads * size.head_dim, size.inside
    product = functools.partial(_matmul, narrowed=size.narrowed)
    of_weight = functools.partial(_of_weight, size, wanted)
    epilogue = native.UNGATE
    ungate = functools.partial(product, epilogue=epilogue, gates=("gates", 2 * inside), plus=("gated", inside))
    return _program([
        ungate(("R", inside, M), ("grad", M), ("down", inside), ("d_gates", 2 * inside)),
        *of_weight("down", "R", ("grad", M), ("gated", inside)),
        *of_weight("Wi", "R", ("d_gates", 2 * inside), ("normed_2", M)),
        product(("R", M, 2 * inside), ("d_gates", 2 * inside), ("Wi", M), ("d_normed", M)),
        _norm_back(size, 1, "R", "middle", "d_normed", "grad", "d_middle_R"),
        *of_weight("Wo", "R", ("d_middle_R", M), ("attended_R", W)),
        product(("R", W, M), ("d_middle_R", M), ("Wo", W), ("d_attended_R", W)),
    ])  # fmt: skip


@functools.lru_cache(maxsize=256)
def _attending_back(size: Sizes, wanted: frozenset[str]) -> Program:
    M, W = size.width, size.heads * size.head_dim
    product = functools.partial(_matmul, ("T", M, 3 * W), ("d_qkv", 3 * W), ("Wqkv", M), narrowed=size.narrowed)
    parts = [
        _attend(
            size, native.AttentionBack, grad=("d_attended", W),
            q_grad=("d_qkv", 3 * W), k_grad=("d_qkv_k", 3 * W), v_grad=("d_qkv_v", 3 * W),
        ),
        *_of_weight(size, wanted, "Wqkv", "T", ("d_qkv", 3 * W), ("normed" if size.normed else "x", M)),
    ]  # fmt: skip
    if size.normed:
        parts += [product(("d_normed", M)), _norm_back(size, 0, "T", "x", "d_normed", "d_middle", "d_x")]
    else:
        parts.append(product(("d_x", M), plus=("d_middle", M)))
    return _program(parts)


def _carve(base: int, T: int, narrowed: bool, widths: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Addresses of matrices of T rows and these widths, one after another, each at a cache line; and their end."""
    out = {}
    for name, width in widths.items():
        out[name], base = base, base + -(-_dtype_of(name, narrowed).itemsize * T * width // _LINE) * _LINE
    return out, base


def _room(T: int, narrowed: bool, widths: Mapping[str, int]) -> int:
    """Numbers of four bytes that they take."""
    return _carve(0, T, narrowed, widths)[1] // 4


def _side(T: int, size: Sizes) -> int:
    """Numbers of the larger side of any product of a layer, packed, in whole cache lines."""
    largest = max(size.width, 2 * size.inside, 3 * size.heads * size.head_dim)
    return -(-(max(T, largest) + 64) * (largest + 64) // 16) * 16


def _kept(size: Sizes) -> tuple[dict[str, int], dict[str, int]]:
    """What both halves keep for the way back, and its numbers a token."""
    wide, normed = 3 * size.heads * size.head_dim, {"normed": size.width} if size.normed else {}
    return {**normed, "qkv": wide}, {
        "middle": size.width,
        "normed_2": size.width,
        "gates": 2 * size.inside,
    }


_kept_work = threading.local()  # a step's layers work in the same place one after another


def _work(count: int) -> Tensor:
    """Room for this many numbers, for this thread until it asks again."""
    work: Tensor | None = getattr(_kept_work, "numbers", None)
    if work is None or len(work) < count:
        _kept_work.numbers = None  # the old one goes first
        _kept_work.numbers = work = torch.empty(count, dtype=torch.float32, device="cpu")
    return work


def forget_work() -> None:
    """Give back the memory that this thread's layers have worked in."""
    _kept_work.numbers = None


class _Layer(torch.autograd.Function):
    """x + attention(norm(x)), then x + mlp(norm(x)); of all tokens, or of `rows`."""

    @staticmethod
    def forward(
        ctx: Any,
        layer: Layer,
        shared: Shared,
        size: Sizes,
        names: tuple[str, ...],
        rows: Tensor | None,
        x_TM: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        assert isinstance(shared.attend, Planned)
        plan: NativePlan = shared.attend.plan
        T, R = len(x_TM), len(x_TM) if rows is None else len(rows)
        kept, side, n = _kept(size), _side(T, size), size.narrowed
        saved_T, saved_R = x_TM.new_empty(_room(T, n, kept[0])), x_TM.new_empty(_room(R, n, kept[1]))
        attended_TW = x_TM.new_empty((T, size.heads * size.head_dim), dtype=_dtype_of("attended", n))
        work, out_RM = _work(_room(R, n, {"gated": size.inside}) + 2 * side), x_TM.new_empty(R, size.width)
        given = _given(shared, plan, names, weights, x_TM, T) | _carve(saved_T.data_ptr(), T, n, kept[0])[0]
        gated, packed = _carve(work.data_ptr(), R, n, {"gated": size.inside})
        given |= {**gated, "packed_a": packed, "packed_b": packed + 4 * side, "attended": attended_TW.data_ptr()}
        _parts_of(given, "qkv", size)
        _attending(size).begin(given).run()
        x_RM, attended_RW = (x if rows is None else x.index_select(0, rows) for x in (x_TM, attended_TW))
        given |= _carve(saved_R.data_ptr(), R, n, kept[1])[0]
        given |= {"R": R, "x_R": x_RM.data_ptr(), "attended_R": attended_RW.data_ptr(), "out": out_RM.data_ptr()}
        _feeding(size).begin(given).run()
        ctx.save_for_backward(rows, x_TM, saved_T, saved_R, attended_TW, attended_RW, *weights)
        ctx.how = layer, shared, size, names, plan
        return out_RM

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, x_TM, saved_T, saved_R, attended_TW, attended_RW, *weights = ctx.saved_tensors
        layer, shared, size, names, plan = ctx.how
        nothing, needs = (None,) * 5, ctx.needs_input_grad[5:]
        if torch.is_grad_enabled():  # of these gradients there may be gradients
            eager = EagerAttention()  # PyTorch's own attention has no second derivative
            attend = Planned(eager, eager.plan(plan.packing, plan.reach, x_TM.dtype))
            out_RM = layer.by_modules(x_TM, shared._replace(attend=attend), rows)
            inputs = [x for x, need in zip((x_TM, *weights), needs, strict=True) if need]
            found = iter(torch.autograd.grad(out_RM, inputs, grads[0], create_graph=True, allow_unused=True))
            return *nothing, *(next(found) if need else None for need in needs)
        T, R, M, W = len(x_TM), len(attended_RW), size.width, size.heads * size.head_dim
        kept, side, shares = _kept(size), _side(T, size), (T // _BLOCK + 1) * M
        wanted = frozenset(name for name, need in zip(names, needs[1:], strict=True) if need)
        made = {name: torch.empty_like(weight) for name, weight in zip(names, weights, strict=True)}
        grad_RM, d_x_TM = grads[0].contiguous(), torch.empty_like(x_TM)
        d_middle, d_attended = x_TM.new_empty(R, M), x_TM.new_empty(R, W)
        widths = {"gated": size.inside, "d_gates": 2 * size.inside, "d_normed": M, "d_qkv": 3 * W}
        n = size.narrowed
        work = _work(_room(T, n, widths) + shares + 2 * side)
        given = _given(shared, plan, names, weights, x_TM, T)
        given |= _carve(saved_T.data_ptr(), T, n, kept[0])[0] | _carve(saved_R.data_ptr(), R, n, kept[1])[0]
        places, packed = _carve(work.data_ptr(), T, n, widths)
        given |= {**places, "packed_a": packed, "packed_b": packed + 4 * side, "shares": packed + 8 * side}
        given |= {"R": R, "grad": grad_RM.data_ptr(), "d_x": d_x_TM.data_ptr(), "attended": attended_TW.data_ptr()}
        given |= {"attended_R": attended_RW.data_ptr(), "d_middle_R": d_middle.data_ptr()}
        given |= {f"d_{name}": grad.data_ptr() for name, grad in made.items()}
        given |= {"d_attended_R": d_attended.data_ptr()}
        _parts_of(given, "qkv", size)
        _parts_of(given, "d_qkv", size)
        _feeding_back(size, wanted).begin(given).run()
        if rows is not None:
            d_middle = x_TM.new_zeros(T, M).index_copy_(0, rows, d_middle)
            d_attended = x_TM.new_zeros(T, W).index_copy_(0, rows, d_attended)
        given |= {"d_middle": d_middle.data_ptr(), "d_attended": d_attended.data_ptr()}
        _attending_back(size, wanted).begin(given).run()
        found_grads = (made[name] if need else None for name, need in zip(names, needs[1:], strict=True))
        return *nothing, d_x_TM if needs[0] else None, *found_grads


def _given(
    shared: Shared, plan: NativePlan, names: Sequence[str], weights: Sequence[Tensor], x_TM: Tensor, T: int
) -> dict[str, int]:
    """What both ways read."""
    given = {name: weight.data_ptr() for name, weight in zip(names, weights, strict=True)}
    given |= {"T": T, "texts": len(plan.starts) - 1, "starts": plan.starts.data_ptr(), "x": x_TM.data_ptr()}
    given |= {"positions": plan.positions_T.data_ptr()}
    return given | {"cos": shared.cos_T1D.data_ptr(), "sin": shared.sin_T1D.data_ptr()}


def _parts_of(given: dict[str, int], name: str, size: Sizes) -> None:
    """Where keys and values begin beside queries."""
    step = _dtype_of(name, size.narrowed).itemsize * size.heads * size.head_dim
    given[f"{name}_k"], given[f"{name}_v"] = given[name] + step, given[name] + 2 * step


def serves(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a layer whose states are of this dtype may be trained here."""
    if device.type != "cpu" or dtype != torch.float32:
        return False
    library = native.library()
    if library is None or not torch.is_autocast_enabled("cpu"):
        return library is not None
    # Matrix units are oneDNN's to use.
    narrows = torch.get_autocast_dtype("cpu") == torch.bfloat16 and library.multiplies_bfloat16
    return narrows and not torch.cpu._is_amx_tile_supported()


def train_layer(layer: Layer, x_TM: Tensor, shared: Shared, rows: Tensor | None = None) -> Tensor | None:
    """(T, M) to (T, M) by a layer in training, or to these rows of it; None where its modules must compute it.

    That is where something listens to them, where they are others than this package makes, have biases or dropout, or
    another activation than the exact GELU; and where another backend attends.
    """
    attend = shared.attend
    if not (isinstance(attend, Planned) and isinstance(attend.plan, NativePlan) and attend.weights is None):
        return None
    weights = _weights_of(layer)
    if weights is None or not len(x_TM) or type(x_TM) is not Tensor:
        return None
    attn, plan = layer.attn, attend.plan
    eps = layer.attn_norm.eps if isinstance(layer.attn_norm, nn.LayerNorm) else 0.0
    left, right = (-1 if end is None else end for end in plan.reach)
    size = Sizes(
        x_TM.shape[1], attn.heads, attn.head_dim, weights["down"].shape[1], "attn_norm" in weights,
        (eps, layer.mlp_norm.eps), (left, right), torch.is_autocast_enabled("cpu"),
    )  # fmt: skip
    M, W, tables = size.width, size.heads * size.head_dim, (len(x_TM), 1, size.head_dim)
    shapes = {"Wqkv": (3 * W, M), "Wo": (M, W), "Wi": (2 * size.inside, M), "down": (M, size.inside)}
    if any(weight.shape != shapes.get(name, (M,)) for name, weight in weights.items()) or size.head_dim % 2:
        return None
    if any(t.shape != tables or not t.is_contiguous() or t.dtype != torch.float32 for t in shared[1:]):
        return None
    assert plan.positions_T.dtype == torch.int64
    assert plan.positions_T.is_contiguous()
    out: Tensor = _Layer.apply(layer, shared, size, tuple(weights), rows, x_TM.contiguous(), *weights.values())
    return out


def _weights_of(layer: Layer) -> dict[str, nn.Parameter] | None:
    """The weights of a layer by the names that they have here; None where it is not as this package makes it."""
    attn, mlp, norm = layer.attn, layer.mlp, layer.attn_norm
    if type(attn) is not EncoderAttention or type(mlp) is not MLP or mlp.act is not _GELU or mlp.activation != "gelu":
        return None
    linear: dict[str, nn.Module] = {"Wqkv": attn.Wqkv, "Wo": attn.Wo, "Wi": mlp.Wi, "down": mlp.Wo}
    norms: dict[str, nn.Module] = {"mlp_norm": layer.mlp_norm}
    if type(norm) is not nn.Identity:
        norms["attn_norm"] = norm
    drops: tuple[nn.Module, ...] = (attn.out_drop, mlp.drop)
    own = all(type(module) is Linear for module in linear.values())
    own = own and all(type(module) is nn.LayerNorm for module in norms.values())
    if not own or attn.dropout or any(type(drop) is not nn.Dropout or drop.p for drop in drops):
        return None
    parts = (attn, mlp, norm, *drops, *linear.values(), *norms.values())
    if _has_any_global_hook() or not all(is_quiet(part) for part in parts):
        return None
    weights: dict[str, nn.Parameter] = {}
    for name, module in (linear | norms).items():
        weight = module._parameters.get("weight")
        if type(weight) is not nn.Parameter or module._parameters.get("bias") is not None or not are_plain([weight]):
            return None
        weights[name] = weight
    return weights
