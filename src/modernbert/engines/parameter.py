"""What a weight is while its numbers lie in the layout of kernels alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from modernbert.errors import FrozenError

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

    Attributes:
        was: its class before.
        trained: whether it had gradients before.
        is_left_off: whether somebody switched its gradient off while it was frozen.
        end: thaws the model; called where somebody switches its gradient on.
    """

    was: type[nn.Parameter]
    trained: bool
    is_left_off: bool
    end: Callable[[], None]

    @staticmethod
    def freeze(weight: nn.Parameter, end: Callable[[], None]) -> FrozenWeight:
        """Take the numbers away from a parameter; returns it."""
        was, trained = type(weight), weight.requires_grad
        if not weight.is_inference():  # a graph that still needs the numbers is to end in an error, not in NaN
            torch.autograd.graph.increment_version(weight)
        weight.requires_grad_(False)
        nothing = float("nan") if weight.is_floating_point() else 0
        weight.data = weight.data.new_full((), nothing).expand(weight.shape)  # one number of memory
        weight.__class__ = FrozenWeight
        assert isinstance(weight, FrozenWeight)
        weight.was, weight.trained, weight.is_left_off, weight.end = was, trained, False, end
        return weight

    def thaw(self, numbers: Tensor) -> None:
        """Give the numbers back, and the gradient that it had, unless somebody has switched it off since."""
        if type(self) is not FrozenWeight:
            return
        was, trains = self.was, self.trained and not self.is_left_off
        with torch._C.DisableTorchFunctionSubclass():
            self.data = numbers
        cast(Any, self).__class__ = was
        del self.was, self.trained, self.is_left_off, self.end
        self.requires_grad_(trains)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        values = (*args[1:], *(kwargs or {}).values())
        if function in _SWITCHES and values in ((), (True,)):
            args[0].end()
            return function(*args, **(kwargs or {}))
        switched_off = function in _SWITCHES and values == (False,)
        with torch._C.DisableTorchFunctionSubclass():
            if function in _ALLOWED or switched_off or (function == _SET_GRAD and values == (None,)):
                if switched_off:
                    args[0].is_left_off = True
                return function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", str(function))
        raise FrozenError(
            f"a weight of an optimized model was used by {name!r}, and its numbers lie in the kernels' layout; call "
            "model.thaw() first, or read it as an attribute of its layer"
        )

    def __repr__(self) -> str:  # type: ignore[override]  # as that of nn.Parameter
        return f"FrozenWeight(shape={tuple(self.shape)}, dtype={self.dtype})"

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)
