"""The slow, obvious attention: one text at a time, the whole matrix of scores. The oracle of the other backends,
and the only backend that returns attention weights.

Shapes: T tokens of all texts together, L tokens of one text, H heads, D head size, B texts, S columns.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from modernbert.ops.attention.base import AttentionBackend
from modernbert.ops.packing import Packing


@dataclasses.dataclass(frozen=True)
class EagerPlan:
    """Which pairs of tokens of each text see each other: one boolean (L, L) a text, true where seen."""

    packing: Packing
    seen: list[Tensor]


class EagerAttention(AttentionBackend):
    """Scores, softmax in float32, weighted sum; text by text."""

    name = "eager"

    def plan(self, packing: Packing, reach: tuple[int, int] | None, dtype: torch.dtype) -> EagerPlan:
        """One mask a text."""
        seen = []
        for position_L in packing.positions_T.split(packing.lengths):
            ahead_LL = position_L[None, :] - position_L[:, None]
            everything = torch.ones_like(ahead_LL, dtype=torch.bool)
            seen.append(everything if reach is None else (ahead_LL >= -reach[0]) & (ahead_LL <= reach[1]))
        return EagerPlan(packing, seen)

    def attend(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, plan: EagerPlan, dropout: float = 0.0) -> Tensor:
        """Attention outputs, text by text."""
        return self.attend_with_weights(q_THD, k_THD, v_THD, plan, dropout)[0]

    def attend_with_weights(
        self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, plan: EagerPlan, dropout: float = 0.0
    ) -> tuple[Tensor, list[Tensor]]:
        """Attention outputs (T, H, D), and for each text its weights (H, L, L)."""
        outs, weights = [v_THD[:0]], []
        lengths = plan.packing.lengths
        texts = zip(q_THD.split(lengths), k_THD.split(lengths), v_THD.split(lengths), plan.seen, strict=True)
        for q_LHD, k_LHD, v_LHD, seen_LL in texts:
            q_HLD, k_HLD, v_HLD = (x.transpose(0, 1) for x in (q_LHD, k_LHD, v_LHD))
            scores_HLL = (q_HLD @ k_HLD.mT).float() * q_HLD.shape[-1] ** -0.5
            scores_HLL = scores_HLL.masked_fill(~seen_LL, float("-inf"))
            weights_HLL = F.dropout(scores_HLL.softmax(-1).to(v_HLD.dtype), dropout)
            outs.append((weights_HLL @ v_HLD).transpose(0, 1))
            weights.append(weights_HLL)
        return torch.cat(outs), weights

    @staticmethod
    def pad_weights(weights: list[Tensor], packing: Packing) -> Tensor:
        """Weights of the texts as one padded tensor (B, H, S, S), zeros where either token is padding.

        A batch that came packed is padded to its longest text.
        """
        if packing.grid is not None and packing.indices_T is not None:
            batch, columns = packing.grid
            column_T = packing.indices_T - packing.text_T * columns
        else:
            batch, columns = len(packing.lengths), max(packing.lengths, default=0)
            column_T = packing.positions_T
        heads = weights[0].shape[0] if weights else 0
        out = column_T.new_zeros((batch, heads, columns, columns), dtype=weights[0].dtype if weights else None)
        for i, (weights_HLL, column_L) in enumerate(zip(weights, column_T.split(packing.lengths), strict=True)):
            out[i, :, column_L[:, None], column_L[None, :]] = weights_HLL
        return out
