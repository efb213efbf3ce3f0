"""What stands for a weight while its numbers lie in the layout of the kernels alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modernbert.errors import FrozenError

_ASKED = (
    *(
        "shape",
        "ndim",
        "dtype",
        "device",
        "layout",
        "itemsize",
        "nbytes",
        "requires_grad",
        "grad",
        "grad_fn",
        "is_leaf",
    ),
    *("is_meta", "is_cpu", "is_cuda", "is_sparse", "is_quantized", "is_nested", "_version", "_backward_hooks"),
)
_CALLED = (
    *("size", "dim", "numel", "nelement", "element_size", "stride", "storage_offset", "is_contiguous"),
    *("is_floating_point", "is_complex", "is_inference", "data_ptr", "__hash__"),
)
_ALLOWED = {getattr(Tensor, name).__get__ for name in _ASKED} | {getattr(Tensor, name) for name in _CALLED}
_SWITCHES = {Tensor.requires_grad_, Tensor.requires_grad.__set__}  # type: ignore[attr-defined]  # off alone


class FrozenWeight(nn.Parameter):
    """The stand-in of a weight of an optimized model: it has the weight's shape and dtype, and no numbers.

    Whoever computes with it, or writes to it, gets a `FrozenError` instead of an effect that nobody would see.
    `module.weight` never gives it: it gives the numbers back first.
    """

    @staticmethod
    def of(weight: Tensor) -> FrozenWeight:
        """The stand-in of a weight."""
        meta = torch.empty_like(weight, device="meta", memory_format=torch.contiguous_format)
        frozen: FrozenWeight = torch.Tensor._make_subclass(FrozenWeight, meta, False)
        return frozen

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if function in _ALLOWED or (function in _SWITCHES and args[1:] == (False,)):
                return function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", str(function))
        raise FrozenError(
            f"a weight of an optimized model was used by {name!r}, and its numbers lie in the kernels' layout; call "
            "model.unpack() first, or read it as an attribute of its layer"
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FrozenWeight(shape={tuple(self.shape)}, dtype={self.dtype})"
