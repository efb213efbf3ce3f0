"""A backbone's layers for inference on a CPU, as a few of our own kernels each: no copy between them, no detour.

What each kernel fuses: LayerNorm into the product that reads it, the gate into the product before it, the residual into
the product after it, rotation into the attention. The residual stream is float32 whatever the weights are.

Shapes: T tokens of all texts together, M hidden size, I intermediate size, H heads, D head size.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from modernbert.config import Config
from modernbert.decoding.continuation import Continuation, Steps
from modernbert.engines.cpu import library as native
from modernbert.engines.cpu.attention import NativeAttention, NativePlan
from modernbert.engines.cpu.library import DTYPES, Attention, Normalize, Step
from modernbert.engines.cpu.operations import NativeWeight, Product, Program, angle_tables, attend_step, point_norm
from modernbert.engines.weights import BackboneWeights, LayerWeights, Norm
from modernbert.nn.attention import AttentionBackend
from modernbert.nn.attention.eager import EagerAttention
from modernbert.nn.execution import (
    AttentionWeights,
    Hidden,
    Planned,
    Shared,
    attend_by_kind,
    frequencies,
    pad_attention_weights,
    rope_tables_by_kind,
)
from modernbert.nn.packing import PackedInputs
from modernbert.nn.rotary import split_rotated

_LAYER = 5  # operations of a layer: q, k, v; attention; its output; the gate; the MLP's output
_OF_TEXTS = ("texts", "starts", "positions", "key_positions", "cos", "sin")  # fields of attention that differ by pass
_OF_STEPS = (
    "texts", "rows", "first", "length", "skip", "ring", "in_order", "most", "positions", "key_positions", "left", "cos",
    "sin",
)  # fmt: skip
_PARTS = ("qkv", "attention", "out", "gate", "down")


class _Pass(NamedTuple):
    """One forward pass: what runs, on which memory, and what else has to live as long."""

    program: Program
    x_TM: Tensor
    work: Tensor
    kept: tuple[Any, ...]


class CpuLayers:
    """The forward pass of a frozen backbone.

    Args:
        config: the architecture.
        weights: laid out for the kernels of `cpu`.
        backend: the attention that was asked for; another one than the kernels' runs between them.
    """

    goes_one_by_one = True

    def __init__(self, config: Config, weights: BackboneWeights[NativeWeight], backend: AttentionBackend) -> None:
        self.config, self.dtype, self.embedding = config, weights.dtype, weights.embedding
        self.backend, self.frequencies = backend, frequencies(config, weights.device)
        self.kinds = [layer.kind for layer in weights.layers]
        self.heads = [layer.heads for layer in weights.layers]
        # Of each kind of layer the numbers, the operations that attend, and the bytes of a row of queries.
        self.of_kind: dict[str, tuple[list[int], list[int], Any]] = {}
        for kind in dict.fromkeys(self.kinds):
            numbers = [i for i, of in enumerate(self.kinds) if of == kind]
            own = np.array([self.heads[i] for i in numbers]) * config.head_dim * self.dtype.itemsize
            self.of_kind[kind] = numbers, [2 + i * _LAYER for i in numbers], own
        self.width = max(3 * max(self.heads) * config.head_dim, config.intermediate_size)
        first, self.first_norm = _normalize(config, weights.first_norm)
        last, self.last_norm = _normalize(config, weights.last_norm)
        self.products: list[Product] = []  # kept alive, as the norms
        whole: list[Any] = []
        steps: list[Any] = []
        for layer in weights.layers:
            products = _products(layer, str(config.hidden_activation))
            self.products += products
            qkv, *others = (product.struct for product in products)
            heads: dict[str, Any] = {"heads": layer.heads, "head_dim": config.head_dim, "scale": config.head_dim**-0.5}
            left, right = (-1 if end is None else end for end in config.reach(layer.kind))
            whole += [qkv, Attention(left=left, right=right, **heads), *others]
            steps += [qkv, Step(**heads), *others]
        self.program = Program([first, *whole, last])
        self.stepping = Program([first, *steps, last])  # one new token of each text
        self._lay_out()

    def _lay_out(self) -> None:
        """Strides and dtypes, which all passes share. x is float32, everything else of the weights' dtype."""
        dtype, config = DTYPES[self.dtype], self.config
        own = np.array([heads * config.head_dim for heads in self.heads])
        qkv, attention, out, gate, down = (slice(1 + i, -1, _LAYER) for i in range(_LAYER))
        M, inner = config.hidden_size, config.intermediate_size
        strides = {f"{x}_stride": 3 * own for x in ("q", "k", "v", "out")}
        dtypes = {f"{x}_dtype": dtype for x in ("q", "k", "v", "out")}
        for program, struct in ((self.program, Attention), (self.stepping, Step)):
            program.set(qkv, native.Product, x_stride=M, x_dtype=0, out_stride=3 * own, out_dtype=dtype)
            program.set(out, native.Product, x_stride=3 * own, x_dtype=dtype, out_stride=M, out_dtype=0)
            program.set(gate, native.Product, x_stride=M, x_dtype=0, out_stride=inner, out_dtype=dtype)
            program.set(down, native.Product, x_stride=inner, x_dtype=dtype, out_stride=M, out_dtype=0)
            program.set(attention, struct, **strides, **dtypes)
            program.set(0, Normalize, out_stride=M, out_dtype=0)
            program.set(-1, Normalize, table_stride=M, table_dtype=0, out_stride=M, out_dtype=dtype)
            self._bind(program, struct)

    def _bind(self, program: Program, struct: type[Attention | Step]) -> None:
        """The variables of a pass; see `_begin`, `_attention_values` and `_step_values`."""
        for field in ("rows", "ids", "table_data", "table_stride", "table_dtype"):
            program.bind(field, 0, Normalize, field)
        program.bind("x", 0, Normalize, "out_data")
        for first, x, out in ((1, "x", "work"), (3, "work", "x"), (4, "x", "work"), (5, "work", "x")):
            part = slice(first, -1, _LAYER)
            program.bind("rows", part, native.Product, "rows")
            program.bind(x, part, native.Product, "x_data")
            program.bind(out, part, native.Product, "out_data")
        fields = _OF_TEXTS if struct is Attention else _OF_STEPS
        for kind, (numbers, rows, own) in self.of_kind.items():
            for field in fields:
                program.bind(f"{kind} {field}", rows, struct, field)
            for times, name in enumerate("qkv"):
                program.bind("work", rows, struct, f"{name}_data", times * own)
            program.bind("work", rows, struct, "out_data")
            if struct is Attention:
                program.bind(f"{kind} cos", rows, struct, "key_cos")
                program.bind(f"{kind} sin", rows, struct, "key_sin")
                continue
            for name, (number, row) in itertools.product(("keys", "values"), zip(numbers, rows, strict=True)):
                program.bind(f"{name} {number}", row, struct, f"{name}_data")
                for field in ("stride", "dtype"):
                    program.bind(f"{name} {field} {number}", row, struct, f"{name}_{field}")

    def run(self, inputs: PackedInputs, want_states: bool, backend: AttentionBackend | None, cache: Any) -> Hidden:
        """See `nn.execution.Runner`."""
        weights: AttentionWeights | None = {} if isinstance(backend, EagerAttention) else None
        shared = self._shared(inputs, backend or self.backend, cache, weights)
        caches = {kind: x.attend for kind, x in shared.items() if isinstance(x.attend, Continuation)}
        steps = {kind: attend.as_steps() for kind, attend in caches.items()}
        all_steps = bool(steps) and all(step is not None and step.of_N is None for step in steps.values())
        states: list[Tensor] | None = [] if want_states else None
        if all_steps:
            run = self._begin(inputs, self.stepping, self._step_values(shared, steps), steps)
            self._run_through(run, states)
        elif not steps and all(isinstance(getattr(x.attend, "plan", None), NativePlan) for x in shared.values()):
            run = self._begin(inputs, self.program, self._attention_values(shared), shared)
            self._run_through(run, states)
        else:
            run = self._begin(inputs, self.program, {}, shared)
            self._run_between(run, shared, steps, states)
        last_TM = self._finish(run)
        shown = () if states is None else tuple(inputs.restore(x_TM) for x_TM in (*states, last_TM))
        return Hidden(last_TM, shown, pad_attention_weights(weights, inputs))

    def _run_through(self, run: _Pass, states: list[Tensor] | None) -> None:
        """All layers in one call, or in one a layer where their states are wanted."""
        if states is None:
            run.program.run(0, -1)
            return
        for number in range(len(self.kinds)):
            run.program.run(max(0, 1 + (number - 1) * _LAYER), 1 + number * _LAYER)
            states.append(run.x_TM.to(self.dtype, copy=True))
        run.program.run(1 + (len(self.kinds) - 1) * _LAYER, -1)

    def time_parts(self, inputs: PackedInputs) -> dict[str, float]:
        """Seconds of each kind of operation in one pass.

        Products: qkv, out (of the attention), gate and down (of the MLP); attention: local and global; ends: embedding
        and last norm.
        """
        shared = self._shared(inputs, NativeAttention(), None, None)
        run = self._begin(inputs, self.program, self._attention_values(shared), shared)
        seconds: dict[str, float] = {}
        for row in range(len(self.kinds) * _LAYER + 1):
            number, part = divmod(row - 1, _LAYER)
            name = _PARTS[part] if row else "ends"
            if name == "attention":
                name = "global" if self.config.reach(self.kinds[number]).left is None else "local"
            start = time.perf_counter()
            run.program.run(row, row + 1)
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
        start = time.perf_counter()
        self._finish(run)
        seconds["ends"] += time.perf_counter() - start
        return seconds

    def _shared(
        self, inputs: PackedInputs, backend: AttentionBackend, cache: Any, weights: AttentionWeights | None
    ) -> dict[str, Shared]:
        attends = attend_by_kind(self.config, inputs.packing, backend, self.dtype, cache, weights)
        positions_T, text_T = inputs.rope_positions_T, inputs.packing.text_T
        tables = rope_tables_by_kind(self.config, positions_T, text_T, self.frequencies, angle_tables)
        return {kind: Shared(attends[kind], *tables[kind]) for kind in attends}

    def _begin(self, inputs: PackedInputs, program: Program, values: dict[str, int], kept: Any) -> _Pass:
        """Memory for one pass, and the program that knows of it, but for the last norm.

        Args:
            values: of the variables of attention.
            kept: what has the memory that they point to.
        """
        T = inputs.packing.tokens
        x_TM = torch.empty(T, self.config.hidden_size, dtype=torch.float32, device="cpu")
        work = torch.empty(T * self.width, dtype=self.dtype, device="cpu")
        ids_T, table = inputs.ids_T, inputs.embeds_TM
        if table is None and isinstance(self.embedding, Tensor):
            table = self.embedding
        elif table is None:
            assert inputs.ids_T is not None
            assert not isinstance(self.embedding, Tensor)
            ids_T, table = None, self.embedding(inputs.ids_T)
        table = table.contiguous()
        values |= {"rows": T, "x": x_TM.data_ptr(), "work": work.data_ptr(), "table_data": table.data_ptr()}
        values |= {"table_stride": table.stride(0), "table_dtype": DTYPES[table.dtype]}
        if ids_T is not None:
            ids_T = ids_T.long().contiguous()
            values["ids"] = ids_T.data_ptr()
        return _Pass(program.begin(values), x_TM, work, (table, ids_T, kept))

    def _finish(self, run: _Pass) -> Tensor:
        """The last norm: over x itself where its dtype is wanted, else after giving back the memory in between."""
        last_TM = run.x_TM
        if self.dtype != torch.float32:
            run.work.untyped_storage().resize_(0)
            last_TM = torch.empty_like(run.x_TM, dtype=self.dtype)
        run.program.set(-1, Normalize, rows=len(last_TM), table_data=run.x_TM, out_data=last_TM)
        run.program.run(-1)
        return last_TM

    @staticmethod
    def _attention_values(shared: dict[str, Shared]) -> dict[str, int]:
        """Of the variables where all layers attend within the texts."""
        values: dict[str, int] = {}
        for kind, (attend, cos, sin) in shared.items():
            assert isinstance(attend, Planned)
            plan = attend.plan
            found = {"texts": len(plan.starts) - 1, "starts": plan.starts.data_ptr()}
            found |= {"cos": cos.data_ptr(), "sin": sin.data_ptr()}
            if tuple(plan.reach) != (None, None):
                found["positions"] = found["key_positions"] = plan.positions_T.data_ptr()
            values |= {f"{kind} {name}": value for name, value in found.items()}
        return values

    def _step_values(self, shared: dict[str, Shared], steps: Mapping[str, Steps | None]) -> dict[str, int]:
        """Of the variables where all layers attend to caches: new tokens go in, and look back."""
        values: dict[str, int] = {}
        for kind, (_, cos, sin) in shared.items():
            step = steps[kind]
            assert step is not None
            found = {"texts": len(step.slots_N), "rows": step.slots_N.data_ptr(), "first": step.first_N.data_ptr()}
            found |= {"length": step.held_N.data_ptr(), "most": step.most, "skip": step.skip_N.data_ptr()}
            found |= {"ring": step.ring, "in_order": int(step.in_order), "cos": cos.data_ptr(), "sin": sin.data_ptr()}
            if step.left is not None:
                found |= {"left": step.left, "positions": step.positions_N.data_ptr()}
                found["key_positions"] = step.storage.positions_R.data_ptr()
            values |= {f"{kind} {name}": value for name, value in found.items()}
            for number in self.of_kind[kind][0]:
                for name, stored in zip(("keys", "values"), step.storage.layers[number], strict=True):
                    values[f"{name} {number}"] = stored.data_ptr()
                    values[f"{name} stride {number}"] = stored.stride(0)
                    values[f"{name} dtype {number}"] = DTYPES[stored.dtype]
        return values

    def _run_between(
        self, run: _Pass, shared: dict[str, Shared], steps: Mapping[str, Steps | None], states: list[Tensor] | None
    ) -> None:
        """Attention by a cache or by another backend: between its calls the rest of one layer and the next one's start.

        Texts that add one token take the kernel for such steps here too, as in a batch where all do; otherwise their
        bits would depend on what else is in the batch.
        """
        program, x_TM, work, _ = run
        T, D = len(x_TM), self.config.head_dim
        program.run(0, 2)
        for number, (kind, heads) in enumerate(zip(self.kinds, self.heads, strict=True)):
            if states is not None:
                states.append(x_TM.to(work.dtype, copy=True))
            context, at = shared[kind], 1 + number * _LAYER
            qkv_T3HD = work[: T * 3 * heads * D].view(T, 3, heads, D)
            q_THD, k_THD, v_THD = split_rotated(qkv_T3HD, context.cos_T1D, context.sin_T1D)
            raw_N3HD = None if (step := steps.get(kind)) is None else qkv_T3HD[step.of_N].contiguous()
            out_TW = context.attend(number, q_THD, k_THD, v_THD).flatten(1).contiguous()
            if step is not None and raw_N3HD is not None:
                angles = context.cos_T1D[step.of_N].contiguous(), context.sin_T1D[step.of_N].contiguous()
                out_TW[step.of_N] = attend_step(raw_N3HD, angles, step, number).flatten(1)
            program.set(at + 2, native.Product, x_data=out_TW, x_stride=heads * D)
            last = number == len(self.kinds) - 1
            program.run(at + 2, at + _LAYER + (0 if last else 1))


def _products(layer: LayerWeights[NativeWeight], activation: str) -> list[Product]:
    """A layer's products in the order they run in."""
    assert all(isinstance(weight, NativeWeight) for weight in (layer.qkv, layer.out, layer.gate, layer.down))
    return [
        Product(layer.qkv, layer.attn_norm),
        Product(layer.out, add=True),
        Product(layer.gate, layer.mlp_norm, activation=activation),
        Product(layer.down, add=True),
    ]


def _normalize(config: Config, norm: Norm) -> tuple[Normalize, Norm]:
    """A LayerNorm to run, and the numbers that it reads."""
    struct = Normalize(width=config.hidden_size)
    return struct, point_norm(struct, norm)
