"""The parts of a layer, from the embedding to the MLP. All of them see packed rows only.

Shapes: T tokens of all texts together, H heads, D head size, M hidden size, I intermediate size.
"""

from __future__ import annotations

import abc
import logging
from typing import Any

import torch
from torch import Tensor, nn

from modernbert.config import Config
from modernbert.engines.cpu.operations import NativeWeight, Written
from modernbert.engines.freeze import FrozenWeight
from modernbert.engines.gpu import operations as gpu
from modernbert.engines.gpu.operations import TritonWeight
from modernbert.errors import InputError
from modernbert.nn.activations import activation
from modernbert.nn.execution import Shared
from modernbert.nn.linear import Packed, PackedPart, gates, is_plain, linear, pack_weight, serves_packed
from modernbert.nn.rotary import split_rotated

logger = logging.getLogger(__name__)


class Linear(nn.Linear):
    """A linear layer whose rows do not depend on each other, bit for bit; see `ops.linear`.

    Once packed for inference it holds its numbers in the packed layout alone. Saving and copying give them back;
    moving, loading, reading `weight` and assigning a weight or a bias end it for this layer.
    """

    packed: Packed | PackedPart | None = None
    _frozen: FrozenWeight | None = None  # the parameter whose numbers lie in `packed` alone
    _kept: Written | None = None  # of a weight that is packed here and plain elsewhere
    is_shared = False  # whether another module has the same weight
    is_ours = True  # said again by those subclasses whose products are like this one's

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        weight, packed = self._weight, self.packed
        if packed is None or not self.holds_packed() or (weight.requires_grad and torch.is_grad_enabled()):
            return linear(x, weight, self.bias)
        if isinstance(packed, PackedPart) or packed.gated:
            return linear(x, self.dense_weight(), self.bias)
        return linear(x, weight, self.bias, packed)

    def holds_packed(self) -> bool:
        """Whether what is packed is the weight that the layer has now."""
        if self._kept is not None:
            return self._kept.holds(self._weight)
        return self._frozen is None or self._parameters.get("weight") is self._frozen

    @property
    def _weight(self) -> Tensor:
        """The weight or what stands for it, which reading `weight` would end."""
        weight = self._parameters.get("weight")
        return self.weight if weight is None else weight  # parametrized and pruned layers compute theirs

    def __getattr__(self, name: str) -> Any:
        # Only what is no ordinary attribute comes here, parameters among it.
        if name == "weight" and (self._kept is not None or self._frozen is not None):
            logger.info("a weight of an optimized model was read; its layer computes without the packed layout now")
            self.unpack()
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias") and self.packed is not None:
            self.unpack()
        super().__setattr__(name, value)

    def dense_weight(self) -> Tensor:
        """The weight, in its plain layout."""
        return self._weight if self._frozen is None or self.packed is None else self.packed.to_dense()

    def pack(self, gated: bool = False) -> None:
        """Lay the weight out for inference; one that another module shares stays plain beside it."""
        if self._parameters.get("weight") is None:
            return  # computed anew at each call, as by a parametrization
        if self.packed is None:
            self.packed = pack_weight(self._weight, self.bias, gated)
        if self.packed is not None and self.is_shared:
            self._kept = Written(self._weight)
        elif self.packed is not None:
            self._freeze()

    def _freeze(self) -> None:
        weight = self._weight
        if self._frozen is None:
            assert isinstance(weight, nn.Parameter)
            self.__dict__["_frozen"] = FrozenWeight.freeze(weight)  # no parameter of its own

    @staticmethod
    def pack_together(modules: list[Linear]) -> None:
        """Lay the weights of layers that read the same rows out as one, so that one product serves them all."""
        own = [m for m in modules if m.packed is None and not m.is_shared and m._parameters.get("weight") is not None]
        if len(own) < len(modules) or not all(is_plain(m._weight) for m in own):
            return
        biases: list[Tensor] = [module.bias for module in modules if module.bias is not None]
        packed = pack_weight(torch.cat([module._weight for module in modules]), torch.cat(biases) if biases else None)
        if packed is not None:
            share(modules, packed)
            for module in modules:
                module._freeze()

    def gates(self, activation: Any) -> bool:
        """Whether our own kernels, once it is packed, compute this activation and the gate after it too."""
        return gates(activation, self._weight.dtype, self._weight.device)

    def unpack(self) -> None:
        """Undo `pack`."""
        frozen = self._frozen
        if frozen is not None:
            with torch.inference_mode(False), torch.no_grad():
                assert self.packed is not None
                frozen.thaw(self.packed.to_dense())
        self.__dict__["packed"] = self.__dict__["_frozen"] = self.__dict__["_kept"] = None

    def _apply(self, fn: Any, recurse: bool = True) -> Linear:
        self.unpack()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self._frozen is None or self._weight is not self._frozen:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        destination[f"{prefix}weight"] = self.dense_weight()
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:  # for copies, which are not packed
        state = {name: value for name, value in self.__dict__.items() if name not in ("packed", "_kept", "_frozen")}
        if self._frozen is not None and self._weight is self._frozen:
            weight = nn.Parameter(self.dense_weight(), requires_grad=False)
            state["_parameters"] = {**self._parameters, "weight": weight}
        return state


def is_ours(module: nn.Module) -> bool:
    """Whether a linear layer is of this package; a subclass made elsewhere may compute something else."""
    return "is_ours" in type(module).__dict__


def share(modules: list[Linear], packed: Packed) -> None:
    """Give layers that were packed as one their parts of it."""
    first = 0
    for module in modules:
        module.packed = PackedPart(packed, slice(first, first + module.out_features), module.bias)
        first += module.out_features


def listens(module: nn.Module) -> bool:
    """Whether anything waits for a module to be called."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def layer_norm(config: Config) -> nn.LayerNorm:
    """LayerNorm over the hidden size, as the configuration wants it."""
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)


class Embeddings(nn.Module):
    """Token embedding, LayerNorm, dropout."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.norm = layer_norm(config)
        self.drop = nn.Dropout(config.embedding_dropout)
        self.is_tied = False  # whether an output shares the weight

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "tok_embeddings" and hasattr(value, "base_layer") and self.is_tied:
            raise InputError(
                "an adapter was put on 'tok_embeddings', whose weight is the output's too (tie_word_embeddings), which "
                "merging it would change as well; leave it out"
            )
        super().__setattr__(name, value)

    def forward(self, ids_T: Tensor | None, embeds_TM: Tensor | None) -> Tensor:
        """Ids (T,) or vectors (T, M) in their place to (T, M)."""
        x_TM: Tensor = self.tok_embeddings(ids_T) if embeds_TM is None else embeds_TM
        return self.drop(self.norm(x_TM))


class Attention(nn.Module, abc.ABC):
    """Self-attention of one layer: projections to q, k, v, rotary positions, a backend, output projection.

    Subclasses differ in how the projections are stored.
    """

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.heads = config.num_attention_heads - len(config.pruned_heads.get(layer, []))
        self.dropout = config.attention_dropout
        self.Wo = Linear(self.heads * self.head_dim, config.hidden_size, bias=config.attention_bias)
        self.out_drop = nn.Dropout(config.attention_dropout)

    @abc.abstractmethod
    def project(self, x_TM: Tensor) -> Tensor:
        """Queries, keys and values of rows: (T, M) to (T, 3, H, D)."""

    def pack(self) -> None:
        """Lay out together what is computed together, before each layer is packed by itself."""

    @property
    @abc.abstractmethod
    def packed_projection(self) -> Packed | None:
        """What `project` multiplies by once packed."""

    @abc.abstractmethod
    def select_heads(self, rows: Tensor) -> None:
        """Keep these outputs of each projection."""

    def forward(self, x_TM: Tensor, shared: Shared) -> Tensor:
        """(T, M) to (T, M)."""
        q_THD, k_THD, v_THD = split_rotated(self.project(x_TM), shared.cos_T1D, shared.sin_T1D)
        out_THD = shared.attend(self.layer, q_THD, k_THD, v_THD, self.dropout if self.training else 0.0)
        return self.out_drop(self.Wo(out_THD.flatten(1)))

    def prune(self, heads: list[int]) -> None:
        """Remove these heads, numbered as they are now."""
        kept = torch.tensor([h for h in range(self.heads) if h not in heads], dtype=torch.int64)
        rows = (kept[:, None] * self.head_dim + torch.arange(self.head_dim)).flatten()
        self.select_heads(rows)
        self.Wo = select(self.Wo, rows, dim=1)
        self.heads = len(kept)


def select(module: Linear, index: Tensor, dim: int) -> Linear:
    """A linear layer with only these outputs (dim 0) or inputs (dim 1)."""
    weight = module.weight.detach().index_select(dim, index.to(module.weight.device))
    out = Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None, device="meta")
    out.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
    if module.bias is not None:
        bias = module.bias.detach()
        out.bias = nn.Parameter(bias.index_select(0, index.to(bias.device)) if dim == 0 else bias)
    return out


class MLP(nn.Module):
    """GeGLU: the activated first half of one projection gates the second half."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.Wi = Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.activation = config.hidden_activation
        self.act = activation(config.hidden_activation)
        self.drop = nn.Dropout(config.mlp_dropout)
        self.Wo = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def pack(self) -> None:
        """Lay the two halves of Wi out side by side where our own kernels know the activation."""
        if is_ours(self.Wi) and self.Wi.gates(self.activation):
            self.Wi.pack(gated=True)

    def _serves_packed(self, packed: NativeWeight | TritonWeight, x_TM: Tensor) -> bool:
        """Whether one kernel may take the place of Wi, the activation, the gate and the dropout."""
        dropping = self.drop.training and self.drop.p > 0
        heard = listens(self.Wi) or listens(self.drop)
        holds = self.Wi.holds_packed() and packed.holds(self.Wi.bias)
        return not dropping and not heard and holds and serves_packed(x_TM, self.Wi.bias)

    def _is_geglu_on_card(self, x_TO: Tensor) -> bool:
        """Whether one kernel may take the place of the activation and the gate, and one that of their gradients."""
        compiling = torch.compiler.is_compiling()
        return self.activation == "gelu" and not compiling and gpu.serving(x_TO.dtype, x_TO.device)

    def forward(self, x_TM: Tensor) -> Tensor:
        """(T, M) to (T, M)."""
        packed = getattr(self.Wi, "packed", None)
        if isinstance(packed, NativeWeight | TritonWeight) and packed.gated and self._serves_packed(packed, x_TM):
            return self.Wo(packed.gated_product(x_TM, str(self.activation)))
        both_TO = self.Wi(x_TM)
        if self._is_geglu_on_card(both_TO):
            return self.Wo(self.drop(gpu.geglu(both_TO)))
        in_TI, gate_TI = both_TO.chunk(2, dim=-1)
        # PyTorch has other kernels, with other bits, for strided rows; a single row is never strided.
        return self.Wo(self.drop(self.act(in_TI.contiguous()) * gate_TI))


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the first layer's attention takes x as it is.

    Args:
        config: the architecture.
        layer: its number.
        attention: the class of its attention.
    """

    def __init__(self, config: Config, layer: int, attention: type[Attention]) -> None:
        super().__init__()
        assert config.layer_types is not None
        self.kind = config.layer_types[layer]
        self.attn_norm = nn.Identity() if layer == 0 else layer_norm(config)
        self.attn = attention(config, layer)
        self.mlp_norm = layer_norm(config)
        self.mlp = MLP(config)

    def forward(self, x_TM: Tensor, shared: Shared) -> Tensor:
        """(T, M) to (T, M)."""
        x_TM = x_TM + self.attn(self.attn_norm(x_TM), shared)
        return x_TM + self.mlp(self.mlp_norm(x_TM))


class PredictionHead(nn.Module):
    """norm(act(dense(x))): what stands before every classifier and output decoder."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size, bias=config.classifier_bias)
        self.act = activation(config.classifier_activation)
        self.norm = layer_norm(config)

    def forward(self, x: Tensor) -> Tensor:
        """(..., M) to (..., M)."""
        return self.norm(self.act(self.dense(x)))
