"""Layers whose weights are whole numbers of 8 or 4 bits: linear ones, and the embedding.

They take the places of `Linear` and `nn.Embedding` in a model, and hold no parameter but a bias: nothing of them can be
trained. In a checkpoint a weight is `weight` (its codes), `weight_scale`, and where columns stay floats
`outliers` (their numbers) and `outlier_weight`.

Shapes: T tokens, M hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modernbert.engines.cpu.library import ACTIVATIONS, DTYPES
from modernbert.errors import CheckpointError
from modernbert.nn.layers import Linear, share
from modernbert.nn.linear import PackedPart
from modernbert.quantization.weight import GROUP, PackedIntegers, PlainIntegers, QuantizedWeight, pack_quantized

# The tensors of a quantized weight by their names in a checkpoint.
PARTS = {"codes": "weight", "scales": "weight_scale", "columns": "outliers", "kept": "outlier_weight"}


class _Through(torch.autograd.Function):
    """The product as it is; its derivative by the inputs is that of the floats which the codes stand for."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, dense_OI: Tensor, packed: Any) -> Tensor:
        ctx.save_for_backward(dense_OI)
        out: Tensor = packed.product(x_TI)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (dense_OI,) = ctx.saved_tensors
        return grads[0] @ dense_OI, None, None


class QuantizedLinear(Linear):
    """A linear layer with a quantized weight.

    Args:
        weight: (out, in).
        bias: (out,) or None.
        dtype: of what is made of `weight` for those who read it.
    """

    is_ours = True

    def __init__(self, weight: QuantizedWeight, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.bits, self.dtype = weight.bits, dtype
        self.register_parameter("bias", bias)
        self.packed: Any = pack_quantized(weight, bias)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight, (out, in)."""
        return self.out_features, self.in_features

    @property  # in the place of a parameter that callers read, but could not write with any effect
    def weight(self) -> Tensor:  # type: ignore[override]
        """The numbers that the codes stand for, (out, in), made anew each time."""
        return self.dense_weight()

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight in its plain layout."""
        if isinstance(self.packed, PackedPart):
            whole = self.packed.whole
            assert isinstance(whole, PackedIntegers | PlainIntegers)
            return whole.to_quantized().outputs(self.packed.rows)
        plain: QuantizedWeight = self.packed.to_quantized()
        return plain

    def dense_weight(self) -> Tensor:
        """The weight, as floats."""
        return self.quantized.to_dense().to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        self.follow_bias()
        packed = self.packed
        if isinstance(packed, PackedPart) or packed.gated:
            packed = pack_quantized(self.quantized, self.bias)
        if x.requires_grad and torch.is_grad_enabled():  # what the inputs weigh can still be asked
            x_TI, dense = x.flatten(0, -2), self.dense_weight().to(x.dtype)
            out: Tensor = _Through.apply(x_TI, dense, packed)
            return out.unflatten(0, x.shape[:-1])
        dtype = x.dtype if x.dtype in DTYPES else torch.float32
        return packed.product(x.flatten(0, -2).to(dtype)).unflatten(0, x.shape[:-1]).to(x.dtype)

    def follow_bias(self) -> None:
        """Pack again where the bias is no longer the one that was packed."""
        if not self.packed.holds(self.bias):
            self.packed = pack_quantized(self.quantized, self.bias, self.packed_as_gate)

    @property
    def packed_as_gate(self) -> bool:
        """Whether the outputs lie as gates."""
        return not isinstance(self.packed, PackedPart) and self.packed.gated

    def gates(self, activation: Any) -> bool:
        """Whether our own kernels compute this activation and the gate after it too."""
        return self._is_native() and activation in ACTIVATIONS

    def _is_native(self) -> bool:
        return isinstance(self.packed, PackedPart | PackedIntegers)

    @staticmethod
    def pack_together(modules: list[Linear]) -> None:
        """Lay the weights of layers that read the same rows out as one."""
        quantized = [module for module in modules if isinstance(module, QuantizedLinear)]
        weight = together(module.quantized for module in quantized)
        biases: list[Tensor] = [module.bias for module in modules if module.bias is not None]
        if weight is not None and all(module._is_native() for module in quantized):
            share(modules, pack_quantized(weight, torch.cat(biases) if biases else None))

    def pack(self, gated: bool = False) -> None:
        """Lay the weight out anew where its outputs are wanted as gates."""
        if gated and isinstance(self.packed, PackedIntegers) and not self.packed.gated:
            self.packed = pack_quantized(self.quantized, self.bias, gated)

    def unpack(self) -> None:
        """Undo `pack`."""
        if isinstance(self.packed, PackedPart) or self.packed.gated:
            self.packed = pack_quantized(self.quantized, self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        weight = self.quantized
        device = fn(weight.codes[:0]).device
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        nn.Module._apply(self, fn, recurse)
        self.packed = pack_quantized(weight.map(lambda t: t.to(device)), self.bias)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        destination.update(named_parts(self.quantized, prefix))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)
        self.packed = pack_quantized(_loaded(self.quantized, state_dict, prefix, *args), self.bias)

    def __getstate__(self) -> dict[str, Any]:  # a copy is packed anew
        return {**self.__dict__, "packed": self.quantized}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.packed = pack_quantized(state["packed"], self.bias)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


class QuantizedEmbedding(nn.Embedding):
    """An embedding with a quantized weight.

    Args:
        weight: (V, M).
        padding_idx: as of `nn.Embedding`.
        dtype: of the vectors.
    """

    def __init__(self, weight: QuantizedWeight, padding_idx: int | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.quantized, self.padding_idx, self.dtype = weight, padding_idx, dtype

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight, (V, M)."""
        return self.num_embeddings, self.embedding_dim

    @property  # as of `QuantizedLinear`
    def weight(self) -> Tensor:  # type: ignore[override]
        """The numbers that the codes stand for, (V, M), made anew each time."""
        return self.quantized.to_dense().to(self.dtype)

    def forward(self, ids_T: Tensor) -> Tensor:
        """(T,) to (T, M)."""
        return self.quantized.to_dense(ids_T.long()).to(self.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedEmbedding:
        device = fn(self.quantized.codes[:0]).device
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        self.quantized = self.quantized.map(lambda t: t.to(device))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination.update(named_parts(self.quantized, prefix))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.quantized = _loaded(self.quantized, state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.quantized.bits}"


def _loaded(
    old: QuantizedWeight,
    state_dict: Any,
    prefix: str,
    metadata: Any,
    strict: bool,
    missing: Any,
    unexpected: Any,
    errors: Any,
) -> QuantizedWeight:
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


def part_names(prefix: str) -> list[str]:
    """What a weight's tensors may be called in a checkpoint."""
    return [prefix + name for name in PARTS.values()]


def from_parts(tensors: Mapping[str, Tensor], prefix: str, float_rows: bool) -> QuantizedWeight:
    """The way back."""
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
        old = model.get_submodule(name)
        new: nn.Module
        if isinstance(old, nn.Embedding):
            new = QuantizedEmbedding(weight, old.padding_idx, dtype)
        else:
            assert isinstance(old, Linear)
            new = QuantizedLinear(weight, old.bias, dtype)
        put_module(model, name, new.train(old.training))


def put_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of that name."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)


def quantized_modules(model: nn.Module) -> dict[str, QuantizedLinear | QuantizedEmbedding]:
    """The quantized layers of a model by name."""
    kinds = (QuantizedLinear, QuantizedEmbedding)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def together(weights: Iterable[QuantizedWeight]) -> QuantizedWeight | None:
    """Weights that read the same rows, as one; None where they are cut differently."""
    first, *others = weights
    same = all(
        (w.bits, w.group, w.float_rows) == (first.bits, first.group, first.float_rows)
        and torch.equal(w.columns, first.columns)
        for w in others
    )
    joined: dict[str, Any] = {
        name: torch.cat([getattr(w, name) for w in (first, *others)]) for name in ("codes", "scales", "kept")
    }
    return dataclasses.replace(first, **joined) if same else None
