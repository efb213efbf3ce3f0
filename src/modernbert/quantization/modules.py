"""Layers whose weights are whole numbers of 8 or 4 bits: linear ones, and the embedding.

They replace `Linear` and `nn.Embedding` in a model, and hold no parameter but a bias: nothing of them can be
trained. In a checkpoint a weight is `weight` (its codes), `weight_scale`, and where columns stay floats
`outliers` (their numbers) and `outlier_weight`.

Shapes: T tokens, M hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from modernbert.engines.cpu.library import DTYPES
from modernbert.engines.freeze import FloatLinear, register_embedding, register_linear
from modernbert.engines.weights import LaidOut
from modernbert.errors import CheckpointError
from modernbert.nn.layers import Linear
from modernbert.quantization.weight import GROUP, PackedIntegers, QuantizedWeight, pack_quantized

# The tensors of a quantized weight by their names in a checkpoint.
PARTS = {"codes": "weight", "scales": "weight_scale", "columns": "outliers", "kept": "outlier_weight"}


class _Through(torch.autograd.Function):
    """The product as it is; its derivative by the inputs is that of the floats which the codes stand for."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, dense_OI: Tensor, laid: Any) -> Tensor:
        ctx.save_for_backward(dense_OI)
        out: Tensor = laid.product(x_TI)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (dense_OI,) = ctx.saved_tensors
        return grads[0] @ dense_OI, None, None


class _Quantized(nn.Module):
    """What quantized layers share: their weight, `quantized`, moves, is saved and is loaded with them."""

    quantized: Any
    dtype: torch.dtype

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        here = self.codes_device
        device = fn(torch.empty(0, dtype=torch.int8, device=here)).device
        weight = None if device == here else self.quantized
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)
        if weight is not None:
            self.quantized = weight.map(lambda t: t.to(device))
        return self

    @property
    def codes_device(self) -> torch.device:
        """Where the weight is; nothing is unpacked for it."""
        device: torch.device = self.quantized.codes.device
        return device

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update(named_parts(self.quantized, prefix))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.quantized = _loaded(self.quantized, state_dict, prefix, *args)


class QuantizedLinear(_Quantized):
    """A linear layer with a quantized weight, laid out for the kernels where there are any.

    Args:
        weight: (out, in).
        bias: (out,) or None.
        dtype: of what is made of `weight` for those who read it.
    """

    def __init__(self, weight: QuantizedWeight, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bits, self.dtype = weight.bits, dtype
        self.register_parameter("bias", bias)
        self.quantized = weight

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def weight(self) -> Tensor:
        """The numbers that the codes stand for, (out, in), made anew each time."""
        return self.quantized.to_dense().to(self.dtype)

    @property
    def codes_device(self) -> torch.device:
        laid = self.laid
        return torch.device("cpu") if isinstance(laid, PackedIntegers) else laid.weight.codes.device

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight in its plain layout; one that is set is laid out."""
        return self.laid.to_quantized()

    @quantized.setter
    def quantized(self, weight: QuantizedWeight) -> None:
        self.laid = pack_quantized(weight, self._parameters["bias"])

    def forward(self, x: Tensor) -> Tensor:
        if not self.laid.holds(self._parameters["bias"]):
            self.quantized = self.quantized
        laid = self.laid
        if x.requires_grad and torch.is_grad_enabled():  # gradients by the inputs still pass
            out: Tensor = _Through.apply(x.flatten(0, -2), self.weight.to(x.dtype), laid)
            return out.unflatten(0, x.shape[:-1])
        dtype = x.dtype if x.dtype in DTYPES else torch.float32
        return laid.product(x.flatten(0, -2).to(dtype)).unflatten(0, x.shape[:-1]).to(x.dtype)

    def __getstate__(self) -> dict[str, Any]:  # a copy lays its weight out anew
        return {**self.__dict__, "laid": self.quantized}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.quantized = state["laid"]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


class QuantizedKind(FloatLinear):
    """How quantized linear layers are laid out for an engine; by itself each is laid out already."""

    one_by_one = False

    def shape(self, module: Any) -> tuple[int, int]:
        shape: tuple[int, int] = module.shape
        return shape

    def serves(self, modules: Sequence[Any], gated: bool) -> bool:
        """Where there are kernels, and layers that read the same inputs are cut alike."""
        parts = [module.laid.parts for module in modules if isinstance(module.laid, PackedIntegers)]
        alike = len({module._parameters["bias"] is None for module in modules}) == 1
        return alike and len(parts) == len(modules) and all(part.is_cut_like(parts[0]) for part in parts)

    def lay_out(self, modules: Sequence[Any], gated: bool) -> LaidOut:
        """As one, for kernels; a layer by itself is laid out already."""
        biases = [module._parameters["bias"] for module in modules]
        for module, bias in zip(modules, biases, strict=True):
            if not module.laid.holds(bias):
                module.quantized = module.quantized
        laid = modules[0].laid
        if len(modules) > 1 or gated:
            whole = QuantizedWeight.together([module.quantized for module in modules])
            laid = pack_quantized(whole, None if biases[0] is None else torch.cat(biases).detach(), gated)
        assert isinstance(laid, PackedIntegers)
        return laid if len(modules) > 1 or gated else laid.beside()

    def restored(self, module: Any, laid: Any, outputs: slice) -> dict[str, Callable[[], Any]]:
        """What was laid out where it is the layer's alone; else it is made anew."""
        bias, whole = module._parameters["bias"], module.laid.shape == laid.shape and not laid.gated
        plain = None if bias is None else bias.data
        again = (lambda: laid) if whole else (lambda: pack_quantized(laid.to_quantized().outputs(outputs), plain))
        return {"laid": again} if bias is None else {"laid": again, "bias": lambda: plain}


class QuantizedEmbedding(_Quantized, nn.Embedding):
    """An embedding with a quantized weight.

    Args:
        weight: (V, M).
        padding_idx: see `nn.Embedding`.
        dtype: of the vectors.
    """

    def __init__(self, weight: QuantizedWeight, padding_idx: int | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.quantized, self.padding_idx, self.dtype = weight, padding_idx, dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    @property  # as in `QuantizedLinear`
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.quantized.to_dense().to(self.dtype)

    def forward(self, ids_T: Tensor) -> Tensor:
        return _look_up(self.quantized, self.dtype, ids_T)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.quantized.bits}"


def _look_up(weight: QuantizedWeight, dtype: torch.dtype, ids_T: Tensor) -> Tensor:
    return weight.to_dense(ids_T.long()).to(dtype)


def _loaded(
    old: QuantizedWeight, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any,
    errors: Any,
) -> QuantizedWeight:  # fmt: skip
    """The weight that a state holds, where it fits the old one; else the old one, and what was wrong."""
    unexpected[:] = [name for name in unexpected if name.removeprefix(prefix) not in PARTS.values()]
    absent = [name for name in (f"{prefix}weight", f"{prefix}weight_scale") if name not in state_dict]
    if absent:
        missing += [name for name in absent if name not in missing]
        return old
    try:
        new = from_parts(state_dict, prefix, old.float_rows)
    except CheckpointError as error:
        errors.append(str(error))
        return old
    if new.shape != old.shape:
        errors.append(f"{prefix}weight is {tuple(new.shape)}, the model wants {tuple(old.shape)}")
        return old
    return new.map(lambda tensor: tensor.detach().to(old.codes.device, copy=True))


def named_parts(weight: QuantizedWeight, prefix: str) -> dict[str, Tensor]:
    """The tensors of a weight by their names in a checkpoint; those of kept columns only where there are any."""
    parts = {prefix + name: getattr(weight, field) for field, name in PARTS.items()}
    return {name: tensor for name, tensor in parts.items() if len(weight.columns) or "outlier" not in name}


def from_parts(tensors: Mapping[str, Tensor], prefix: str, float_rows: bool) -> QuantizedWeight:
    if f"{prefix}weight" not in tensors or f"{prefix}weight_scale" not in tensors:
        raise CheckpointError(f"{prefix}weight and {prefix}weight_scale belong together; one of them is missing")
    codes, scales = tensors[f"{prefix}weight"], tensors[f"{prefix}weight_scale"]
    columns = tensors.get(f"{prefix}outliers", codes.new_empty(0, dtype=torch.int32))
    kept = tensors.get(f"{prefix}outlier_weight", scales.new_empty((len(codes), 0), dtype=torch.float16))
    if codes.dtype not in (torch.int8, torch.uint8) or columns.dtype != torch.int32 or codes.dim() != 2:
        raise CheckpointError(
            f"{prefix}weight is {codes.dtype}, its outliers {columns.dtype}; int8 or uint8, and int32"
        )
    if scales.dim() != 2 or not scales.is_floating_point() or columns.dim() != 1 or kept.dim() != 2:
        raise CheckpointError(f"{prefix}weight_scale and what belongs to it have shapes that no weight has")
    bits = 8 if codes.dtype == torch.int8 else 4
    inputs = codes.shape[1] * (8 // bits)
    group = -(-inputs // 4) * 4 if scales.shape[1] == 1 else GROUP
    if scales.shape != (len(codes), -(-inputs // group)) or kept.shape != (len(codes), len(columns)):
        raise CheckpointError(f"{prefix}weight_scale is {tuple(scales.shape)}, which does not fit {tuple(codes.shape)}")
    if len(columns) and not 0 <= int(columns.min()) <= int(columns.max()) < inputs:
        raise CheckpointError(f"{prefix}outliers names inputs that are not there; there are {inputs}")
    return QuantizedWeight(codes, scales, columns, kept, bits, group, float_rows)


def put(model: nn.Module, weights: Mapping[str, QuantizedWeight], dtype: torch.dtype) -> None:
    """Put quantized layers in the places of those that these weights are of, by their modules' names."""
    for name, weight in weights.items():
        put_module(model, name, quantized_like(model.get_submodule(name), weight, dtype))


def quantized_like(old: nn.Module, weight: QuantizedWeight, dtype: torch.dtype) -> QuantizedLinear | QuantizedEmbedding:
    """A quantized layer for a plain one."""
    new: QuantizedLinear | QuantizedEmbedding
    if isinstance(old, nn.Embedding):
        new = QuantizedEmbedding(weight, old.padding_idx, dtype)
    else:
        assert isinstance(old, Linear)
        new = QuantizedLinear(weight, old.bias, dtype)
    return new.train(old.training)


def put_module(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)


def quantized_modules(model: nn.Module) -> dict[str, QuantizedLinear | QuantizedEmbedding]:
    kinds = (QuantizedLinear, QuantizedEmbedding)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


register_linear(QuantizedLinear, QuantizedKind())
register_embedding(QuantizedEmbedding, lambda module: functools.partial(_look_up, module.quantized, module.dtype))
