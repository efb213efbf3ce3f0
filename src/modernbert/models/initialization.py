"""Fresh weights: normal, cut off at `initializer_cutoff_factor` standard deviations; biases zero, norms one."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from modernbert.config import Config

_SPREAD = 1e-9  # of new rows, as a share of the old ones' covariance


def initial_std(module_name: str, config: Config) -> float:
    """Standard deviation of a module's initial weight, by the last part of its name.

    Projections back into the residual stream are smaller by sqrt(2 x layers), so that the stream's size does not
    grow with depth.
    """
    inward = config.initializer_range
    outward = inward / math.sqrt(2.0 * max(config.num_hidden_layers, 1))
    stds = {
        "tok_embeddings": inward,
        "Wqkv": inward,
        "q_proj": inward,
        "k_proj": inward,
        "v_proj": inward,
        "Wi": inward,
        "Wo": outward,
        "dense": outward,
        "decoder": outward,
        "classifier": config.hidden_size**-0.5,
    }
    return stds[module_name.rpartition(".")[2]]


@torch.no_grad()
def initialize(model: nn.Module, config: Config, only: set[str]) -> None:
    """Fill the parameters of these names with fresh values, in place."""
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{module_name}.{name}" if module_name else name
            if full_name not in only:
                continue
            if name == "bias":
                parameter.zero_()
            elif isinstance(module, nn.LayerNorm):
                parameter.fill_(1.0)
            else:
                std = initial_std(module_name, config)
                cutoff = config.initializer_cutoff_factor * std
                nn.init.trunc_normal_(parameter, std=std, a=-cutoff, b=cutoff)


@torch.no_grad()
def around_mean(new: Tensor, old: Tensor) -> None:
    """Fill rows, or single numbers, with draws from a normal distribution of the old ones' mean.

    Their covariance is a thousand-millionth of the old ones': tokens that nothing was learnt of are alike, and not the
    same.

    Args:
        new: (N, M) or (N,), written to.
        old: (V, M) or (V,).
    """
    if not len(new) or not len(old):
        return
    rows = old.double().reshape(len(old), -1)
    rows = rows[rows.isfinite().all(1)]
    if not len(rows):
        return
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh((rows - mean).mT @ (rows - mean) / len(rows))
    noise = torch.randn(len(new), rows.shape[1], device=old.device) * (_SPREAD * values.clamp(min=0)).sqrt()
    new.copy_((mean + noise @ vectors.mT).reshape(new.shape))
