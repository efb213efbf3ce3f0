"""Guarded modules and parameters: what those of a frozen model are, and the one object that thaws them.

A frozen model keeps its modules, but their numbers lie in the layout of kernels alone. Each module becomes `Guarded`:
some serve, by kernels; whatever else anybody does to one, or asks of its weights, first thaws the whole model, which is
then as it was before. So nothing needs to be checked before a forward pass.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.autograd.forward_ad
import torch.utils._python_dispatch as dispatch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from modernbert.errors import FrozenError
from modernbert.nn.attention import AttentionBackend
from modernbert.nn.backbone import Backbone
from modernbert.nn.execution import Cache, Hidden, Runner
from modernbert.nn.packing import PackedInputs

logger = logging.getLogger(__name__)

LOCK = threading.RLock()  # one model is frozen or thawed at a time
_KEPT = ("_frozen", "_serve", "_taken")  # what a guarded module has beside its own attributes

# What may be asked of a weight without numbers: attributes, and methods.
_ASKED = (
    "shape ndim dtype device layout itemsize nbytes requires_grad grad grad_fn is_leaf is_meta is_cpu is_cuda is_mps "
    "is_xla is_sparse is_quantized is_nested retains_grad _version _backward_hooks"
)
_CALLED = (
    "size dim numel nelement element_size stride storage_offset is_contiguous get_device is_floating_point is_complex "
    "is_inference is_shared is_signed data_ptr __hash__ __len__"
)
_ALLOWED = {getattr(Tensor, name).__get__ for name in _ASKED.split()}
_ALLOWED |= {getattr(Tensor, name) for name in _CALLED.split()}
_ALLOWED |= {torch.is_floating_point, torch.is_complex, torch.numel}
_SET_REQUIRES_GRAD, _SET_GRAD = (getattr(Tensor, name).__set__ for name in ("requires_grad", "grad"))
_SWITCHES = {Tensor.requires_grad_, _SET_REQUIRES_GRAD}


class FrozenWeight(nn.Parameter):
    """A parameter of a frozen model: it has the weight's shape and dtype, and no numbers.

    Whoever computes with it, or writes to it, gets a `FrozenError` instead of an effect that nobody would see.
    `module.weight` never gives it: it gives the numbers back first. A parameter becomes one and becomes itself again in
    place, so that optimizers and other holders keep it. What reads its memory past PyTorch's functions finds NaN.
    """

    was: type[nn.Parameter]  # its class before
    trains: bool  # whether it had gradients before, and nobody switched them off since
    numbers: Callable[[], Tensor]  # gives them back
    end: Callable[[], None]  # thaws the model; called where somebody switches the gradient on

    @staticmethod
    def freeze(weight: nn.Parameter, numbers: Callable[[], Tensor], end: Callable[[], None]) -> FrozenWeight:
        """Take the numbers away from a parameter; returns it."""
        was, trains = type(weight), weight.requires_grad
        if not weight.is_inference():  # a graph that still needs the numbers is to end in an error, not in NaN
            torch.autograd.graph.increment_version(weight)
        weight.requires_grad_(False)
        nothing = float("nan") if weight.is_floating_point() else 0
        weight.data = weight.data.new_full((), nothing).expand(weight.shape)  # one number of memory
        weight.__class__ = FrozenWeight
        assert isinstance(weight, FrozenWeight)
        weight.was, weight.trains, weight.numbers, weight.end = was, trains, numbers, end
        return weight

    def thaw(self) -> None:
        """Give the numbers back, and the gradient; what somebody swapped for another stays as it is."""
        if type(self) is not FrozenWeight:
            return
        was, trains, numbers = self.was, self.trains, self.numbers()
        with torch._C.DisableTorchFunctionSubclass():
            self.data = numbers
        cast(Any, self).__class__ = was
        del self.was, self.trains, self.numbers, self.end
        self.requires_grad_(trains)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        values = (*args[1:], *kwargs.values())
        if function in _SWITCHES and values in ((), (True,)):
            args[0].end()
            return function(*args, **kwargs)
        switched_off = function in _SWITCHES and values == (False,)
        with torch._C.DisableTorchFunctionSubclass():
            if function in _ALLOWED or switched_off or (function == _SET_GRAD and values == (None,)):
                if switched_off:
                    args[0].trains = False
                return function(*args, **kwargs)
        name = getattr(function, "__name__", str(function))
        raise FrozenError(
            f"a weight of an optimized model was used by {name!r}, and its numbers lie in the kernels' layout; call "
            "model.thaw() first, or read it as an attribute of its layer"
        )

    def __repr__(self) -> str:  # type: ignore[override]  # as that of nn.Parameter
        return f"FrozenWeight(shape={tuple(self.shape)}, dtype={self.dtype})"

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)


class Frozen:
    """What a model was frozen into: it runs a backbone's layers where an engine runs all, and thaws.

    Attributes:
        layers: the engine's layers; None where modules run one by one.
    """

    def __init__(self) -> None:
        self.layers: Runner | None = None
        # Modules hold this object, so it holds them weakly: a model that nobody wants goes at once.
        self._modules: list[weakref.ref[nn.Module]] = []
        self._parameters: list[FrozenWeight] = []
        self._switched: list[nn.Parameter] = []  # they keep their numbers, and have no gradient meanwhile

    def __reduce__(self) -> Any:  # copies of a model are not frozen
        return type(None), ()

    # Freezing

    def hold(self, parameter: nn.Parameter, numbers: Callable[[], Tensor]) -> None:
        """Take the numbers away from a parameter, if that is not done yet; the function gives them back."""
        if type(parameter) is not FrozenWeight:
            end = functools.partial(_end, weakref.ref(self))
            self._parameters.append(FrozenWeight.freeze(parameter, numbers, end))

    def guard(
        self,
        module: nn.Module,
        serve: Callable[[Tensor], Any] | None = None,
        taken: Mapping[str, Callable[[], Any]] | None = None,
        hold: bool = True,
    ) -> None:
        """Guard a module.

        Args:
            module: not guarded yet.
            serve: what kernels compute for it; None where nothing is asked of it.
            taken: the attributes that it loses meanwhile, and how each is made again.
            hold: whether its parameters lose their numbers too; those that are not held yet are kept as they are.
        """
        for parameter in module._parameters.values() if hold else ():
            if parameter is not None and type(parameter) is not FrozenWeight:
                self.hold(parameter, functools.partial(_itself, parameter.data))
        taken = taken or {}
        self.watch(module, _serve=serve, _taken=taken)
        for name in taken:
            del module.__dict__[name]
        object.__setattr__(module, "__class__", _guarded(type(module)))

    def watch(self, module: nn.Module, **attributes: Any) -> None:
        """Have the model thaw where a module's parameters or submodules are replaced."""
        plain = module._parameters, module._modules
        self._modules.append(weakref.ref(module))
        module.__dict__.update(
            _frozen=self, _parameters=Watched(self, plain[0]), _modules=Watched(self, plain[1]), **attributes
        )

    def switch_off(self, parameters: Iterable[nn.Parameter]) -> None:
        """Let parameters that keep their numbers have no gradient meanwhile."""
        for parameter in parameters:
            if type(parameter) is not FrozenWeight and parameter.requires_grad:
                parameter.requires_grad_(False)
                self._switched.append(parameter)

    def leave_off(self, parameters: Iterable[nn.Parameter]) -> None:
        """Forget which of these had gradients: somebody wants them without."""
        chosen = set(map(id, parameters))
        self._switched = [parameter for parameter in self._switched if id(parameter) not in chosen]

    # Running

    def yields(self, x: Any) -> bool:
        """Whether the modules must compute this themselves: gradients are wanted, autocast, or somebody traces."""
        if not isinstance(x, Tensor) or (torch.is_grad_enabled() and x.requires_grad):
            return True
        if torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling() or torch._C._is_tracing():
            return True
        transformed = torch.autograd.forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack()
        return bool(transformed) or torch._C._len_torch_dispatch_stack() > 0

    @property
    def goes_one_by_one(self) -> bool:
        """See `nn.execution.Runner`."""
        return self.layers is not None and self.layers.goes_one_by_one

    def run(
        self, inputs: PackedInputs, want_states: bool, backend: AttentionBackend | None, cache: Cache | None
    ) -> Hidden | None:
        """See `nn.execution.Runner`."""
        layers = self.layers
        given = inputs.ids_T if inputs.embeds_TM is None else inputs.embeds_TM
        if layers is None or self.yields(given) or nn.modules.module._has_any_global_hook():
            if cache is not None:
                cache.one_by_one = False
            self.thaw("gradients, autocast, a tracer or hooks need its modules")
            return None
        return layers.run(inputs, want_states, backend, cache)

    # Thawing

    def thaw(self, why: str = "") -> None:
        """Make the model what it was before it was frozen. Passes that run meanwhile end with what they began with."""
        with LOCK, _undisturbed(), torch.inference_mode(False), torch.no_grad():
            if self._modules and why:
                logger.info("a frozen model was thawed, and computes without kernels now: %s", why)
            for parameter in self._parameters:
                FrozenWeight.thaw(parameter)
            for switched in self._switched:
                switched.requires_grad_(True)
            for module in (reference() for reference in self._modules):
                if module is not None:
                    _unguard(module, self)
            self.layers, self._modules, self._parameters, self._switched = None, [], [], []


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Without the modes and transforms that somebody runs the model in."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(dispatch._disable_current_modes())
        if torch._C._functorch.peek_interpreter_stack() is not None:
            stack.enter_context(temporarily_clear_interpreter_stack())
        yield


def _end(reference: Callable[[], Frozen | None]) -> None:
    if (frozen := reference()) is not None:
        frozen.thaw("the gradient of a weight was switched on")


def _itself(value: Any) -> Any:
    return value


class Watched(dict[str, Any]):
    """The parameters or submodules of a frozen model's module: writing to them thaws the model first."""

    def __init__(self, frozen: Frozen, plain: dict[str, Any]) -> None:
        super().__init__(plain)
        self.frozen, self.plain = frozen, plain

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(dict(self), memo)


def _writing(name: str) -> Callable[..., Any]:
    def method(self: Watched, *args: Any, **kwargs: Any) -> Any:
        self.frozen.thaw("a weight or a submodule was replaced")
        getattr(dict, name)(self, *args, **kwargs)
        return getattr(self.plain, name)(*args, **kwargs)

    return method


for _name in ("__setitem__", "__delitem__", "update", "pop", "popitem", "clear", "setdefault", "__ior__"):
    setattr(Watched, _name, _writing(_name))


def plain_state(module: nn.Module) -> dict[str, Any]:
    """A module's attributes as they are where the model is not frozen."""
    plain = {name: value for name, value in module.__dict__.items() if name not in _KEPT}
    for name in ("_parameters", "_modules"):
        if isinstance(plain[name], Watched):
            plain[name] = plain[name].plain
    return plain | {name: make() for name, make in module.__dict__.get("_taken", {}).items()}


def _unguard(module: nn.Module, frozen: Frozen) -> None:
    module.__dict__.update(plain_state(module))
    if isinstance(module, Guarded):
        object.__setattr__(module, "__class__", module.plain)
    if isinstance(module, Backbone) and module.runner is frozen:
        module.runner = None
    for name in _KEPT:
        module.__dict__.pop(name, None)


class Guarded(nn.Module):
    """Goes before the class of a frozen module: serves by kernels, and thaws for whatever else is wanted of it."""

    # Another thread may thaw at any moment; without `_frozen` a module is plain again, and is asked once more.
    plain: ClassVar[type[nn.Module]]  # the class of the module

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A plain module: what a module makes of its own class, such as a part of a list, is not frozen."""
        return cls.plain(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """By kernels, where they serve."""
        frozen, serve = self.__dict__.get("_frozen"), self.__dict__.get("_serve")
        if frozen is None or serve is None or kwargs or len(args) != 1 or frozen.yields(args[0]):
            return self._plainly("forward", *args, **kwargs)
        return serve(args[0])

    def _thaw(self, what: str) -> None:
        frozen = self.__dict__.get("_frozen")
        if frozen is not None:
            frozen.thaw(f"{what} of a {type(self).__name__}")

    def _plainly(self, name: str, *args: Any, **kwargs: Any) -> Any:
        self._thaw(f"{name!r} was called")
        return getattr(self, name)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Only what is no ordinary attribute comes here, parameters among it.
        state = self.__dict__
        if "_frozen" not in state or state["_parameters"].get(name) is not None or name in state.get("_taken", ()):
            self._thaw(f"{name!r} was read")
            return getattr(self, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "training" and not value:
            return
        self._thaw(f"{name!r} was set")
        setattr(self, name, value)

    def __delattr__(self, name: str) -> None:
        self._thaw(f"{name!r} was removed")
        delattr(self, name)

    def _like(self, state: dict[str, Any]) -> nn.Module:
        like = self.plain.__new__(self.plain)
        like.__dict__.update(state)
        return like

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        with LOCK:
            if "_frozen" not in self.__dict__:
                copied: nn.Module = copy.deepcopy(self, memo)
                return copied
            for parameter in self._parameters.values():
                if isinstance(parameter, FrozenWeight) and id(parameter) not in memo:
                    with torch.inference_mode(False), torch.no_grad():
                        numbers = parameter.numbers().clone()
                    memo[id(parameter)] = parameter.was(numbers, requires_grad=parameter.trains)
            memo[id(self)] = copied = copy.deepcopy(self._like(plain_state(self)), memo)
            return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _itself, (copy.deepcopy(self),)

    def extra_repr(self) -> str:
        """What `print` shows; it does not thaw."""
        return self._like({name: value for name, value in self.__dict__.items() if name not in _KEPT}).extra_repr()


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


def thaw(model: nn.Module) -> None:
    """Thaw a model, whichever part of it was frozen."""
    for module in list(model.modules()):
        if (frozen := module.__dict__.get("_frozen")) is not None:
            frozen.thaw()


def is_frozen(model: nn.Module) -> bool:
    """Whether any part of a model is frozen."""
    return any(isinstance(module, Guarded) for module in model.modules())
