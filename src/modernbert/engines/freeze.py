"""Freezing a model for inference, and thawing it: the contract between modules and the engines that run them.

A frozen model keeps its modules, but their numbers lie in the layout of kernels alone, owned by the object made here.
Each module becomes `Guarded`: some serve, by kernels; whatever else anybody does to one, or asks of its weights, first
thaws the whole model, which is then as it was before. So nothing needs to be checked before a forward pass.
"""

from __future__ import annotations

import copy
import functools
import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modernbert.config import Config
from modernbert.engines.cpu.attention import NativeAttention
from modernbert.engines.cpu.runner import CpuLayers
from modernbert.engines.gpu import operations as gpu
from modernbert.engines.gpu.runner import GpuLayers
from modernbert.engines.parameter import FrozenWeight
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
from modernbert.nn.attention import AttentionBackend
from modernbert.nn.attention.eager import EagerAttention
from modernbert.nn.backbone import Backbone
from modernbert.nn.execution import Cache, Hidden
from modernbert.nn.layers import MLP, Attention, DecoderAttention, Embeddings, EncoderAttention, Layer, Linear
from modernbert.nn.packing import PackedInputs

logger = logging.getLogger(__name__)

# By the class itself, not a subclass: one made elsewhere, such as an adapter's, may compute something else.
_LINEAR: dict[type[nn.Module], LinearKind] = {Linear: FloatLinear()}
_EMBEDDINGS: dict[type[nn.Module], Callable[[Any], Embedding]] = {nn.Embedding: lambda module: module.weight.data}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def register_linear(cls: type[nn.Module], kind: LinearKind) -> None:
    """Say how the linear layers of a class are frozen."""
    _LINEAR[cls] = kind


def register_embedding(cls: type[nn.Module], function: Callable[[Any], Embedding]) -> None:
    """Say what the embeddings of a class look up or compute, apart from the module."""
    _EMBEDDINGS[cls] = function


class Layers(Protocol):
    """An engine's forward pass over all layers of a backbone, made of its configuration and its weights."""

    def run(self, inputs: PackedInputs, want_states: bool, backend: EagerAttention | None, cache: Any) -> Hidden:
        """See `nn.execution.Runner`."""
        ...


class Frozen:
    """What a model was frozen into: it holds the numbers, runs a backbone's layers where an engine runs all, and thaws.

    Attributes:
        layers: the engine's layers; None where modules run one by one.
    """

    def __init__(self) -> None:
        self.layers: Layers | None = None
        # Modules hold this object, so it holds them weakly: a model that nobody wants goes at once.
        self._backbone: Callable[[], Backbone | None] = lambda: None
        self._modules: list[weakref.ref[Guarded]] = []
        self._parameters: dict[int, tuple[FrozenWeight, Callable[[], Tensor]]] = {}
        self._attributes: dict[int, dict[str, Callable[[], object]]] = {}
        self._lock = threading.RLock()

    def __reduce__(self) -> Any:  # copies of a model are not frozen
        return type(None), ()

    @property
    def is_active(self) -> bool:
        """Whether the model is still frozen."""
        return bool(self._modules)

    def hold(self, parameter: nn.Parameter, numbers: Callable[[], Tensor]) -> None:
        """Take the numbers away from a parameter; the function gives them back."""
        if id(parameter) not in self._parameters:
            self._parameters[id(parameter)] = FrozenWeight.freeze(parameter), numbers

    def hold_linear(self, modules: Sequence[nn.Module], laid: LaidOut) -> None:
        """Take the numbers away from linear layers whose weights were laid out as one."""
        first = 0
        for module in modules:
            outputs = slice(first, first := first + _outputs(module))
            numbers = _LINEAR[type(module)].numbers(module, laid, outputs)
            for name, source in numbers.parameters.items():
                parameter = module._parameters[name]
                assert parameter is not None
                self.hold(parameter, source)
            for name in numbers.attributes:
                del module.__dict__[name]
            self._attributes[id(module)] = numbers.attributes

    def guard(self, module: nn.Module, serve: Callable[..., Any] | None = None) -> None:
        """Guard a module; `serve` computes its output by kernels, if anybody is to ask for it.

        The numbers of parameters that are not held yet are kept as they are.
        """
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in self._parameters:
                self.hold(parameter, functools.partial(_itself, parameter.data))
        plain = module._parameters, module._modules
        object.__setattr__(module, "__class__", _guarded(type(module)))
        module.__dict__.update(_frozen=self, _serve=serve)
        module.__dict__.update(_parameters=Watched(self, plain[0]), _modules=Watched(self, plain[1]))
        assert isinstance(module, Guarded)
        self._modules.append(weakref.ref(module))

    def run_by(self, layers: Layers, backbone: Backbone) -> None:
        """Have an engine's layers run a backbone."""
        self.layers, self._backbone, backbone.runner = layers, weakref.ref(backbone), self

    def yields(self, x: Tensor) -> bool:
        """Whether the modules must compute this themselves: gradients are wanted, autocast, or a compiler traces."""
        if torch.is_grad_enabled() and x.requires_grad:
            return True
        return torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling()

    def run(
        self, inputs: PackedInputs, want_states: bool, backend: EagerAttention | None, cache: Cache | None
    ) -> Hidden | None:
        """See `nn.execution.Runner`."""
        given = inputs.ids_T if inputs.embeds_TM is None else inputs.embeds_TM
        assert given is not None
        layers = self.layers
        if layers is None or self.yields(given) or nn.modules.module._has_any_global_hook():
            self.thaw("gradients, autocast, a compiler or hooks need its modules")
            return None
        return layers.run(inputs, want_states, backend, cache)

    def taken(self, module: nn.Module) -> dict[str, Callable[[], object]]:
        """The attributes that a module lacks meanwhile, and how each is made again."""
        return self._attributes.get(id(module), {})

    def numbers(self, parameter: nn.Parameter) -> Tensor:
        """The numbers of a frozen parameter."""
        with torch.inference_mode(False), torch.no_grad():
            return self._parameters[id(parameter)][1]()

    def thaw(self, why: str = "") -> None:
        """Make the model what it was before it was frozen. Passes that run meanwhile end with what they began with."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self._modules and why:
                logger.info("a frozen model was thawed, and computes without kernels now: %s", why)
            for parameter, numbers in self._parameters.values():
                parameter.thaw(numbers())
            for module in (reference() for reference in self._modules):
                if module is not None:
                    module.end()
            backbone = self._backbone()
            if backbone is not None and backbone.runner is self:
                backbone.runner = None
            self.layers, self._modules, self._parameters, self._attributes = None, [], {}, {}


def _outputs(module: nn.Module) -> int:
    count = module.out_features
    assert isinstance(count, int)
    return count


def _itself(tensor: Tensor) -> Tensor:
    return tensor


class Watched(dict[str, Any]):
    """The parameters or submodules of a guarded module: writing to them thaws the model first."""

    def __init__(self, frozen: Frozen, plain: dict[str, Any]) -> None:
        super().__init__(plain)
        self.frozen, self.plain = frozen, plain

    def __setitem__(self, name: str, value: Any) -> None:
        self.frozen.thaw(f"{name!r} was replaced")
        self.plain[name] = value
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        self.frozen.thaw(f"{name!r} was removed")
        del self.plain[name]
        super().__delitem__(name)


class Guarded(nn.Module):
    """Goes before the class of a frozen module: serves by kernels, and thaws for whatever else is wanted of it.

    Attributes:
        plain: the class of the module.
    """

    plain: ClassVar[type[nn.Module]]
    _frozen: Frozen
    _serve: Callable[..., Any] | None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A plain module: what a module makes of its own class, such as a part of a list, is not frozen."""
        return cls.plain(*args, **kwargs)

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """By kernels, where they serve."""
        serve = self._serve
        if serve is None or self._frozen.yields(x):
            return self._plainly("forward", x, *args, **kwargs)
        return serve(x)

    def _plainly(self, name: str, *args: Any, **kwargs: Any) -> Any:
        self._frozen.thaw(f"{name!r} of a {type(self).__name__} was called")
        return getattr(self, name)(*args, **kwargs)

    def plain_state(self) -> dict[str, Any]:
        """The module's attributes as they are without a guard."""
        plain = {name: value for name, value in self.__dict__.items() if name not in ("_frozen", "_serve")}
        plain |= {name: plain[name].plain for name in ("_parameters", "_modules")}
        return plain | {name: value() for name, value in self._frozen.taken(self).items()}

    def end(self) -> None:
        """Make the module what it was."""
        self.__dict__.update(self.plain_state())
        object.__setattr__(self, "__class__", self.plain)
        del self.__dict__["_frozen"], self.__dict__["_serve"]

    def __getattr__(self, name: str) -> Any:
        # Only what is no ordinary attribute comes here, parameters among it.
        if self.__dict__["_parameters"].get(name) is not None or name in self._frozen.taken(self):
            self._frozen.thaw(f"{name!r} of a {type(self).__name__} was read")
            return getattr(self, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "training" and not value:
            return
        self._frozen.thaw(f"{name!r} of a {type(self).__name__} was set")
        setattr(self, name, value)

    def __delattr__(self, name: str) -> None:
        self._frozen.thaw(f"{name!r} of a {type(self).__name__} was removed")
        delattr(self, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        for parameter in self._parameters.values():
            if isinstance(parameter, FrozenWeight) and id(parameter) not in memo:
                numbers = self._frozen.numbers(parameter).clone()
                memo[id(parameter)] = parameter.was(numbers, requires_grad=parameter.requires_grad)
        like = self.plain.__new__(self.plain)
        like.__dict__.update(self.plain_state())
        memo[id(self)] = copied = copy.deepcopy(like, memo)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return copy.deepcopy(self).__reduce_ex__(protocol)

    def extra_repr(self) -> str:
        """What `print` shows; it does not thaw."""
        like = self.plain.__new__(self.plain)
        like.__dict__.update({name: value for name, value in self.__dict__.items() if not name.startswith("_serve")})
        return like.extra_repr()


def _thawing(name: str) -> Callable[..., Any]:
    def method(self: Guarded, *args: Any, **kwargs: Any) -> Any:
        return self._plainly(name, *args, **kwargs)

    return method


for _name in (
    "_apply", "_save_to_state_dict", "_load_from_state_dict", "requires_grad_", "compile", "add_module",
    "register_module", "register_parameter", "register_buffer", "register_forward_hook", "register_forward_pre_hook",
    "register_full_backward_hook", "register_full_backward_pre_hook", "register_backward_hook",
):  # fmt: skip
    setattr(Guarded, _name, _thawing(_name))


_GUARDED: dict[type[nn.Module], type[Guarded]] = {}


def _guarded(cls: type[nn.Module]) -> type[Guarded]:
    """The guarded class of a module's class."""
    if cls not in _GUARDED:
        own = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, "plain": cls}
        _GUARDED[cls] = type(cls.__name__, (Guarded, cls), own)
    return _GUARDED[cls]


def freeze(model: nn.Module, backbone: Backbone) -> Frozen:
    """Freeze a model in place: its layers into one engine where that serves them all, else module by module.

    Args:
        model: in evaluation mode.
        backbone: its layers; the model itself where it has no head.
    """
    thaw(model)
    frozen, kind = Frozen(), _LINEAR[Linear]
    inner = set(backbone.modules()) - {backbone}
    embedding: nn.Module = backbone.embeddings.tok_embeddings
    table = _EMBEDDINGS[type(embedding)](embedding) if type(embedding) in _EMBEDDINGS and _is_quiet(embedding) else None
    owners: dict[Tensor, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in owned(module):
            owners.setdefault(parameter, set()).add(module)

    def is_own(module: nn.Module) -> bool:
        """Whether no other module computes with its weights, but for an embedding, which an output may share."""
        shared = set() if table is None else {embedding}
        return all(owners[parameter] <= {module} | shared for parameter in owned(module))

    compiled = {module for module in inner if isinstance(module, MLP)} if backbone.config.reference_compile else set()
    left_out = {module for mlp in compiled for module in mlp.modules()}  # the compiler reads plain weights
    linear = [m for m in model.modules() if type(m) is Linear and m not in left_out and _is_quiet(m) and is_own(m)]
    linear = [m for m in linear if kind.serves([m], gated=False)]
    engine = _engine_of(backbone) if table is not None and not left_out else None
    if engine is not None:
        outside = set(linear) - inner
        if all(is_own(m) or owners[p] <= {embedding} | outside for m in inner for p in owned(m)):
            linear = [m for m in linear if m in outside]
        else:
            engine = None
    # An output that shares the embedding's weight is laid out while that still has its numbers.
    tied = {m: kind.lay_out([m], gated=False) for m in linear if any(embedding in owners[p] for p in owned(m))}
    if table is not None and (engine is not None or tied):
        frozen.guard(embedding, functools.partial(F.embedding, weight=table) if isinstance(table, Tensor) else table)
    for module in linear:
        laid = tied[module] if module in tied else kind.lay_out([module], gated=False)
        frozen.hold_linear([module], laid)
        frozen.guard(module, functools.partial(_multiply, laid))
    if engine is not None and table is not None:
        is_left_to_us = engine is CpuLayers and backbone.attn_implementation == "auto"
        backend = NativeAttention() if is_left_to_us else backbone.backend
        frozen.run_by(engine(backbone.config, _take_layers(frozen, backbone, table), backend), backbone)
        for module in inner - {embedding}:
            frozen.guard(module)
    return frozen


def thaw(model: nn.Module) -> None:
    """Undo `freeze`, whichever part of the model it was called for."""
    for module in model.modules():
        if isinstance(module, Guarded):
            module._frozen.thaw()


def is_frozen(model: nn.Module) -> bool:
    """Whether any part of a model is frozen."""
    return any(isinstance(module, Guarded) for module in model.modules())


def owned(module: nn.Module) -> list[nn.Parameter]:
    """A module's own parameters."""
    return [parameter for parameter in module._parameters.values() if parameter is not None]


def _is_quiet(module: nn.Module) -> bool:
    """Whether nothing waits for a module to be called, and its forward pass is its class's."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in module.__dict__


def _multiply(laid: LaidOut, x: Tensor) -> Tensor:
    """(..., I) to (..., O)."""
    if x.dim() == 2 and x.dtype in _DTYPES:
        return laid.product(x)
    dtype = x.dtype if x.dtype in _DTYPES else torch.float32
    return laid.product(x.flatten(0, -2).to(dtype)).unflatten(0, x.shape[:-1]).to(x.dtype)


# A backbone that one engine runs


def _projections(attention: Attention) -> list[nn.Module]:
    """What makes queries, keys and values."""
    if isinstance(attention, EncoderAttention):
        return [attention.Wqkv]
    assert isinstance(attention, DecoderAttention)
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def _engine_of(backbone: Backbone) -> Callable[[Config, BackboneWeights, AttentionBackend], Layers] | None:
    """Who can run all layers; None where they are not all as this package makes them, or no kernels serve them."""
    dtype, device = _place(backbone)
    exact = {Layer, MLP, EncoderAttention, DecoderAttention, nn.LayerNorm, nn.Identity, nn.Dropout, nn.ModuleList}
    exact |= {Embeddings, *_LINEAR, *_EMBEDDINGS}
    if not all(type(m) in exact and _is_quiet(m) for m in backbone.modules() if m is not backbone):
        return None
    if type(backbone.embeddings.tok_embeddings) not in _EMBEDDINGS or not len(backbone.layers):
        return None
    for layer in backbone.layers:
        assert isinstance(layer, Layer)
        for modules, gated in (
            (_projections(layer.attn), False),
            ([layer.attn.Wo], False),
            ([layer.mlp.Wi], True),
            ([layer.mlp.Wo], False),
        ):
            kinds = {type(module) for module in modules}
            if len(kinds) > 1 or not _LINEAR[kinds.pop()].serves(modules, gated):
                return None
    if not gates(backbone.config.hidden_activation, dtype, device):
        return None
    return GpuLayers if gpu.serving(dtype, device) else CpuLayers


def _place(backbone: Backbone) -> tuple[torch.dtype, torch.device]:
    """The dtype and the device of a backbone."""
    first = next(backbone.parameters())
    return first.dtype, first.device


def _take_layers(frozen: Frozen, backbone: Backbone, table: Embedding) -> BackboneWeights:
    """Lay out a backbone's weights, one after another, and take each away from its modules at once."""
    dtype, device = _place(backbone)

    def take(modules: list[nn.Module], gated: bool = False) -> LaidOut:
        laid = _LINEAR[type(modules[0])].lay_out(modules, gated)
        frozen.hold_linear(modules, laid)
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
        dtype,
        device,
    )


def _norm(module: nn.LayerNorm) -> NormWeights:
    return NormWeights(module.weight.data, None if module.bias is None else module.bias.data, module.eps)
