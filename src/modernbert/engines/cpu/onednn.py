"""Weights in oneDNN's layout, for CPUs and dtypes that our own kernels do not serve.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modernbert.nn.linear import linear, onednn_computes, onednn_serves, product


class OneDnnWeight:
    """A weight, with its bias, laid out by PyTorch's oneDNN.

    Args:
        weight_OI: (O, I), float32 or bfloat16, on the CPU.
        bias_O: (O,) or None.
        tokens: a typical number of tokens, which the layout is chosen by; any number works.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, tokens: int = 256) -> None:
        dense = weight_OI.detach().to(onednn_computes(weight_OI.dtype)).contiguous()
        self.reordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(dense, tokens)
        self.like = weight_OI.detach().to("meta")
        self.bias = None if bias_O is None else bias_O.detach()

    def product(self, x_TI: Tensor) -> Tensor:
        """(T, I) to (T, O)."""
        if not onednn_serves(x_TI):  # somebody switched it off since
            return linear(x_TI, self.to_dense(), self.bias)
        return product(x_TI, self.like, self.bias, self.reordered)

    def to_dense(self) -> Tensor:
        """The weight, (O, I)."""
        dense: Tensor = self.reordered.to_dense().to(self.like.dtype)
        return dense
