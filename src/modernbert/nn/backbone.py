"""What encoder and decoder share: packed rows through the embedding, the layers and the last norm.

Shapes: B texts, T real tokens of all texts together, M hidden size.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modernbert.config import Config
from modernbert.decoding.cache import DecoderCache
from modernbert.engines.cpu import library as native
from modernbert.engines.cpu.runner import FusedLayers
from modernbert.engines.gpu import operations as gpu
from modernbert.engines.gpu.runner import GpuLayers
from modernbert.errors import InputError
from modernbert.models.base import PreTrainedModel
from modernbert.nn.attention import AttentionBackend, choose_backend
from modernbert.nn.attention.eager import EagerAttention
from modernbert.nn.execution import Hidden, Shared, Weights, angles, attention
from modernbert.nn.inputs import Inputs, PackedInputs, pack_inputs
from modernbert.nn.layers import Attention, Embeddings, Layer, layer_norm
from modernbert.nn.recompute import Recompute

logger = logging.getLogger(__name__)

# What callers hand over out of habit, and what means nothing to this architecture.
_IGNORED = {"token_type_ids"}


class Backbone(PreTrainedModel):
    """A bare model: embeddings, layers, final norm.

    Args:
        config: the architecture.
        attn_implementation: see `PreTrainedModel`.
    """

    attention_class: ClassVar[type[Attention]]

    def __init__(self, config: Config, attn_implementation: str | None = "auto") -> None:
        super().__init__(config, attn_implementation)
        self._backends: dict[tuple[str, torch.dtype], AttentionBackend] = {}
        if self.attn_implementation != "auto":
            self._make_backend(torch.device("cpu"), torch.float32)  # a name that cannot be served is refused at once
        self.fused: FusedLayers | GpuLayers | None = None  # once optimized for inference
        self.recompute = Recompute()
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList([Layer(config, i, self.attention_class) for i in range(config.num_hidden_layers)])
        self.final_norm = layer_norm(config)
        self._finish()

    def fuse(self) -> None:
        """Take our own kernels where they serve, unless an attention backend of PyTorch was asked for by name."""
        if gpu.serving(self.dtype, self.device):
            self.fused = GpuLayers.of(self)
        elif self.attn_implementation in ("auto", "native") and native.serving(self.dtype, self.device) is not None:
            self.fused = FusedLayers.of(self)

    def pack_inputs(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, **given: Any) -> PackedInputs:
        """`nn.inputs.pack_inputs` for this model."""
        return pack_inputs(
            Inputs(input_ids, inputs_embeds=inputs_embeds, **given), self.config, self.dtype, self.device
        )

    def encode(
        self,
        inputs: PackedInputs,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: DecoderCache | None = None,
    ) -> Hidden:
        """Packed inputs to packed hidden states; with a cache they go on where its texts ended, and are added to it."""
        config = self.config
        want_weights = config.output_attentions if output_attentions is None else output_attentions
        want_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if cache is not None and any(cache.lengths):
            # Keys in a cache are numbers without a history. Only what new vectors were made of can have a gradient.
            live = inputs.embeds_TM is not None and inputs.embeds_TM.requires_grad
            with torch.set_grad_enabled(live and torch.is_grad_enabled()):
                return self._encode(inputs, want_weights, want_states, cache)
        return self._encode(inputs, want_weights, want_states, cache)

    def _encode(
        self, inputs: PackedInputs, want_weights: bool, want_states: bool, cache: DecoderCache | None
    ) -> Hidden:
        config = self.config
        fused = self.fused  # which another thread may end
        if not want_weights and fused is not None and fused.serves(inputs):
            last_TM, all_states = fused(inputs, want_states, cache)
            if cache is not None:
                cache.finish()
            return Hidden(last_TM, tuple(inputs.restore(x) for x in all_states or ()))
        x_TM = self.embeddings(inputs.ids_T, inputs.embeds_TM)
        autocast = torch.is_autocast_enabled(x_TM.device.type)
        dtype = torch.get_autocast_dtype(x_TM.device.type) if autocast else x_TM.dtype
        weights: Weights | None = {} if want_weights else None
        backend = self._backend_for(want_weights, x_TM.device, dtype)
        attends = attention(config, inputs.packing, backend, dtype, cache, weights, x_TM.requires_grad)
        shared = {kind: Shared(attends[kind], *found) for kind, found in angles(config, inputs).items()}
        states: list[Tensor] = []

        def shown(x_TM: Tensor) -> Tensor:
            if not want_states:
                return x_TM
            states.append(inputs.restore(x_TM))
            # What callers see lies on the way of the gradients, so that they can ask for its gradient.
            return inputs.take(states[-1]) if x_TM.requires_grad else x_TM

        recomputes = self.is_gradient_checkpointing and self.training and torch.is_grad_enabled()
        kept = self.recompute.plan(config.layer_types or (), x_TM) if recomputes else []
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            x_TM = shown(x_TM)
            if recomputes:
                x_TM = self.recompute.run(layer, kept[number], layer.kind, x_TM, shared[layer.kind])
            else:
                x_TM = layer(x_TM, shared[layer.kind])
        x_TM = shown(self.final_norm(x_TM))
        if cache is not None:
            cache.finish()
        padded = [EagerAttention.pad_weights(weights[i], inputs.packing) for i in sorted(weights)] if weights else []
        return Hidden(x_TM, tuple(states), tuple(padded))

    def time_parts(self, inputs: PackedInputs) -> dict[str, float]:
        """Seconds that each kind of operation takes in one pass of an optimized model."""
        assert isinstance(self.fused, FusedLayers)
        return self.fused.time_parts(inputs)

    @property
    def backend(self) -> AttentionBackend:
        """What attends where the weights are now: "auto" chooses by their device and dtype."""
        return self._make_backend(self.device, self.dtype)

    def _make_backend(self, device: torch.device, dtype: torch.dtype) -> AttentionBackend:
        key = (device.type, dtype) if self.attn_implementation == "auto" else ("", torch.float32)
        if key not in self._backends:
            name, deterministic = self.attn_implementation, self.config.deterministic_flash_attn
            self._backends[key] = choose_backend(name, deterministic, device, dtype)
        return self._backends[key]

    def _backend_for(self, want_weights: bool, device: torch.device, dtype: torch.dtype) -> AttentionBackend:
        """The backend of one pass: another one where attention weights are wanted and ours never makes any."""
        backend = self._make_backend(device, dtype)
        if not want_weights or isinstance(backend, EagerAttention):
            return backend
        if self.attn_implementation != "auto":
            raise InputError(
                f"output_attentions needs attention weights, which attn_implementation "
                f"{self.attn_implementation!r} never makes; load the model with 'eager' or 'auto'"
            )
        logger.info("attention backend: eager for this call, which wants attention weights")
        return EagerAttention()


def check_kwargs(kwargs: dict[str, Any]) -> None:
    """Refuse forward arguments that are neither served nor known to mean nothing here."""
    unknown = sorted(set(kwargs) - _IGNORED)
    if unknown:
        raise TypeError(f"forward got unknown arguments: {', '.join(unknown)}")
