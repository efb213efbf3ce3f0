"""What a weight is while its numbers lie in the layout of the kernels alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from modernbert.errors import FrozenError

# What may be asked of a weight without numbers: attributes, and methods.
_ASKED = (
    "shape ndim dtype device layout itemsize nbytes requires_grad grad grad_fn is_leaf is_meta is_cpu is_cuda is_mps "
    "is_sparse is_quantized is_nested retains_grad _version _backward_hooks"
)
_CALLED = (
    "size dim numel nelement element_size stride storage_offset is_contiguous get_device is_floating_point is_complex "
    "is_inference is_shared is_signed data_ptr __hash__ __len__"
)
_ALLOWED = {getattr(Tensor, name).__get__ for name in _ASKED.split()}
_ALLOWED |= {getattr(Tensor, name) for name in _CALLED.split()}
_SET_REQUIRES_GRAD, _SET_GRAD = (getattr(Tensor, name).__set__ for name in ("requires_grad", "grad"))
_SWITCHES = {Tensor.requires_grad_, _SET_REQUIRES_GRAD}


class FrozenWeight(nn.Parameter):
    """A parameter of an optimized model: it has the weight's shape and dtype, and no numbers.

    Whoever computes with it, or writes to it, gets a `FrozenError` instead of an effect that nobody would see.
    `module.weight` never gives it: it gives the numbers back first. A parameter becomes one and becomes itself again in
    place, so that optimizers and other holders keep it.

    Attributes:
        was: its class before.
        is_left_off: whether somebody switched its gradient off while it was frozen.
    """

    was: type[nn.Parameter]
    is_left_off: bool

    @staticmethod
    def freeze(weight: nn.Parameter) -> FrozenWeight:
        """Take the numbers away from a parameter; returns it."""
        was = type(weight)
        weight.data = weight.data.new_zeros(()).expand(weight.shape)  # one number of memory
        weight.__class__ = FrozenWeight
        assert isinstance(weight, FrozenWeight)
        weight.was, weight.is_left_off = was, False
        return weight

    def thaw(self, numbers: Tensor) -> None:
        """Give the numbers back."""
        cast(Any, self).__class__ = self.was
        self.data = numbers

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        values = (*args[1:], *(kwargs or {}).values())
        switched_off = function in _SWITCHES and values == (False,)
        with torch._C.DisableTorchFunctionSubclass():
            if function in _ALLOWED or switched_off or (function == _SET_GRAD and values == (None,)):
                if switched_off:
                    args[0].is_left_off = True
                return function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", str(function))
        raise FrozenError(
            f"a weight of an optimized model was used by {name!r}, and its numbers lie in the kernels' layout; call "
            "model.unpack() first, or read it as an attribute of its layer"
        )

    def __repr__(self) -> str:  # type: ignore[override]  # as that of nn.Parameter
        return f"FrozenWeight(shape={tuple(self.shape)}, dtype={self.dtype})"

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)
