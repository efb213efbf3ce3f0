"""Fresh weights: normal, cut off at `initializer_cutoff_factor` standard deviations; biases zero, norms one."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from modernbert.config import Config

_SPREAD = 1e-9  # of new embeddings, as a share of the old ones' covariance


def initialize_weight(weight: Tensor, module_name: str, config: Config) -> None:
    """Fill a matrix with fresh values, by the last part of its module's name.

    Projections back into the residual stream are smaller by sqrt(2 x layers), so that the stream's size does not
    grow with depth.
    """
    name = module_name.rpartition(".")[2]
    if name in ("tok_embeddings", "Wqkv", "q_proj", "k_proj", "v_proj", "Wi"):
        std = config.initializer_range
    elif name in ("Wo", "dense", "decoder"):
        std = config.initializer_range / math.sqrt(2.0 * max(config.num_hidden_layers, 1))
    elif name == "classifier":
        std = config.hidden_size**-0.5
    else:  # a layer of somebody's own head
        std = config.initializer_range
    cutoff = config.initializer_cutoff_factor * std
    nn.init.trunc_normal_(weight, std=std, a=-cutoff, b=cutoff)


@torch.no_grad()
def initialize(model: nn.Module, config: Config, only: set[str]) -> None:
    """Fill the parameters of these names with fresh values, in place."""
    for name, parameter in model.named_parameters():
        if name not in only:
            continue
        module_name, _, leaf = name.rpartition(".")
        module = model.get_submodule(module_name)
        if leaf == "bias":
            nn.init.zeros_(parameter)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(parameter)
        elif isinstance(module, nn.Linear | nn.Embedding):  # others keep what their constructors gave them
            initialize_weight(parameter, module_name, config)


@torch.no_grad()
def around_mean(new: Tensor, old: Tensor) -> None:
    """Fill embeddings, or single values, with draws from a normal distribution of the old ones' mean.

    Their covariance is a thousand-millionth of the old ones': tokens that nothing was learnt of are alike, and not the
    same.

    Args:
        new: (N, M) or (N,), written to.
        old: (V, M) or (V,).
    """
    if not len(new) or not len(old):
        return
    values = old.double().reshape(len(old), -1)
    values = values[values.isfinite().all(1)]
    if not len(values):
        return
    mean = values.mean(0)
    sizes, directions = torch.linalg.eigh((values - mean).mT @ (values - mean) / len(values))
    noise = torch.randn(len(new), values.shape[1], device=old.device) * (_SPREAD * sizes.clamp(min=0)).sqrt()
    new.copy_((mean + noise @ directions.mT).reshape(new.shape))
