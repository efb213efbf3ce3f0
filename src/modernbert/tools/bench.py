"""The limits of a machine, the work that a batch is, and the time that a model takes for it."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from modernbert.config import Config
from modernbert.engines.cpu.library import library
from modernbert.engines.cpu.runner import CpuLayers
from modernbert.engines.freeze import FloatLinear
from modernbert.engines.guard import Frozen
from modernbert.errors import InputError
from modernbert.nn.backbone import Backbone
from modernbert.nn.inputs import Inputs
from modernbert.nn.layers import Linear

# The parts of a pass, in the order of a layer.
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
_PRODUCTS = ((1024, 768, 2304), (2048, 1152, 768), (2048, 2048, 2048))  # rows, inputs, outputs
_PROVIDERS = {"NativeWeight": "modernbert", "OneDnnWeight": "oneDNN, packed"}


class Limits(NamedTuple):
    """What a machine does at most.

    Attributes:
        flops: floating-point operations a second, of matrix products.
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
        workload: the batch; see `lengths_of`.
        tokens: how many it has.
        seconds: of the fastest pass.
        flops: useful floating-point operations of the batch.
        limit: seconds that the arithmetic alone takes, or reading the weights if that is longer.
        parts: seconds of each of `PARTS` in another pass; empty if the engine does not measure them.
        backend: what computed attention and products.
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
        raise InputError(f"the batch {workload!r} is unknown; give NxL, varN, varN:SEED, longN or longN:SEED")
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


def _fastest(run: Callable[[], object], seconds: float) -> float:
    """The time of the fastest of several runs, at least three, after one that does not count."""
    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


@torch.inference_mode()
def limits(dtype: torch.dtype) -> Limits:
    """Measure this machine in some seconds, with as many threads as PyTorch uses.

    Args:
        dtype: of the products, float32 or bfloat16.
    """
    fastest, by = 0.0, ""
    for rows, inputs, outputs in _PRODUCTS:
        x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
        contenders: dict[str, Callable[[], object]] = {"PyTorch": partial(linear, x, weight)}
        layer = Linear(inputs, outputs, bias=False, dtype=dtype)
        if FloatLinear().serves([layer], gated=False):
            laid_out = FloatLinear().lay_out([layer], gated=False)
            name = type(laid_out).__name__
            contenders[_PROVIDERS.get(name, name)] = partial(laid_out.product, x)
        for name, run in contenders.items():
            fastest, by = max((fastest, by), (2.0 * rows * inputs * outputs / _fastest(run, 0.3), name))
    source = torch.ones(2**26)
    target = torch.empty_like(source)
    copying = 2 * source.nbytes / _fastest(partial(target.copy_, source), 0.3)
    return Limits(fastest, by, copying, source.nbytes / _fastest(source.sum, 0.3))


@torch.inference_mode()
def measure(model: Backbone, workload: str, machine: Limits, seconds: float = 2.0) -> Result:
    """Time a bare model on a batch of random tokens.

    Args:
        model: after `optimize_for_inference()`.
        workload: see `lengths_of`.
        machine: the limits for the dtype of the model.
        seconds: how long to repeat the pass; it runs at least three times.
    """
    lengths, config = lengths_of(workload), model.config
    if max(lengths) > config.max_position_embeddings:
        raise InputError(f"{workload} has {max(lengths)} tokens; the model takes {config.max_position_embeddings}")
    ids = torch.randint(0, config.vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    fastest = _fastest(partial(model, ids, cu_seqlens=starts), seconds)
    flops = useful_flops(config, lengths)
    weights = sum(p.numel() * p.element_size() for p in model.layers.parameters())
    least = max(flops / machine.flops, weights / machine.reading)
    layers, kernels = model.runner.layers if isinstance(model.runner, Frozen) else None, library()
    parts, backend = {}, f"PyTorch, {model.backend.name} attention"
    if isinstance(layers, CpuLayers) and kernels is not None:
        backend = f"fused, {kernels.name} kernels"
        start = time.perf_counter()
        parts = layers.time_parts(model.pack_inputs(Inputs(ids, cu_seqlens=starts)))
        parts["rest"] = time.perf_counter() - start - sum(parts.values())
    return Result(workload, sum(lengths), fastest, flops, least, parts, backend)
