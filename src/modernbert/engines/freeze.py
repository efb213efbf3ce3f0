"""Freezing a model for inference: which engine runs it, and what is taken from its modules; `guard` thaws it again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modernbert.config import Config
from modernbert.engines.cpu import library as cpu
from modernbert.engines.cpu.attention import NativeAttention
from modernbert.engines.cpu.memory import weights_together
from modernbert.engines.cpu.onednn import OneDnnWeight
from modernbert.engines.cpu.operations import LayerNorm, NativeWeight, activate
from modernbert.engines.cpu.runner import CpuLayers
from modernbert.engines.gpu import operations as gpu
from modernbert.engines.gpu.operations import TritonWeight
from modernbert.engines.gpu.runner import GpuLayers
from modernbert.engines.guard import LOCK, Frozen, Guarded, thaw
from modernbert.engines.weights import BackboneWeights, Embedding, LaidOut, LayerWeights, Norm
from modernbert.nn.activations import ACTIVATIONS, activation
from modernbert.nn.attention import AttentionBackend
from modernbert.nn.backbone import Backbone, is_quiet
from modernbert.nn.execution import Runner
from modernbert.nn.layers import (
    MLP,
    Attention,
    DecoderAttention,
    Embeddings,
    EncoderAttention,
    Layer,
    Linear,
    PredictionHead,
)
from modernbert.nn.linear import onednn_serves


class FloatLinear:
    """How linear layers whose weight is a parameter are laid out for kernels, and restored.

    Other kinds of linear layers are subclasses; see `register_linear`.

    Attributes:
        in_engine: whether an engine runs layers with these weights.
        one_by_one: whether a layer by itself is laid out, too, where no engine runs them all.
    """

    in_engine = one_by_one = True

    def shape(self, module: Any) -> tuple[int, int]:
        """Of a layer's weight, (outputs, inputs); zeros where it has none of its own."""
        weight = module._parameters.get("weight")
        return (0, 0) if weight is None else (weight.shape[0], weight.shape[1])

    def serves(self, modules: Sequence[Any], gated: bool) -> bool:
        """Whether the weights of layers that read the same inputs can be laid out as one.

        Not where a weight is computed anew at each call, as by a parametrization, or has a class of its own; nor where
        some of several layers have a bias and others have none.
        """
        if len({module._parameters.get("bias") is None for module in modules}) > 1:
            return False
        weights = [module._parameters.get("weight") for module in modules]
        first = weights[0]
        if first is None or any(type(weight) is not nn.Parameter or weight.dtype != first.dtype for weight in weights):
            return False
        ours = gpu.serving(first.dtype, first.device) or cpu.serving(first.dtype, first.device) is not None
        return ours or (onednn_serves(first) and not gated)

    def lay_out(self, modules: Sequence[Any], gated: bool) -> LaidOut:
        """Lay them out for the kernels of their device and dtype: ours, or else oneDNN's."""
        weights, biases = (
            [p.detach() for m in modules if (p := m._parameters.get(name)) is not None] for name in ("weight", "bias")
        )
        weight_OI = weights[0] if len(weights) == 1 else torch.cat(weights)
        bias_O = None if not biases else biases[0] if len(biases) == 1 else torch.cat(biases)
        if gpu.serving(weight_OI.dtype, weight_OI.device):
            return TritonWeight(weight_OI, bias_O)
        if cpu.serving(weight_OI.dtype, weight_OI.device) is not None:
            return NativeWeight(weight_OI, bias_O, gated)
        return OneDnnWeight(weight_OI, bias_O)

    def served(self, module: Any, multiply: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """What a layer that is laid out by itself computes, by the product with what is laid out."""
        return multiply

    def restored(self, module: Any, laid: Any, outputs: slice) -> dict[str, Callable[[], Any]]:
        """By name what makes each parameter and attribute anew that a layer lost to those outputs of what is laid out.

        The weight comes out of the layout; the bias is kept beside it.
        """

        def weight() -> Tensor:
            dense: Tensor = laid.to_dense()
            return dense if len(dense) == outputs.stop - outputs.start else dense[outputs].clone()

        bias = module._parameters.get("bias")
        return {"weight": weight} if bias is None else {"weight": weight, "bias": functools.partial(_itself, bias.data)}


# By the class itself, not a subclass: one made elsewhere, such as an adapter's, may compute something else.
_LINEAR: dict[type[nn.Module], FloatLinear] = {Linear: FloatLinear()}
_EMBEDDINGS: dict[type[nn.Module], Callable[[Any], Embedding]] = {nn.Embedding: lambda module: module.weight.data}


def register_linear(cls: type[nn.Module], kind: FloatLinear) -> None:
    """Say how the linear layers of a class are frozen."""
    _LINEAR[cls] = kind


def register_embedding(cls: type[nn.Module], function: Callable[[Any], Embedding]) -> None:
    """Say what the embeddings of a class look up or compute, apart from the module."""
    _EMBEDDINGS[cls] = function


def freeze(model: nn.Module, backbone: Backbone, models: Sequence[nn.Module] = ()) -> None:
    """Freeze a model in place: its layers into one engine where that serves them all, else module by module.

    Args:
        model: in evaluation mode.
        backbone: its layers; the model itself where it has no head.
        models: those around the one backbone where `model` is several, which share it.
    """
    with LOCK, torch.no_grad(), weights_together():
        thaw(model)
        frozen = Frozen()
        try:
            _freeze(frozen, model, backbone, models)
        except BaseException:
            frozen.thaw()
            raise


def _freeze(frozen: Frozen, model: nn.Module, backbone: Backbone, models: Sequence[nn.Module]) -> None:
    inner = set(backbone.modules()) - {backbone}
    compiled = {module for module in inner if isinstance(module, MLP)} if backbone.config.reference_compile else set()
    left_out = {module for mlp in compiled for module in mlp.modules()}  # the compiler reads plain weights
    owners: dict[Tensor, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in _owned(module):
            owners.setdefault(parameter, set()).add(module)
    embedding: nn.Module = backbone.embeddings.tok_embeddings
    table = _table(embedding)
    # Outputs may share an embedding's weight; there are several where several models share the backbone.
    tying = {owner for p in _owned(embedding) for owner in owners[p] if type(owner) in _LINEAR and owner not in inner}
    shared = set() if table is None else {embedding, *tying}

    def is_free(module: nn.Module) -> bool:
        """Whether it can be frozen by itself: nobody listens, and nobody else computes with its weights."""
        own = all(owners[parameter] <= {module} | shared for parameter in _owned(module))
        return own and module not in left_out and is_quiet(module)

    kinds = {module: kind for module in model.modules() if (kind := _LINEAR.get(type(module))) and kind.one_by_one}
    linear = [m for m, kind in kinds.items() if is_free(m) and kind.serves([m], gated=False)]
    outside = set(linear) - inner
    engine = _engine_of(backbone) if table is not None and not left_out else None
    if any(not owners[p] <= {m} | (outside if m is embedding else shared) for m in inner for p in _owned(m)):
        engine = None
    # An output that shares the embedding's weight is laid out while that still has its numbers.
    tied = {m: kinds[m].lay_out([m], gated=False) for m in linear if any(embedding in owners[p] for p in _owned(m))}
    # Another output, or one of a model around this one, may compute with the embedding's weight, which then stays.
    users = {owner for parameter in _owned(embedding) for owner in owners[parameter]}
    alone = users <= {embedding, *linear} and (model is not backbone or not backbone.embeddings.is_tied)
    if table is not None:
        serve = functools.partial(F.embedding, weight=table) if isinstance(table, Tensor) else table
        frozen.guard(embedding, serve, hold=alone)
    for module in linear:
        if engine is None or module in outside:
            kind = kinds[module]
            laid = tied[module] if module in tied else kind.lay_out([module], gated=False)
            multiply = functools.partial(_multiply, laid, kind.shape(module)[1], _owned(module)[0].dtype)
            _take(frozen, [module], laid, kind.served(module, multiply))
    for module in model.modules():
        if type(module) is nn.LayerNorm and (engine is None or module not in inner) and is_free(module):
            weight, bias = (None if p is None else p.data for p in (module.weight, module.bias))
            numbers: dict[str, Any] = {
                "normalized_shape": module.normalized_shape,
                "weight": weight,
                "bias": bias,
                "eps": module.eps,
            }
            norm: Callable[[Tensor], Tensor] = functools.partial(F.layer_norm, **numbers)
            if weight is not None and weight.dim() == 1 and cpu.serving(weight.dtype, weight.device) is not None:
                norm = LayerNorm(Norm.of(module))
            frozen.guard(module, norm)
    for module in model.modules():
        if type(module) is PredictionHead and is_quiet(module) and (predict := _prediction_of(module)) is not None:
            frozen.guard(module, predict)
    if engine is not None and table is not None:
        is_left_to_us = engine is CpuLayers and backbone.attn_implementation == "auto"
        backend = NativeAttention() if is_left_to_us else backbone.backend
        frozen.layers = engine(backbone.config, _take_layers(frozen, backbone, table), backend)
        for module in inner:
            if "_frozen" not in module.__dict__:
                frozen.guard(module)
        backbone.runner = frozen
    frozen.switch_off(parameter for parameter in model.parameters() if alone or embedding not in owners[parameter])
    for module in {model, backbone, *models}:
        frozen.watch(module)


def _owned(module: nn.Module) -> list[nn.Parameter]:
    """A module's own parameters."""
    return [parameter for parameter in module._parameters.values() if parameter is not None]


def _table(embedding: nn.Module) -> Embedding | None:
    """What an embedding looks up or computes; None where that is not known here."""
    usual = type(embedding) in _EMBEDDINGS and is_quiet(embedding) and getattr(embedding, "max_norm", None) is None
    if type(embedding) is nn.Embedding and type(embedding._parameters.get("weight")) is not nn.Parameter:
        return None
    return _EMBEDDINGS[type(embedding)](embedding) if usual else None


def _take(frozen: Frozen, modules: Sequence[nn.Module], laid: LaidOut, serve: Callable[[Tensor], Any] | None) -> None:
    """Guard linear layers whose weights were laid out as one, and take their numbers away."""
    kind, first = _LINEAR[type(modules[0])], 0
    for module in modules:
        outputs = slice(first, first := first + kind.shape(module)[0])
        restored = kind.restored(module, laid, outputs)
        for name in restored.keys() & module._parameters.keys():
            parameter = module._parameters[name]
            assert parameter is not None
            frozen.hold(parameter, restored.pop(name))
        frozen.guard(module, serve, restored)


def _multiply(laid: LaidOut, inputs: int, dtype: torch.dtype, x: Tensor) -> Tensor:
    """(..., I) to (..., O); what does not fit is refused as by a plain layer."""
    if x.dtype != dtype or x.dim() < 1 or x.shape[-1] != inputs:
        return F.linear(x, laid.to_dense())
    return laid.product(x) if x.dim() == 2 else laid.product(x.reshape(-1, inputs)).unflatten(0, x.shape[:-1])


def _itself(value: Any) -> Any:
    return value


def _prediction_of(head: PredictionHead) -> Callable[[Tensor], Tensor] | None:
    """What a head computes where the kernels have its activation, too; None where a part of it is not frozen."""
    name = next((name for name in cpu.ACTIVATIONS if ACTIVATIONS[name] is head.act), None)
    weight = head.norm._parameters.get("weight")
    if name is None or weight is None or cpu.serving(weight.dtype, weight.device) is None:
        return None
    kind = _LINEAR.get(type(head.dense))
    is_laid_out = isinstance(head.dense, Guarded) or (kind is not None and not kind.one_by_one)
    if not is_laid_out or not isinstance(head.norm, Guarded):
        return None
    return functools.partial(_predict, head.dense, functools.partial(activate, name), head.norm)


def _predict(dense: nn.Module, act: Callable[[Tensor], Tensor], norm: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = norm(act(dense(x)))
    return out


# A backbone that one engine runs


def gates(activation: object, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether kernels compute an activation and a gate together with the product before them."""
    if gpu.serving(dtype, device):
        return activation in gpu.ACTIVATIONS
    return activation in cpu.ACTIVATIONS and cpu.serving(dtype, device) is not None


def _engine_of(backbone: Backbone) -> Callable[[Config, BackboneWeights[Any], AttentionBackend], Runner] | None:
    """Who can run all layers; None where they are not all as this package makes them, or no kernels serve them."""
    first = next(backbone.parameters())
    if not _is_as_made(backbone) or not gates(backbone.config.hidden_activation, first.dtype, first.device):
        return None
    return GpuLayers if gpu.serving(first.dtype, first.device) else CpuLayers


def _projections(attention: Attention) -> list[nn.Module]:
    """What makes queries, keys and values."""
    if isinstance(attention, EncoderAttention):
        return [attention.Wqkv]
    assert isinstance(attention, DecoderAttention)
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def _is_as_made(backbone: Backbone) -> bool:
    """Whether every part of a backbone is what its configuration says, in kind, size and place."""
    config, width = backbone.config, backbone.config.hidden_size
    methods = ("encode", "_run", "share", "run_layers")
    own = all(getattr(type(backbone), name) is getattr(Backbone, name) for name in methods)
    modules = list(backbone.named_modules(remove_duplicate=False))
    if not own or set(methods) & backbone.__dict__.keys() or len(modules) > len({module for _, module in modules}):
        return False

    def norms(*found: nn.Module) -> bool:
        exact = [m for m in found if type(m) is nn.LayerNorm and m.weight is not None]
        return len(exact) == len(found) and all(m.normalized_shape == (width,) for m in exact)

    def multiply(parts: list[nn.Module], outputs: int, inputs: int, gated: bool = False) -> bool:
        kinds = {type(part) for part in parts}
        kind = _LINEAR.get(kinds.pop()) if len(kinds) == 1 else None
        shapes = () if kind is None else [kind.shape(part) for part in parts]
        fits = all(shape == (outputs // len(parts), inputs) for shape in shapes)
        return kind is not None and kind.in_engine and fits and kind.serves(parts, gated)

    embeddings = backbone.embeddings
    drops = [embeddings.drop]
    fits = type(embeddings) is Embeddings and norms(embeddings.norm, backbone.final_norm) and len(backbone.layers) > 0
    for number, layer in enumerate(backbone.layers):
        assert isinstance(layer, Layer)
        attn, mlp = layer.attn, layer.mlp
        drops += [attn.out_drop, mlp.drop]
        inside = attn.heads * attn.head_dim
        fits = (
            fits and type(layer) is Layer and type(mlp) is MLP and type(attn) is backbone.attention_class
            and type(attn) in (EncoderAttention, DecoderAttention)
            and (attn.layer, attn.head_dim) == (number, config.head_dim)
            and layer.kind == (config.layer_types or ())[number]
            and (type(layer.attn_norm) is nn.Identity if number == 0 else norms(layer.attn_norm))
            and norms(layer.mlp_norm)
            and mlp.activation == config.hidden_activation and mlp.act is activation(config.hidden_activation)
            and multiply(_projections(attn), 3 * inside, width) and multiply([attn.Wo], width, inside)
            and multiply([mlp.Wi], 2 * config.intermediate_size, width, gated=True)
            and multiply([mlp.Wo], width, config.intermediate_size)
        )  # fmt: skip
    quiet = all(is_quiet(module) for _, module in modules[1:])
    return fits and quiet and all(type(drop) is nn.Dropout for drop in drops)


def _take_layers(frozen: Frozen, backbone: Backbone, table: Embedding) -> BackboneWeights[Any]:
    """Lay out a backbone's weights, one after another, and take each away from its modules at once."""
    first = next(backbone.parameters())

    def take(*modules: nn.Module, gated: bool = False) -> LaidOut:
        laid = _LINEAR[type(modules[0])].lay_out(modules, gated)
        _take(frozen, modules, laid, None)
        return laid

    layers = []
    for layer in backbone.layers:
        assert isinstance(layer, Layer)
        attn, mlp, attn_norm = layer.attn, layer.mlp, layer.attn_norm
        norms = Norm.of(attn_norm) if isinstance(attn_norm, nn.LayerNorm) else None, Norm.of(layer.mlp_norm)
        qkv, out, gate, down = take(*_projections(attn)), take(attn.Wo), take(mlp.Wi, gated=True), take(mlp.Wo)
        layers.append(LayerWeights(layer.kind, attn.heads, norms[0], qkv, out, norms[1], gate, down))
    ends = Norm.of(backbone.embeddings.norm), Norm.of(backbone.final_norm)
    return BackboneWeights(table, ends[0], layers, ends[1], first.dtype, first.device)
