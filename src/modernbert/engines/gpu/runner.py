"""A backbone's layers for inference on a card: seven launches a layer, and for short batches one for all of them.

What the kernels of `gpu` fuse: rotation into the product that makes queries and keys, the gate into the product before
it, the residual into the product after it, the embedding into its norm. Products are cut the same way whatever the
number of rows, so a text's bits do not follow from its batch.

Shapes: T tokens of all texts together, N texts, M hidden size, H heads, D head size.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modernbert.config import Config
from modernbert.decoding.continuation import Continuation, Steps
from modernbert.engines.gpu import graphs
from modernbert.engines.gpu import operations as gpu
from modernbert.engines.gpu.flash import FlashAttention, FlashPlan, serves
from modernbert.engines.gpu.operations import Look, TritonWeight
from modernbert.engines.weights import BackboneWeights
from modernbert.nn.attention import AttentionBackend
from modernbert.nn.attention.eager import EagerAttention
from modernbert.nn.execution import (
    AttentionWeights,
    Hidden,
    Planned,
    attend_by_kind,
    frequencies,
    pad_attention_weights,
    rope_tables_by_kind,
)
from modernbert.nn.packing import PackedInputs, Packing

# Rotated queries, keys and values (T, 3, H, D) of a layer, by its number and kind, to its attention outputs (T, H, D).
Attend = Callable[[int, str, Tensor], Tensor]
Angles = dict[str, tuple[Tensor, Tensor]]


class GpuLayers:
    """The forward pass of a frozen backbone.

    Args:
        config: the architecture.
        weights: laid out for the kernels of `gpu`, beside a table of embeddings.
        backend: attends.
    """

    goes_one_by_one = False

    def __init__(self, config: Config, weights: BackboneWeights[TritonWeight], backend: AttentionBackend) -> None:
        assert isinstance(weights.embedding, Tensor)
        self.config, self.dtype, self.device, self.backend = config, weights.dtype, weights.device, backend
        self.table, self.layers = weights.embedding, weights.layers
        self.activation = str(config.hidden_activation)
        self.first, self.last = weights.first_norm, weights.last_norm
        self.frequencies = frequencies(config, self.device)
        self._is_dynamic = not self.frequencies
        self.graphs = graphs.Graphs(self.device)

    @torch.no_grad()
    def run(self, inputs: PackedInputs, want_states: bool, backend: AttentionBackend | None, cache: Any) -> Hidden:
        """See `nn.execution.Runner`."""
        plain = not want_states and backend is None
        if cache is None and plain and (size := self._bucket(inputs)) is not None:
            return Hidden(self._recorded(size, lambda: _Short(self, size), inputs))
        weights: AttentionWeights | None = {} if isinstance(backend, EagerAttention) else None
        attends = attend_by_kind(self.config, inputs.packing, backend or self.backend, self.dtype, cache, weights)
        if cache is not None and plain and inputs.ids_T is not None and not self._is_dynamic:
            steps = {kind: x.as_steps() for kind, x in attends.items() if isinstance(x, Continuation)}
            whole = {kind: step for kind, step in steps.items() if step is not None and step.of_N is None}
            if len(whole) == len(attends) and self._fits(whole):
                texts = graphs.step_bucket(inputs.packing.tokens)
                return Hidden(self._recorded(texts, lambda: _Step(self, texts), inputs, whole))
        if inputs.embeds_TM is None:
            x_TM = gpu.normalize(self.table, self.first, inputs.ids_T)
        else:
            x_TM = gpu.normalize(inputs.embeds_TM.contiguous(), self.first)
        states: list[Tensor] | None = [] if want_states else None
        tables = rope_tables_by_kind(self.config, inputs.rope_positions_T, inputs.packing.text_T, self.frequencies)

        def attend(number: int, kind: str, qkv_T3HD: Tensor) -> Tensor:
            how = attends[kind]
            if isinstance(how, Planned) and isinstance(how.plan, FlashPlan) and plain:
                return self._attend(qkv_T3HD, how.plan)
            q_THD, k_THD, v_THD = qkv_T3HD.unbind(1)
            return how(number, q_THD, k_THD, v_THD)

        last_TM = self._run(x_TM, tables, attend, states)
        shown = () if states is None else tuple(inputs.restore(x_TM) for x_TM in (*states, last_TM))
        return Hidden(last_TM, shown, pad_attention_weights(weights, inputs))

    def _run(self, x_TM: Tensor, tables: Angles, attend: Attend, states: list[Tensor] | None = None) -> Tensor:
        """Embedded rows through all layers and the last norm. The rows given are overwritten."""
        for number, layer in enumerate(self.layers):
            if states is not None:
                states.append(x_TM.clone())
            _, _, attn_norm, qkv, out, mlp_norm, gate, down = layer
            normed_TM = x_TM if attn_norm is None else gpu.normalize(x_TM, attn_norm)
            qkv_T3HD = gpu.rotated_product(normed_TM, qkv.weight, qkv.bias, *tables[layer.kind])
            out_THD = attend(number, layer.kind, qkv_T3HD)
            gpu.product(out_THD.flatten(1), out.weight, out.bias, add_to=x_TM)
            normed_TM = gpu.normalize(x_TM, mlp_norm)
            gated_TI = gpu.gated_product(normed_TM, gate.weight, gate.bias, self.activation)
            gpu.product(gated_TI, down.weight, down.bias, add_to=x_TM)
        return gpu.normalize(x_TM, self.last)

    def _attend(self, qkv_T3HD: Tensor, plan: FlashPlan) -> Tensor:
        """Within the texts: to near tokens by our kernel, which reads little else; to all of them by the backend."""
        if min(plan.window) >= 0 and plan.counts_rows and gpu.serves_window(qkv_T3HD, plan.window):
            return gpu.attend_window(qkv_T3HD, plan.cu_seqlens, plan.longest, plan.window)
        q_THD, k_THD, v_THD = qkv_T3HD.unbind(1)
        return self.backend.attend(q_THD, k_THD, v_THD, plan)

    def _recorded(self, size: Any, make: Callable[[], Any], *given: Any) -> Tensor:
        """The last hidden state of inputs, (T, M), by launches that are recorded for their size."""
        tokens = given[0].packing.tokens
        return self.graphs.run(
            size, make, lambda recorded: recorded.take(*given), lambda recorded: recorded.out_TM[:tokens].clone()
        )

    def _bucket(self, inputs: PackedInputs) -> graphs.Bucket | None:
        """The bucket of a batch whose launches can be recorded; None where they cannot, or need not."""
        packing = inputs.packing
        recordable = isinstance(self.backend, FlashAttention) and serves(self.dtype, self.config.head_dim)
        if not recordable or self._is_dynamic or inputs.ids_T is None or packing.gaps:
            return None
        return graphs.bucket(packing.lengths)

    def _fits(self, steps: dict[str, Steps]) -> bool:
        """Whether the caches are what the kernel reads: rows of contiguous numbers of the model's dtype."""
        for kind, step in steps.items():
            stored = [step.storage.layers.get(i, ()) for i, layer in enumerate(self.layers) if layer.kind == kind]
            if not all(stored) or any(x.dtype != self.dtype or not x.is_contiguous() for pair in stored for x in pair):
                return False
        return True


class _Short:
    """A forward pass over memory of its own: no more tokens and texts than its bucket holds.

    Rows past the tokens of a batch are texts too, of tokens of earlier batches: what is computed of them is never read,
    but it is numbers, and kernels may multiply what they do not see by zero.
    """

    def __init__(self, layers: GpuLayers, size: graphs.Bucket) -> None:
        self.layers = weakref.proxy(layers)  # so that what was recorded goes when the layers do
        self.size, device = size, layers.device
        self.ids_T = torch.zeros(size.tokens, dtype=torch.int64, device=device)
        self.positions_T = torch.zeros(size.tokens, dtype=torch.int64, device=device)
        self.cu_seqlens = torch.zeros(size.texts + size.fillers + 1, dtype=torch.int32, device=device)
        self.out_TM = torch.empty(0)
        packing = Packing.from_lengths((size.longest,), device)  # says how long a text may be
        self.plans = {
            kind: FlashPlan(packing, layers.config.reach(kind), layers.dtype, self.cu_seqlens)
            for kind in layers.frequencies
        }

    def take(self, inputs: PackedInputs) -> None:
        """Read a batch."""
        packing, size = inputs.packing, self.size
        tokens = packing.tokens
        assert inputs.ids_T is not None
        self.ids_T[:tokens].copy_(inputs.ids_T)
        self.positions_T[:tokens].copy_(inputs.rope_positions_T)
        unused = [tokens] * (size.texts - len(packing.lengths))
        filled = [min(tokens + size.longest * (i + 1), size.tokens) for i in range(size.fillers)]
        _send([*packing.starts, *unused, *filled], self.cu_seqlens)

    def __call__(self) -> None:
        layers = self.layers

        def attend(number: int, kind: str, qkv_T3HD: Tensor) -> Tensor:
            return layers._attend(qkv_T3HD, self.plans[kind])

        x_TM = gpu.normalize(layers.table, layers.first, self.ids_T)
        self.out_TM = layers._run(
            x_TM, rope_tables_by_kind(layers.config, self.positions_T, known=layers.frequencies), attend
        )


class _Step:
    """A step of generation over memory of its own: one new token each of no more texts than `size`.

    Where the caches lie is read from memory too, so that a recording outlives them.
    """

    def __init__(self, layers: GpuLayers, size: int) -> None:
        self.layers, self.size, device = weakref.proxy(layers), size, layers.device
        self.of_kind = {
            kind: [i for i, layer in enumerate(layers.layers) if layer.kind == kind] for kind in layers.frequencies
        }
        # What the host sends of each kind: first rows, lengths, the address of the positions, those of keys and values.
        widths = {kind: 2 * size + 1 + 2 * len(numbers) for kind, numbers in self.of_kind.items()}
        self.sent = torch.zeros(sum(widths.values()), dtype=torch.int64, device=device)
        parts = dict(zip(widths, self.sent.split(list(widths.values())), strict=True))

        def numbers() -> Tensor:
            return torch.zeros(size, dtype=torch.int64, device=device)

        self.ids_N, self.positions_N, self.out_TM = numbers(), numbers(), torch.empty(0)
        self.looks: dict[str, Look] = {}
        self.addresses: dict[int, Tensor] = {}  # of each layer's keys, and then of its values
        for kind, part in parts.items():
            first_N, length_N, addresses = part[:size], part[size : 2 * size], part[2 * size :]
            left = layers.config.reach(kind).left
            self.looks[kind] = Look(numbers(), first_N, length_N, numbers(), addresses[:1], left)
            for place, number in enumerate(self.of_kind[kind]):
                self.addresses[number] = addresses[1 + 2 * place :]

    def take(self, inputs: PackedInputs, steps: dict[str, Steps]) -> None:
        """Read a step's tokens and where each text looks. Texts past the last one are none."""
        texts = inputs.packing.tokens
        assert inputs.ids_T is not None
        self.ids_N[:texts].copy_(inputs.ids_T)
        self.positions_N[:texts].copy_(inputs.rope_positions_T)
        sent: list[int] = []
        for kind, look in self.looks.items():
            rest = [0] * (self.size - texts)
            if kind not in steps:  # no layer is of this kind
                sent += [0] * (2 * self.size + 1)
                continue
            step, stored = steps[kind], steps[kind].storage
            look.rows_N[:texts].copy_(step.slots_N)
            look.positions_N[:texts].copy_(step.positions_N)
            sent += [*step.first_N.tolist(), *rest, *step.length_N.tolist(), *rest, stored.positions_R.data_ptr()]
            sent += [x.data_ptr() for number in self.of_kind[kind] for x in stored.layers[number]]
        _send(sent, self.sent)

    def __call__(self) -> None:
        layers = self.layers

        def attend(number: int, kind: str, qkv_N3HD: Tensor) -> Tensor:
            keys = self.addresses[number]
            return gpu.attend_step(qkv_N3HD, self.looks[kind], keys, keys[1:])

        x_NM = gpu.normalize(layers.table, layers.first, self.ids_N)
        self.out_TM = layers._run(
            x_NM, rope_tables_by_kind(layers.config, self.positions_N, known=layers.frequencies), attend
        )


def _send(values: list[int], target: Tensor) -> None:
    """Write numbers into a tensor on a card, without waiting for it."""
    target.copy_(torch.tensor(values, dtype=target.dtype, pin_memory=target.is_cuda), non_blocking=True)
