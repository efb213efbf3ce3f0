"""A backbone's layers for inference on a CPU, as a few of our own kernels each: no copy between them, no detour.

What each kernel fuses: LayerNorm into the product that reads it, the gate into the product before it, the residual into
the product after it, rotation into the attention. The residual stream is float32 whatever the weights are.

Shapes: T tokens of all texts together, M hidden size, I intermediate size, H heads, D head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from modernbert.models.inputs import PackedInputs
from modernbert.models.layers import Layer, LayerContext, Linear
from modernbert.native.library import Angles, NativeWeight, Norm, Product, normalize
from modernbert.ops.attention.native import NativeAttention
from modernbert.ops.linear import Packed, PackedPart
from modernbert.ops.rope import apply_rope

if TYPE_CHECKING:
    from modernbert.models.backbone import Backbone


class FusedLayer(NamedTuple):
    """The products of one layer."""

    kind: str
    heads: int
    qkv: Product
    attention_out: Product
    gate: Product
    mlp_out: Product


class FusedLayers:
    """The forward pass of an optimized backbone, for as long as its weights stay what they were.

    Args:
        model: packed by our own kernels; see `of`.
    """

    def __init__(self, model: Backbone) -> None:
        self.model = model
        self.head_dim = model.config.head_dim
        self.embedding_norm, self.final_norm = Norm.of(model.embeddings.norm), Norm.of(model.final_norm)
        self.layers = [_fuse(layer) for layer in model.layers if isinstance(layer, Layer)]
        parts = [model.embeddings, model.layers, model.final_norm]
        modules = [module for part in parts for module in part.modules()]
        self._packed = [(module, module.packed) for module in modules if isinstance(module, Linear)]
        named = [(m._parameters, name, p) for m in modules for name, p in m._parameters.items() if p is not None]
        self._parameters = [(owner, name, p, _version(p)) for owner, name, p in named]
        self._hooks: list[Any] = [
            hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]

    @classmethod
    def of(cls, model: Backbone) -> FusedLayers | None:
        """The fused layers of a packed model; None where its layers are not all packed by our own kernels."""
        ours = isinstance(model.backend, NativeAttention) and all(
            isinstance(layer, Layer) and isinstance(_qkv(layer), NativeWeight) and _gated(layer.mlp.Wi.packed)
            for layer in model.layers
        )
        return cls(model) if ours else None

    def __reduce__(self) -> Any:  # a copy of a model is not packed
        return type(None), ()

    def serves(self, inputs: PackedInputs) -> bool:
        """Whether this pass may be taken: nothing changed, nothing listens, no gradient and no autocast is wanted."""
        embeds = inputs.embeds_TM
        given = self.model.dtype if embeds is None else embeds.dtype
        if self.model.training or torch.is_autocast_enabled("cpu") or given not in (torch.float32, torch.bfloat16):
            return False
        if torch.is_grad_enabled() and (
            (embeds is not None and embeds.requires_grad) or any(p.requires_grad for _, _, p, _ in self._parameters)
        ):
            return False
        return (
            not torch.compiler.is_compiling()
            and not any(self._hooks)
            and all(module.packed is packed for module, packed in self._packed)
            and all(owner[name] is p and _version(p) == before for owner, name, p, before in self._parameters)
        )

    def __call__(
        self, inputs: PackedInputs, shared: dict[str, LayerContext], want_states: bool
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Packed inputs to the last hidden state (T, M) and, where wanted, all hidden states."""
        model, dtype = self.model, self.model.dtype
        config, T = model.config, inputs.packing.tokens
        M, I = config.hidden_size, config.intermediate_size
        x_TM = torch.empty(T, M)
        table = model.embeddings.tok_embeddings.weight if inputs.embeds_TM is None else inputs.embeds_TM
        normalize(table.contiguous(), self.embedding_norm, x_TM, inputs.ids_T)
        widest = max(layer.heads for layer in self.layers) * self.head_dim
        work = torch.empty(T * max(3 * widest, I), dtype=dtype)
        states = [x_TM.to(dtype, copy=True)] if want_states else []
        for number, layer in enumerate(self.layers):
            context, width = shared[layer.kind], layer.heads * self.head_dim
            qkv_TW = layer.qkv(x_TM, work[: T * 3 * width].view(T, 3 * width))
            out_TW = self._attend(number, qkv_TW.view(T, 3, layer.heads, self.head_dim), context)
            layer.attention_out(out_TW, x_TM)
            hidden_TI = layer.gate(x_TM, work[: T * I].view(T, I))
            layer.mlp_out(hidden_TI, x_TM)
            if want_states:
                states.append(x_TM.to(dtype, copy=True))
        out_TM = normalize(x_TM, self.final_norm, torch.empty(T, M, dtype=dtype))
        return out_TM, (*states[:-1], out_TM) if want_states else None

    def _attend(self, number: int, qkv_T3HD: Tensor, context: LayerContext) -> Tensor:
        """Attention outputs (T, H * D)."""
        angles = Angles(context.cos_T1D, context.sin_T1D)
        if context.cached is None:
            assert isinstance(context.backend, NativeAttention)
            return context.backend.attend_rotating(qkv_T3HD, context.plan, angles).flatten(1)
        heads = qkv_T3HD.shape[2]
        q_THD, k_THD = apply_rope(qkv_T3HD[:, :2].flatten(1, 2), *angles).split(heads, dim=1)
        return context.cached.attend(number, q_THD, k_THD, qkv_T3HD[:, 2], None).flatten(1)


def _version(parameter: Tensor) -> int | None:
    return None if parameter.is_inference() else parameter._version


def _qkv(layer: Layer) -> Packed | None:
    """The packed weight of a layer's queries, keys and values."""
    packed = layer.attn.packed_projection
    return packed.whole if isinstance(packed, PackedPart) else packed


def _gated(packed: Packed | PackedPart | None) -> bool:
    return isinstance(packed, NativeWeight) and packed.gated


def _fuse(layer: Layer) -> FusedLayer:
    attention, mlp = layer.attn, layer.mlp
    weights = [_qkv(layer), attention.Wo.packed, mlp.Wi.packed, mlp.Wo.packed]
    qkv, attention_out, gate, mlp_out = (weight for weight in weights if isinstance(weight, NativeWeight))
    norm = Norm.of(layer.attn_norm) if isinstance(layer.attn_norm, nn.LayerNorm) else None
    return FusedLayer(
        layer.kind,
        attention.heads,
        Product(qkv, norm),
        Product(attention_out, add=True),
        Product(gate, Norm.of(layer.mlp_norm), activation=mlp.activation),
        Product(mlp_out, add=True),
    )
