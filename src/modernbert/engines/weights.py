"""Weights as engines hold them: laid out once for their kernels, and apart from the modules that they come from.

Shapes: T tokens, I inputs, O outputs, M hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from modernbert.engines.cpu import library as cpu
from modernbert.engines.cpu.onednn import OneDnnWeight
from modernbert.engines.cpu.operations import NativeWeight
from modernbert.engines.gpu import operations as gpu
from modernbert.engines.gpu.operations import TritonWeight
from modernbert.nn.linear import onednn_serves

_PARTS = ("weight", "bias")

# A table (vocabulary, M), or a function from ids (T,) to vectors (T, M).
Embedding = Tensor | Callable[[Tensor], Tensor]


class LaidOut(Protocol):
    """A weight and its bias in the layout of whoever multiplies by them. Engines know the gated ones by their class."""

    def product(self, x_TI: Tensor) -> Tensor:
        """(T, I) to (T, O), of a weight that is not gated."""
        ...

    def to_dense(self) -> Tensor:
        """The weight, (O, I)."""
        ...


class NormWeights(NamedTuple):
    """A LayerNorm's numbers, (M,) each."""

    weight: Tensor
    bias: Tensor | None
    eps: float


class LayerWeights(NamedTuple):
    """What a layer multiplies by.

    Attributes:
        kind: of its attention.
        heads: how many it has.
        attn_norm: before the attention; the first layer has none.
        qkv: the projections to queries, keys and values, as one.
        out: the attention's output projection.
        mlp_norm: before the MLP.
        gate: the MLP's first projection, gated.
        down: its second projection.
    """

    kind: str
    heads: int
    attn_norm: NormWeights | None
    qkv: LaidOut
    out: LaidOut
    mlp_norm: NormWeights
    gate: LaidOut
    down: LaidOut


class BackboneWeights(NamedTuple):
    """What an engine needs of a backbone beside its configuration.

    Attributes:
        embedding: where vectors come from.
        first_norm: of the embedding.
        layers: in order.
        last_norm: after the last layer.
        activation: of the MLPs, by its name.
        dtype: of what goes in and comes out.
        device: where it all lies.
    """

    embedding: Embedding
    first_norm: NormWeights
    layers: Sequence[LayerWeights]
    last_norm: NormWeights
    activation: str
    dtype: torch.dtype
    device: torch.device


def gates(activation: object, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether kernels compute an activation and a gate together with the product before them."""
    if gpu.serving(dtype, device):
        return activation in gpu.ACTIVATIONS
    return activation in cpu.ACTIVATIONS and cpu.serving(dtype, device) is not None


class Numbers(NamedTuple):
    """How a linear layer gets back what `LinearKind.lay_out` took.

    Attributes:
        parameters: of each of its parameters the numbers.
        attributes: of each of its attributes the value.
    """

    parameters: dict[str, Callable[[], Tensor]]
    attributes: dict[str, Callable[[], object]]


class LinearKind(Protocol):
    """How the linear layers of one class are laid out for kernels, and restored."""

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """Of a layer's weight, (outputs, inputs); zeros where it has none of its own."""
        ...

    def serves(self, modules: Sequence[nn.Module], gated: bool) -> bool:
        """Whether the weights of layers that read the same inputs can be laid out as one."""
        ...

    def lay_out(self, modules: Sequence[nn.Module], gated: bool) -> LaidOut:
        """Lay them out, where they can be."""
        ...

    def numbers(self, module: nn.Module, laid: LaidOut, outputs: slice) -> Numbers:
        """What a layer holds, from those outputs of what its weight was laid out in."""
        ...


class FloatLinear:
    """Linear layers whose weight is a parameter; see `LinearKind`."""

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """As the parameter has it."""
        weight = module._parameters.get("weight")
        return (0, 0) if weight is None else (weight.shape[0], weight.shape[1])

    def serves(self, modules: Sequence[nn.Module], gated: bool) -> bool:
        """False where a weight is computed anew at each call, as by a parametrization, or has a class of its own.

        Nor where some of several layers have a bias and others have none.
        """
        if len({module._parameters.get("bias") is None for module in modules}) > 1:
            return False
        weights = [module._parameters.get("weight") for module in modules]
        first = weights[0]
        if first is None or any(type(weight) is not nn.Parameter or weight.dtype != first.dtype for weight in weights):
            return False
        ours = gpu.serving(first.dtype, first.device) or cpu.serving(first.dtype, first.device) is not None
        return ours or (onednn_serves(first) and not gated)

    def lay_out(self, modules: Sequence[nn.Module], gated: bool) -> LaidOut:
        """For the kernels of their device and dtype: ours, or else oneDNN's."""
        weights, biases = (
            [p.detach() for m in modules if (p := m._parameters.get(name)) is not None] for name in _PARTS
        )
        weight_OI = weights[0] if len(weights) == 1 else torch.cat(weights)
        bias_O = None if not biases else biases[0] if len(biases) == 1 else torch.cat(biases)
        if gpu.serving(weight_OI.dtype, weight_OI.device):
            return TritonWeight(weight_OI, bias_O)
        if cpu.serving(weight_OI.dtype, weight_OI.device) is not None:
            return NativeWeight(weight_OI, bias_O, gated)
        return OneDnnWeight(weight_OI, bias_O)

    def numbers(self, module: nn.Module, laid: LaidOut, outputs: slice) -> Numbers:
        """The weight comes out of the layout; the bias is kept beside it."""

        def weight() -> Tensor:
            dense = laid.to_dense()
            return dense if len(dense) == outputs.stop - outputs.start else dense[outputs].clone()

        parameters: dict[str, Callable[[], Tensor]] = {"weight": weight}
        if (bias := module._parameters.get("bias")) is not None:
            plain = bias.data
            parameters["bias"] = lambda: plain
        return Numbers(parameters, {})
