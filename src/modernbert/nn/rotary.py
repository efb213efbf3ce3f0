"""Rotary position embeddings over the whole head, halves rotated, angles in float32.

A text's angles follow from that text alone, those of the "dynamic" type too (docs/invariance.md).

Shapes: T tokens, H heads, D head size, B texts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from modernbert.nn.dispatch import kernel_for


def _yarn(rope: Mapping[str, Any], powers: Tensor, head_dim: int) -> tuple[Tensor, float]:
    """YaRN, arXiv:2309.00071: fast dimensions keep their frequency, slow ones are interpolated."""
    factor, theta = rope["factor"], rope["rope_theta"]
    trained = rope["original_max_position_embeddings"]

    def dimension_of(turns: float) -> float:
        """The (fractional) dimension that makes this many turns over the trained context."""
        return head_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(rope.get("beta_fast") or 32), dimension_of(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = (high - low) or 0.001
    steps = torch.arange(head_dim // 2, dtype=torch.float32, device=powers.device)
    interpolated = ((steps - low) / width).clamp(0, 1)
    frequencies = interpolated / (factor * powers) + (1 - interpolated) / powers

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    attention = rope.get("attention_factor")
    if attention is None:
        numerator, denominator = rope.get("mscale"), rope.get("mscale_all_dim")
        attention = magnitude(numerator) / magnitude(denominator) if numerator and denominator else magnitude(1.0)
    return frequencies, float(attention)


def rope_frequencies(
    rope: Mapping[str, Any], head_dim: int, device: torch.device, theta_B: Tensor | None = None
) -> tuple[Tensor, float]:
    """Angle a position of each pair of dimensions, (D / 2,) float32, and what cosines and sines are multiplied by.

    Type "dynamic" has a base for each text, `theta_B`, instead of `rope_theta`; frequencies are then (B, D / 2).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    # A scalar is made on the device: a copy would be waited for.
    theta = torch.full((), rope["rope_theta"], dtype=torch.float32, device=device) if theta_B is None else theta_B
    powers = theta[..., None] ** exponents
    if rope["rope_type"] == "yarn":
        return _yarn(rope, powers, head_dim)
    return 1.0 / powers / (rope["factor"] if rope["rope_type"] == "linear" else 1.0), 1.0


def angle_tables(frequencies: Tensor, scale: float, positions_T: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, see `rope_tables`, by frequencies (D / 2,) or (T, D / 2)."""
    angles = positions_T.float()[:, None] * frequencies
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat((cos, cos), dim=-1)[:, None], torch.cat((-sin, sin), dim=-1)[:, None]


def rope_tables(
    rope: Mapping[str, Any],
    head_dim: int,
    positions_T: Tensor,
    *,
    max_positions: int,
    text_T: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every token's angles, for one entry of a configuration's `rope_parameters`.

    The "dynamic" type stretches each text by its own length, beyond the `max_positions` that the model was trained for;
    `text_T` is the text of each token, None takes all as one.

    Returns:
        Two float32 tensors of shape (T, 1, D), already multiplied by the type's attention factor: the cosines, and
        the sines with the sign that `apply_rope` adds them with.
    """
    device = positions_T.device
    if rope["rope_type"] != "dynamic":
        return angle_tables(*rope_frequencies(rope, head_dim, device), positions_T)
    texts = torch.zeros_like(positions_T) if text_T is None else text_T
    number = int(texts.max()) + 1 if texts.numel() else 1
    length_B = torch.full((number,), max_positions, device=device, dtype=torch.float32)
    length_B = length_B.scatter_reduce(0, texts, positions_T.float() + 1, "amax")
    stretch_B = rope["factor"] * length_B / max_positions - (rope["factor"] - 1)
    theta_B = rope["rope_theta"] * stretch_B ** (head_dim / (head_dim - 2))
    frequencies_BD, scale = rope_frequencies(rope, head_dim, device, theta_B)
    return angle_tables(frequencies_BD[texts], scale, positions_T)


def apply_rope(x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    """Rotate each head's halves against each other by its token's angles, in float32 whatever x is."""
    x = x_THD if x_THD.dtype == torch.float32 else x_THD.float()
    rotated = (x * cos_T1D).add_(x.roll(x.shape[-1] // 2, -1).mul_(sin_T1D))
    return rotated if x_THD.dtype == torch.float32 else rotated.to(x_THD.dtype)


def split_rotated(qkv_T3HD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys rotated by their tokens' angles, and values, (T, H, D) each; tables of `rope_tables`."""
    if torch.is_grad_enabled() and qkv_T3HD.requires_grad and not torch.compiler.is_compiling():
        return _SplitRotated.apply(qkv_T3HD, cos_T1D, sin_T1D)
    if (rotate := kernel_for("rotate", qkv_T3HD)) is not None:
        q_THD, k_THD, v_THD = rotate(*qkv_T3HD.unbind(1), cos_T1D, sin_T1D).unbind(1)
        return q_THD, k_THD, v_THD
    q_THD, k_THD = apply_rope(qkv_T3HD[:, :2].flatten(1, 2), cos_T1D, sin_T1D).chunk(2, dim=1)
    return q_THD, k_THD, qkv_T3HD[:, 2]


class _SplitRotated(torch.autograd.Function):
    """PyTorch's own backward would add up three gradients of the whole, two thirds of each zeros."""

    @staticmethod
    def forward(ctx: Any, qkv_T3HD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos_T1D, sin_T1D)
        return split_rotated(qkv_T3HD, cos_T1D, sin_T1D)  # autograd is off here

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos_T1D, sin_T1D = ctx.saved_tensors
        q_THD, k_THD, v_THD = grads
        rotate = kernel_for("rotate", v_THD)
        if rotate is not None and not torch.is_grad_enabled():  # with it on, gradients of gradients may be wanted
            return rotate(q_THD, k_THD, v_THD, cos_T1D, sin_T1D, back=True), None, None
        out_T3HD = torch.empty((v_THD.shape[0], 3, *v_THD.shape[1:]), dtype=v_THD.dtype, device=v_THD.device)
        half = v_THD.shape[-1] // 2
        for i, grad_THD in enumerate((q_THD, k_THD)):
            g = grad_THD.float()
            out_T3HD[:, i] = (g * cos_T1D).add_((g * sin_T1D).roll(half, -1))
        out_T3HD[:, 2] = v_THD
        return out_T3HD, None, None
