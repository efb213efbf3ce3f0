"""Freezing a model for inference: which engine runs it, and what is taken from its modules; `guard` thaws it again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modernbert.config import Config
from modernbert.engines.cpu.attention import NativeAttention
from modernbert.engines.cpu.runner import CpuLayers
from modernbert.engines.gpu import operations as gpu
from modernbert.engines.gpu.runner import GpuLayers
from modernbert.engines.guard import LOCK, Frozen, Layers, thaw
from modernbert.engines.weights import (
    BackboneWeights,
    Embedding,
    FloatLinear,
    LaidOut,
    LayerWeights,
    LinearKind,
    NormWeights,
    gates,
)
from modernbert.nn.activations import activation
from modernbert.nn.attention import AttentionBackend
from modernbert.nn.backbone import Backbone
from modernbert.nn.layers import MLP, Attention, DecoderAttention, Embeddings, EncoderAttention, Layer, Linear

# By the class itself, not a subclass: one made elsewhere, such as an adapter's, may compute something else.
_LINEAR: dict[type[nn.Module], LinearKind] = {Linear: FloatLinear()}
_EMBEDDINGS: dict[type[nn.Module], Callable[[Any], Embedding]] = {nn.Embedding: lambda module: module.weight.data}
_Engine = Callable[[Config, BackboneWeights, AttentionBackend], Layers]


def register_linear(cls: type[nn.Module], kind: LinearKind) -> None:
    """Say how the linear layers of a class are frozen."""
    _LINEAR[cls] = kind


def register_embedding(cls: type[nn.Module], function: Callable[[Any], Embedding]) -> None:
    """Say what the embeddings of a class look up or compute, apart from the module."""
    _EMBEDDINGS[cls] = function


def freeze(model: nn.Module, backbone: Backbone) -> None:
    """Freeze a model in place: its layers into one engine where that serves them all, else module by module.

    Args:
        model: in evaluation mode.
        backbone: its layers; the model itself where it has no head.
    """
    with LOCK, torch.no_grad():
        thaw(model)
        frozen = Frozen()
        try:
            _freeze(frozen, model, backbone)
        except BaseException:
            frozen.thaw()
            raise


def _freeze(frozen: Frozen, model: nn.Module, backbone: Backbone) -> None:
    kind, inner = _LINEAR[Linear], set(backbone.modules()) - {backbone}
    compiled = {module for module in inner if isinstance(module, MLP)} if backbone.config.reference_compile else set()
    left_out = {module for mlp in compiled for module in mlp.modules()}  # the compiler reads plain weights
    owners: dict[Tensor, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in _owned(module):
            owners.setdefault(parameter, set()).add(module)
    embedding: nn.Module = backbone.embeddings.tok_embeddings
    table = _table(embedding)
    shared = set() if table is None else {embedding}  # an output may share an embedding's weight

    def is_free(module: nn.Module) -> bool:
        """Whether it can be frozen by itself: nobody listens, and nobody else computes with its weights."""
        own = all(owners[parameter] <= {module} | shared for parameter in _owned(module))
        return own and module not in left_out and _is_quiet(module)

    linear = [m for m in model.modules() if type(m) is Linear and is_free(m) and kind.serves([m], gated=False)]
    outside = set(linear) - inner
    engine = _engine_of(backbone) if table is not None and not left_out else None
    if any(not owners[p] <= {m} | (outside if m is embedding else shared) for m in inner for p in _owned(m)):
        engine = None
    # An output that shares the embedding's weight is laid out while that still has its numbers.
    tied = {m: kind.lay_out([m], gated=False) for m in linear if any(embedding in owners[p] for p in _owned(m))}
    # Another output, or one of a model around this one, may compute with the embedding's weight, which then stays.
    users = {owner for parameter in _owned(embedding) for owner in owners[parameter]}
    alone = users <= {embedding, *linear} and (model is not backbone or not backbone.embeddings.is_tied)
    if table is not None:
        serve = functools.partial(F.embedding, weight=table) if isinstance(table, Tensor) else table
        frozen.guard(embedding, serve, hold=alone)
    for module in linear:
        if engine is None or module in outside:
            laid = tied[module] if module in tied else kind.lay_out([module], gated=False)
            multiply = functools.partial(_multiply, laid, kind.shape(module)[1], _owned(module)[0].dtype)
            _take(frozen, [module], laid, multiply)
    for module in model.modules():
        if type(module) is nn.LayerNorm and (engine is None or module not in inner) and is_free(module):
            frozen.guard(module, _serve_norm(module))
    if engine is not None and table is not None:
        is_left_to_us = engine is CpuLayers and backbone.attn_implementation == "auto"
        backend = NativeAttention() if is_left_to_us else backbone.backend
        frozen.layers = engine(backbone.config, _take_layers(frozen, backbone, table), backend)
        for module in inner:
            if "_frozen" not in module.__dict__:
                frozen.guard(module)
        backbone.runner = frozen
    frozen.switch_off(parameter for parameter in model.parameters() if alone or embedding not in owners[parameter])
    for module in {model, backbone}:
        frozen.watch(module)


def _owned(module: nn.Module) -> list[nn.Parameter]:
    """A module's own parameters."""
    return [parameter for parameter in module._parameters.values() if parameter is not None]


def _is_quiet(module: nn.Module) -> bool:
    """Whether nothing waits for a module to be called, and its methods are its class's."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and not {"forward", "project"} & module.__dict__.keys()


def _table(embedding: nn.Module) -> Embedding | None:
    """What an embedding looks up or computes; None where that is not known here."""
    usual = type(embedding) in _EMBEDDINGS and _is_quiet(embedding) and getattr(embedding, "max_norm", None) is None
    if type(embedding) is nn.Embedding and type(embedding._parameters.get("weight")) is not nn.Parameter:
        return None
    return _EMBEDDINGS[type(embedding)](embedding) if usual else None


def _take(frozen: Frozen, modules: list[nn.Module], laid: LaidOut, serve: Callable[[Tensor], Any] | None) -> None:
    """Guard linear layers whose weights were laid out as one, and take their numbers away."""
    kind, first = _LINEAR[type(modules[0])], 0
    for module in modules:
        outputs = slice(first, first := first + kind.shape(module)[0])
        numbers = kind.numbers(module, laid, outputs)
        for name, source in numbers.parameters.items():
            parameter = module._parameters[name]
            assert parameter is not None
            frozen.hold(parameter, source)
        frozen.guard(module, serve, numbers.attributes)


def _multiply(laid: LaidOut, inputs: int, dtype: torch.dtype, x: Tensor) -> Tensor:
    """(..., I) to (..., O); what does not fit is refused as by a plain layer."""
    if x.dtype != dtype or x.dim() < 1 or x.shape[-1] != inputs:
        return F.linear(x, laid.to_dense())
    return laid.product(x) if x.dim() == 2 else laid.product(x.reshape(-1, inputs)).unflatten(0, x.shape[:-1])


def _serve_norm(module: nn.LayerNorm) -> Callable[[Tensor], Tensor]:
    """What it computes, apart from the module."""
    weight, bias = (None if p is None else p.data for p in (module.weight, module.bias))
    shape, eps = module.normalized_shape, module.eps
    return lambda x: F.layer_norm(x, shape, weight, bias, eps)


# A backbone that one engine runs


def _projections(attention: Attention) -> list[nn.Module]:
    """What makes queries, keys and values."""
    if isinstance(attention, EncoderAttention):
        return [attention.Wqkv]
    assert isinstance(attention, DecoderAttention)
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def _engine_of(backbone: Backbone) -> _Engine | None:
    """Who can run all layers; None where they are not all as this package makes them, or no kernels serve them."""
    first = next(backbone.parameters())
    if not _is_as_made(backbone) or not gates(backbone.config.hidden_activation, first.dtype, first.device):
        return None
    return GpuLayers if gpu.serving(first.dtype, first.device) else CpuLayers


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
        return kind is not None and fits and kind.serves(parts, gated)

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
    quiet = all(_is_quiet(module) for _, module in modules[1:])
    return fits and quiet and all(type(drop) is nn.Dropout for drop in drops)


def _take_layers(frozen: Frozen, backbone: Backbone, table: Embedding) -> BackboneWeights:
    """Lay out a backbone's weights, one after another, and take each away from its modules at once."""
    first = next(backbone.parameters())

    def take(modules: list[nn.Module], gated: bool = False) -> LaidOut:
        laid = _LINEAR[type(modules[0])].lay_out(modules, gated)
        _take(frozen, modules, laid, None)
        return laid

    layers = []
    for layer in backbone.layers:
        assert isinstance(layer, Layer)
        layers.append(
            LayerWeights(
                kind=layer.kind,
                heads=layer.attn.heads,
                attn_norm=_norm(layer.attn_norm) if isinstance(layer.attn_norm, nn.LayerNorm) else None,
                qkv=take(_projections(layer.attn)),
                out=take([layer.attn.Wo]),
                mlp_norm=_norm(layer.mlp_norm),
                gate=take([layer.mlp.Wi], gated=True),
                down=take([layer.mlp.Wo]),
            )
        )
    return BackboneWeights(
        table,
        _norm(backbone.embeddings.norm),
        layers,
        _norm(backbone.final_norm),
        str(backbone.config.hidden_activation),
        first.dtype,
        first.device,
    )


def _norm(module: nn.LayerNorm) -> NormWeights:
    return NormWeights(module.weight.data, None if module.bias is None else module.bias.data, module.eps)
