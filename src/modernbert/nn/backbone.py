"""What encoder and decoder share: packed texts through the embedding, the layers and the last norm.

Shapes: B texts, T real tokens of all texts together, M hidden size.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modernbert.config import Config
from modernbert.nn.attention import AttentionBackend, choose_backend
from modernbert.nn.attention.eager import EagerAttention
from modernbert.nn.dispatch import kernel_for
from modernbert.nn.execution import (
    AttentionWeights,
    Cache,
    Hidden,
    Runner,
    Shared,
    attend_by_kind,
    pad_attention_weights,
    rope_tables_by_kind,
)
from modernbert.nn.inputs import Inputs, pack_inputs
from modernbert.nn.layers import Attention, Embeddings, Layer, layer_norm
from modernbert.nn.packing import PackedInputs
from modernbert.nn.recompute import Recompute

logger = logging.getLogger(__name__)


class Backbone(nn.Module):
    """A bare model: embeddings, layers, final norm. While it is frozen, a runner runs the layers."""

    config: Config
    attention_class: ClassVar[type[Attention]]

    def __init__(self, config: Config, attn_implementation: str | None = "auto") -> None:
        super().__init__()
        self.config = config
        self._backends: dict[tuple[str, torch.dtype], AttentionBackend] = {}
        self.attend_by(attn_implementation)
        self.runner: Runner | None = None
        self.is_gradient_checkpointing = False
        self.recompute = Recompute()
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList([Layer(config, i, self.attention_class) for i in range(config.num_hidden_layers)])
        self.final_norm = layer_norm(config)

    def attend_by(self, attn_implementation: str | None) -> None:
        """Attend by the backend of this name from now on; one that cannot run here is refused at once."""
        name = attn_implementation or "auto"
        if name != "auto":
            self._backends[("", torch.float32)] = choose_backend(name, self.config.deterministic_flash_attn)
        self.attn_implementation = name

    @property
    def first_weight(self) -> Tensor:
        """A weight, whose dtype and device are the model's."""
        weight = self.embeddings.tok_embeddings._parameters.get("weight")  # asked for by every pass
        if weight is None:  # none at all in DataParallel's replicas, which have plain tensors
            weight = next(self.embeddings.parameters(), None)
        return self.embeddings.norm.weight if weight is None else weight

    def pack_inputs(self, given: Inputs, **continued: Any) -> PackedInputs:
        """`nn.inputs.pack_inputs` for this model; `continued` is what a cache holds."""
        weight = self.first_weight
        return pack_inputs(given, self.config, weight.dtype, weight.device, **continued)

    def encode(
        self,
        inputs: PackedInputs,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: Cache | None = None,
        backend: AttentionBackend | None = None,
        rows: Tensor | None = None,
    ) -> Hidden:
        """Packed inputs to packed hidden states; a cache is continued and added to.

        A backend attends in this pass instead of the model's own, unless attention weights are wanted. Inputs that
        bring their last states have them back, unless more than these is wanted. `rows` are tokens whose last states
        alone are wanted, where `can_leave_out` says so.
        """
        config = self.config
        want_weights = config.output_attentions if output_attentions is None else output_attentions
        want_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        backend = self._backend_with_weights() if want_weights else backend
        if inputs.states_TM is not None and backend is None and not want_states:
            return Hidden(inputs.states_TM)
        runner, hidden = self.runner, None  # another thread may thaw the model meanwhile
        if runner is not None:
            hidden = runner.run(inputs, want_states, backend, cache)
        if hidden is None:
            # Keys in a cache are values without a history. Only what new vectors were made of can have a gradient.
            live = inputs.embeds_TM is not None and inputs.embeds_TM.requires_grad
            with torch.set_grad_enabled(torch.is_grad_enabled() and (live or cache is None or not any(cache.lengths))):
                hidden = self._run(inputs, want_states, backend, cache, rows)
        if cache is not None:
            cache.finish()
        return hidden

    def can_leave_out(self, inputs: PackedInputs, want_states: bool | None) -> bool:
        """Whether the last layer may compute some tokens alone: in training, where nobody sees what it leaves out."""
        wanted = self.config.output_hidden_states if want_states is None else want_states
        usual = self.training and self.runner is None and inputs.states_TM is None
        seen = (hooks for module in (self, self.layers[-1], self.final_norm) for hooks in hooks_of(module))
        return usual and not (wanted or self.is_gradient_checkpointing or any(seen))

    def _run(
        self,
        inputs: PackedInputs,
        want_states: bool,
        backend: AttentionBackend | None,
        cache: Cache | None,
        rows: Tensor | None = None,
    ) -> Hidden:
        """The plain way, module by module. For attention weights the eager backend is given."""
        x_TM = self.embeddings(inputs.ids_T, inputs.embeds_TM)
        weights: AttentionWeights | None = {} if isinstance(backend, EagerAttention) else None
        shared = self.share(inputs, x_TM, backend, cache, weights)
        states: list[Tensor] = []

        def show(x_TM: Tensor) -> Tensor:
            states.append(inputs.restore(x_TM))
            # What callers see lies on the way of the gradients, so that they can ask for its gradient.
            return inputs.take(states[-1]) if x_TM.requires_grad else x_TM

        given: list[Any] = [x_TM, shared, show if want_states else None]
        if rows is not None:  # a method that somebody put in place of this one may not know of it
            given.append(rows)
        last_TM = self.run_layers(*given)
        return Hidden(last_TM, tuple(states), pad_attention_weights(weights, inputs))

    def share(
        self,
        inputs: PackedInputs,
        x_TM: Tensor,
        backend: AttentionBackend | None = None,
        cache: Cache | None = None,
        weights: AttentionWeights | None = None,
    ) -> dict[str, Shared]:
        """What the layers of each kind share in a pass. It follows from where the texts lie, not from their tokens.

        The embeddings say the dtype, the device, and whether gradients are wanted. A backend attends instead of the
        model's own; for the rest see `Cache.begin`.
        """
        autocast = torch.is_autocast_enabled(x_TM.device.type)
        dtype = torch.get_autocast_dtype(x_TM.device.type) if autocast else x_TM.dtype
        if backend is None and cache is None and self._trains_by_kernels(x_TM):
            backend = self._backend_of_kernels()
        backend = backend or self.backend_on(x_TM.device, dtype)
        attends = attend_by_kind(self.config, inputs.packing, backend, dtype, cache, weights, x_TM.requires_grad)
        tables = rope_tables_by_kind(self.config, inputs.rope_positions_T, inputs.packing.text_T)
        return {kind: Shared(attends[kind], *tables[kind]) for kind in attends}

    def run_layers(
        self,
        x_TM: Tensor,
        shared: dict[str, Shared],
        show: Callable[[Tensor], Tensor] | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Embeddings through all layers and the last norm, (T, M), or these rows of it.

        Nothing here depends on values of tensors: once `share` has seen the texts, `torch.export` can trace this.
        `show` is called with each hidden state, the last one normed, and gives the state to continue with.
        """
        recomputes = self.is_gradient_checkpointing and self.training and torch.is_grad_enabled()
        kept = self.recompute.plan(self.config.layer_types or (), x_TM) if recomputes else []
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            x_TM = x_TM if show is None else show(x_TM)
            if recomputes:
                x_TM = self.recompute.run(layer, kept[number], layer.kind, x_TM, shared[layer.kind])
            elif rows is not None and number == len(self.layers) - 1:
                x_TM = layer(x_TM, shared[layer.kind], rows)
            else:
                x_TM = layer(x_TM, shared[layer.kind])
        x_TM = self.final_norm(x_TM)
        return x_TM if show is None else show(x_TM)

    def backend_on(self, device: torch.device, dtype: torch.dtype) -> AttentionBackend:
        """What attends there: "auto" chooses by device and dtype."""
        key = (device.type, dtype) if self.attn_implementation == "auto" else ("", torch.float32)
        if key not in self._backends:
            name, deterministic = self.attn_implementation, self.config.deterministic_flash_attn
            self._backends[key] = choose_backend(name, deterministic, device, dtype)
        return self._backends[key]

    def _trains_by_kernels(self, x_TM: Tensor) -> bool:
        """Whether an engine may run the layers one by one in this pass, attention with them."""
        return self.attn_implementation == "auto" and self.training and kernel_for("layer", x_TM) is not None

    def _backend_of_kernels(self) -> AttentionBackend:
        key = ("kernels", torch.float32)
        if key not in self._backends:
            self._backends[key] = choose_backend("native", self.config.deterministic_flash_attn)
        return self._backends[key]

    @property
    def backend(self) -> AttentionBackend:
        """What attends where the weights are now."""
        weight = self.first_weight
        return self.backend_on(weight.device, weight.dtype)

    def _backend_with_weights(self) -> EagerAttention:
        """The backend of a pass that wants attention weights, whichever the other passes take."""
        if self.attn_implementation != "eager":
            _log_once("attention backend: eager for calls that want attention weights, which only it makes")
        return EagerAttention()


def is_quiet(module: nn.Module) -> bool:
    """Whether nothing waits for a module to be called, and its methods are its class's."""
    return not any(hooks_of(module)) and not {"forward", "project"} & module.__dict__.keys()


def hooks_of(module: nn.Module) -> list[Any]:
    """What waits for a module to be called."""
    return [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks]


@functools.cache
def _log_once(message: str) -> None:
    logger.info(message)
