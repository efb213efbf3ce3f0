"""The machine's limits, the work that a batch is, and the time that a model takes for it.

Shapes: T tokens of all texts together.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from modernbert.config import Config
from modernbert.engines.cpu.library import library
from modernbert.engines.cpu.runner import CpuLayers
from modernbert.engines.freeze import FloatLinear
from modernbert.engines.guard import Frozen
from modernbert.engines.weights import LaidOut
from modernbert.errors import InputError
from modernbert.nn.backbone import Backbone
from modernbert.nn.inputs import Inputs
from modernbert.nn.layers import Linear

# What the parts of a pass are, in words, in the order of a layer.
PARTS = {
    "ends": "embedding and last norm",
    "qkv": "queries, keys and values",
    "local": "attention, local layers",
    "global": "attention, global layers",
    "out": "output of the attention",
    "gate": "MLP, first product and gate",
    "down": "MLP, second product",
    "rest": "planning, and Python between",
}
_SHAPES = ((1024, 768, 2304), (2048, 1152, 768), (2048, 2048, 2048))  # rows, inputs, outputs


class Limits(NamedTuple):
    """What the machine does at most.

    Attributes:
        flops: of matrix products, floating-point operations a second.
        by: what computes them fastest.
        copying: bytes a second, read and written, of a copy larger than the caches.
        reading: bytes a second of a sum over numbers larger than the caches.
    """

    flops: float
    by: str
    copying: float
    reading: float


@dataclasses.dataclass(frozen=True)
class Result:
    """A model's time for one batch.

    Attributes:
        workload: how the batch was asked for.
        tokens: real tokens.
        seconds: of the fastest pass.
        flops: useful floating-point operations of the batch.
        limit: seconds that the arithmetic alone takes, or reading the weights if that is longer.
        parts: seconds of each kind of operation, a key of `PARTS`, in a pass of its own; empty where nothing was looked
            into.
        backend: what attended, and what multiplied.
    """

    workload: str
    tokens: int
    seconds: float
    flops: float
    limit: float
    parts: dict[str, float]
    backend: str


def lengths_of(workload: str) -> list[int]:
    """Lengths of texts: NxL, N texts of L tokens; varN[:SEED] or longN[:SEED], log-normal in 8..512 or 64..8192.

    Raises:
        InputError: it is none of these.
    """
    if (m := re.fullmatch(r"(\d+)x(\d+)", workload)) and int(m[1]) and int(m[2]):
        return [int(m[2])] * int(m[1])
    m = re.fullmatch(r"(var|long)(\d+)(?::(\d+))?", workload)
    if not m or not int(m[2]):
        raise InputError(f"workload {workload!r} is not served; give NxL, varN, varN:SEED, longN or longN:SEED")
    mean, deviation, low, high = (4.6, 0.9, 8, 512) if m[1] == "var" else (6.5, 1.2, 64, 8192)
    generator = torch.Generator().manual_seed(int(m[3] or 0))
    drawn = torch.randn(int(m[2]), generator=generator, dtype=torch.float64)
    return [int(n) for n in (mean + deviation * drawn).exp().clamp(low, high)]


def described(workload: str) -> str:
    """A batch in words, such as "8 texts of 128 tokens"."""
    lengths = lengths_of(workload)
    least, most = min(lengths), max(lengths)
    span = f"{most:,}" if least == most else f"{least:,} to {most:,}"
    return f"{len(lengths):,} text{'s' if len(lengths) > 1 else ''} of {span} token{'s' if most > 1 else ''}"


def useful_flops(config: Config, lengths: list[int]) -> float:
    """Floating-point operations of the layers' products and of the pairs of tokens that see each other."""
    total, width = 0.0, config.num_attention_heads * config.head_dim
    projections = 4 * config.hidden_size * width + 3 * config.hidden_size * config.intermediate_size
    for kind in config.layer_types or ():
        left, right = config.reach(kind)
        for n in lengths:
            places = torch.arange(n)
            before = places if left is None else places.clamp(max=left)
            after = places if right is None else places.clamp(max=right)  # as many from the other end
            total += 2.0 * n * projections + 4.0 * width * float((before + after + 1).sum())
    return total


def _best(run: Callable[[], object], seconds: float = 1.0, least: int = 3) -> float:
    """The time of the fastest of several runs, after one that does not count."""
    run()
    times: list[float] = []
    while len(times) < least or sum(times) < seconds:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


@torch.inference_mode()
def limits(dtype: torch.dtype) -> Limits:
    """Measure this machine, on as many threads as PyTorch takes; some seconds.

    Args:
        dtype: of the products, float32 or bfloat16.
    """
    fastest, by = 0.0, ""
    for rows, inputs, outputs in _SHAPES:
        x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
        contenders = {"PyTorch": _plain(x, weight)}
        layer = Linear(inputs, outputs, bias=False, dtype=dtype)
        if FloatLinear().serves([layer], gated=False):
            laid = FloatLinear().lay_out([layer], gated=False)
            contenders[type(laid).__name__] = _laid_out(x, laid)
        for name, run in contenders.items():
            flops = 2.0 * rows * inputs * outputs / _best(run, 0.3)
            if flops > fastest:
                fastest, by = flops, {"NativeWeight": "modernbert", "OneDnnWeight": "oneDNN, packed"}.get(name, name)
    source = torch.ones(2**26)
    target = torch.empty_like(source)
    copying = 2 * source.nbytes / _best(lambda: target.copy_(source), 0.3)
    return Limits(fastest, by, copying, source.nbytes / _best(source.sum, 0.3))


def _plain(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.nn.functional.linear(x, weight)


def _laid_out(x: Tensor, weight: LaidOut) -> Callable[[], Tensor]:
    return lambda: weight.product(x)


@torch.inference_mode()
def measure(model: Backbone, workload: str, machine: Limits, seconds: float = 2.0) -> Result:
    """Time a bare model that is ready to serve on a batch of random tokens.

    Args:
        model: after `optimize_for_inference()`.
        workload: see `lengths_of`.
        machine: the limits for the model's dtype.
        seconds: how long to go on repeating; three passes at the least.
    """
    lengths = lengths_of(workload)
    if max(lengths) > model.config.max_position_embeddings:
        raise InputError(
            f"{workload} has {max(lengths)} tokens; the model takes {model.config.max_position_embeddings}"
        )
    ids = torch.randint(0, model.config.vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    fastest = _best(lambda: model(ids, cu_seqlens=starts), seconds)
    flops = useful_flops(model.config, lengths)
    weights = sum(p.numel() * p.element_size() for p in model.layers.parameters())
    parts: dict[str, float] = {}
    if (layers := _layers_on_cpu(model)) is not None:
        start = time.perf_counter()
        parts = layers.time_parts(model.pack_inputs(Inputs(ids, cu_seqlens=starts)))
        parts["rest"] = time.perf_counter() - start - sum(parts.values())
    return Result(
        workload,
        sum(lengths),
        fastest,
        flops,
        max(flops / machine.flops, weights / machine.reading),
        parts,
        backend_of(model),
    )


def _layers_on_cpu(model: Backbone) -> CpuLayers | None:
    layers = model.runner.layers if isinstance(model.runner, Frozen) else None
    return layers if isinstance(layers, CpuLayers) else None


def backend_of(model: Backbone) -> str:
    """What serves the model."""
    kernels = library()
    if _layers_on_cpu(model) is not None and kernels is not None:
        return f"fused, {kernels.name} kernels"
    return f"PyTorch, {model.backend.name} attention"
