"""The parts of a layer, from the embedding to the MLP, and the head that classifiers share. All see packed texts only.

Shapes: T tokens of all texts together, H heads, D head size, M hidden size, I intermediate size.
"""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor, nn

from modernbert.config import Config
from modernbert.errors import InputError
from modernbert.nn.activations import activation
from modernbert.nn.dispatch import kernel_for
from modernbert.nn.execution import Shared
from modernbert.nn.linear import linear
from modernbert.nn.rotary import split_rotated


class Linear(nn.Linear):
    """A linear layer whose rows do not depend on each other, bit for bit; see `nn.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def layer_norm(config: Config) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)


class Embeddings(nn.Module):
    """Token embedding, LayerNorm, dropout."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        sizes, padding = (config.vocab_size, config.hidden_size), config.pad_token_id
        if torch.get_default_device().type == "meta":  # where drawing values would import PyTorch's compiler: a second
            self.tok_embeddings = nn.Embedding.from_pretrained(torch.empty(sizes), freeze=False, padding_idx=padding)
        else:
            self.tok_embeddings = nn.Embedding(*sizes, padding_idx=padding)
        self.norm = layer_norm(config)
        self.drop = nn.Dropout(config.embedding_dropout)
        self.is_tied = False  # whether an output shares the weight

    def __setattr__(self, name: str, value: Any) -> None:
        # Layers that PEFT adapts have a `base_layer`.
        if name == "tok_embeddings" and hasattr(value, "base_layer") and self.is_tied:
            raise InputError(
                "an adapter was put on 'tok_embeddings', whose weight is the output's too (tie_word_embeddings), which "
                "merging it would change as well; leave it out"
            )
        super().__setattr__(name, value)

    def forward(self, ids_T: Tensor | None, embeds_TM: Tensor | None) -> Tensor:
        """Ids (T,), or vectors (T, M) instead of them, to (T, M)."""
        x_TM: Tensor = self.tok_embeddings(ids_T) if embeds_TM is None else embeds_TM
        return self.drop(self.norm(x_TM))


class Attention(nn.Module, abc.ABC):
    """Self-attention of one layer: projections to q, k, v, rotary positions, attention, output projection.

    Subclasses differ in how the projections are stored, as checkpoints do.
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
        """Queries, keys and values: (T, M) to (T, 3, H, D)."""

    def forward(self, x_TM: Tensor, shared: Shared) -> Tensor:
        q_THD, k_THD, v_THD = split_rotated(self.project(x_TM), shared.cos_T1D, shared.sin_T1D)
        out_THD = shared.attend(self.layer, q_THD, k_THD, v_THD, self.dropout if self.training else 0.0)
        return self.out_drop(self.Wo(out_THD.flatten(1)))

    def prune(self, heads: list[int]) -> None:
        """Remove these heads, numbered as they are now."""
        kept = torch.tensor([h for h in range(self.heads) if h not in heads], dtype=torch.int64)
        outputs = (kept[:, None] * self.head_dim + torch.arange(self.head_dim)).flatten()
        width = self.heads * self.head_dim
        for name, module in list(self.named_children()):
            if name != "Wo" and isinstance(module, Linear):  # one projection, or three in one
                parts = range(0, module.out_features, width)
                setattr(self, name, select(module, torch.cat([outputs + first for first in parts]), dim=0))
        self.Wo = select(self.Wo, outputs, dim=1)
        self.heads = len(kept)


class EncoderAttention(Attention):
    """q, k and v in one projection."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__(config, layer)
        self.Wqkv = Linear(config.hidden_size, 3 * self.heads * self.head_dim, bias=config.attention_bias)

    def project(self, x_TM: Tensor) -> Tensor:
        return self.Wqkv(x_TM).unflatten(-1, (3, self.heads, self.head_dim))


class DecoderAttention(Attention):
    """q, k and v in projections of their own."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__(config, layer)
        width = self.heads * self.head_dim
        self.q_proj = Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = Linear(config.hidden_size, width, bias=config.attention_bias)
        self.v_proj = Linear(config.hidden_size, width, bias=config.attention_bias)

    def project(self, x_TM: Tensor) -> Tensor:
        parts = [part(x_TM) for part in (self.q_proj, self.k_proj, self.v_proj)]
        return torch.cat(parts, dim=-1).unflatten(-1, (3, self.heads, self.head_dim))


def select(module: Linear, index: Tensor, dim: int) -> Linear:
    """A linear layer with only these outputs (dim 0) or inputs (dim 1)."""
    index = index.to(module.weight.device)
    out = Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    out.weight = nn.Parameter(module.weight.detach().index_select(dim, index), module.weight.requires_grad)
    out.out_features, out.in_features = out.weight.shape
    if module.bias is not None:
        bias = module.bias.detach().index_select(0, index) if dim == 0 else module.bias.detach()
        out.bias = nn.Parameter(bias, module.bias.requires_grad)
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

    def forward(self, x_TM: Tensor) -> Tensor:
        both_T2I = self.Wi(x_TM)
        geglu = kernel_for("geglu", both_T2I) if self.activation == "gelu" else None
        if geglu is not None:
            return self.Wo(self.drop(geglu(both_T2I)))
        in_TI, gate_TI = both_T2I.chunk(2, dim=-1)
        # PyTorch has another kernel, with other bits, for strided input. One token's half is never strided.
        return self.Wo(self.drop(self.act(in_TI.contiguous()) * gate_TI))


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the first layer's attention takes x as it is."""

    def __init__(self, config: Config, layer: int, attention: type[Attention]) -> None:
        super().__init__()
        assert config.layer_types is not None
        self.kind = config.layer_types[layer]
        self.attn_norm = nn.Identity() if layer == 0 else layer_norm(config)
        self.attn = attention(config, layer)
        self.mlp_norm = layer_norm(config)
        self.mlp = MLP(config)

    def forward(self, x_TM: Tensor, shared: Shared, rows: Tensor | None = None) -> Tensor:
        """(T, M) to (T, M), or to the states of these tokens alone, which may see all others."""
        if self.training and (train := kernel_for("layer", x_TM)) is not None:
            out_TM: Tensor | None = train(self, x_TM, shared, rows)
            if out_TM is not None:
                return out_TM
        return self.by_modules(x_TM, shared, rows)

    def by_modules(self, x_TM: Tensor, shared: Shared, rows: Tensor | None = None) -> Tensor:
        """`forward` by the layer's own modules, one after another."""
        x_TM = x_TM + self.attn(self.attn_norm(x_TM), shared)
        x_TM = x_TM if rows is None else x_TM.index_select(0, rows)
        return x_TM + self.mlp(self.mlp_norm(x_TM))


class PredictionHead(nn.Module):
    """norm(act(dense(x))): what stands before every classifier and output decoder."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size, bias=config.classifier_bias)
        self.act = activation(config.classifier_activation)
        self.norm = layer_norm(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.act(self.dense(x)))
