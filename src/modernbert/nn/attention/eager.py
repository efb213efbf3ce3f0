"""The slow, obvious attention: one text at a time, the whole matrix of scores. The oracle of the other backends,
and the only backend that returns attention weights.

Shapes: T tokens of all texts together, L queries and K keys of one text, H heads, D head size, B texts, S columns.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from modernbert.nn.attention.contract import AttentionBackend, Reach
from modernbert.nn.packing import Packing


@dataclasses.dataclass(frozen=True)
class EagerPlan:
    """Which keys each text's queries see: one boolean (L, K) a text, true where seen."""

    packing: Packing
    keys: Packing
    seen: list[Tensor]


class EagerAttention(AttentionBackend):
    """Scores, softmax in float32, weighted sum; text by text."""

    name = "eager"

    def plan(self, packing: Packing, reach: Reach, dtype: torch.dtype, keys: Packing | None = None) -> EagerPlan:
        """One mask a text. The keys may be others than the queries: some of the text's tokens before them too."""
        keys, (left, right) = keys or packing, reach
        seen = []
        for position_L, position_K in zip(
            packing.positions_T.split(packing.lengths), keys.positions_T.split(keys.lengths), strict=True
        ):
            ahead_LK = position_K[None, :] - position_L[:, None]
            seen_LK = torch.ones_like(ahead_LK, dtype=torch.bool)
            if left is not None:
                seen_LK &= ahead_LK >= -left
            if right is not None:
                seen_LK &= ahead_LK <= right
            seen.append(seen_LK)
        return EagerPlan(packing, keys, seen)

    def attend(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, plan: EagerPlan, dropout: float = 0.0) -> Tensor:
        return self.attend_with_weights(q_THD, k_THD, v_THD, plan, dropout)[0]

    def attend_with_weights(
        self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, plan: EagerPlan, dropout: float = 0.0
    ) -> tuple[Tensor, list[Tensor]]:
        """Attention outputs (T, H, D), and for each text its weights (H, L, K)."""
        weights = self.weigh(q_THD, k_THD, plan, dropout)
        return self.sum_values(weights, v_THD, plan), weights

    def weigh(self, q_THD: Tensor, k_THD: Tensor, plan: EagerPlan, dropout: float = 0.0) -> list[Tensor]:
        """For each text the weights (H, L, K) of its queries' keys."""
        weights = []
        texts = zip(q_THD.split(plan.packing.lengths), k_THD.split(plan.keys.lengths), plan.seen, strict=True)
        for q_LHD, k_KHD, seen_LK in texts:
            q_HLD, k_HKD = _by_head(q_LHD), _by_head(k_KHD)
            scores_HLK = (q_HLD @ k_HKD.mT).float() * q_HLD.shape[-1] ** -0.5
            scores_HLK = scores_HLK.masked_fill(~seen_LK, float("-inf"))
            weights.append(F.dropout(scores_HLK.softmax(-1).to(k_HKD.dtype), dropout))
        return weights

    def sum_values(self, weights: list[Tensor], v_THD: Tensor, plan: EagerPlan) -> Tensor:
        """Attention outputs (T, H, D) by the weights of each text."""
        texts = zip(weights, v_THD.split(plan.keys.lengths), strict=True)
        outs = [(weights_HLK @ _by_head(v_KHD)).transpose(0, 1) for weights_HLK, v_KHD in texts]
        return torch.cat([v_THD[:0], *outs])

    @classmethod
    def shown(cls, weights: list[Tensor], packing: Packing) -> tuple[Tensor, list[Tensor]]:
        """The padded weights that callers see, and those of each text taken from them, so that gradients pass both."""
        padded = cls.pad_weights(weights, packing)
        columns = padded.shape[2]
        place_T = packing.positions_T if packing.indices_T is None else packing.indices_T - packing.text_T * columns
        texts = enumerate(place_T.split(packing.lengths))
        return padded, [padded[i][:, column_L][:, :, column_L] for i, column_L in texts]

    @staticmethod
    def pad_weights(weights: list[Tensor], packing: Packing) -> Tensor:
        """Weights of the texts as one padded tensor (B, H, S, S), zeros where either token is padding.

        A batch that came packed is padded to its longest text. Where there were tokens before the packed ones, the
        last dimension counts each text's tokens from its first.
        """
        batch, columns = packing.grid or (len(packing.lengths), max(packing.lengths, default=0))
        column_T = packing.positions_T if packing.indices_T is None else packing.indices_T - packing.text_T * columns
        alone = all(w.shape[-1] == w.shape[-2] for w in weights)
        width = columns if alone else max(w.shape[-1] for w in weights)
        heads = weights[0].shape[0] if weights else 0
        out = column_T.new_zeros((batch, heads, columns, width), dtype=weights[0].dtype if weights else None)
        for i, (weights_HLK, column_L) in enumerate(zip(weights, column_T.split(packing.lengths), strict=True)):
            key_K = column_L if alone else torch.arange(weights_HLK.shape[-1], device=column_L.device)
            out[i, :, column_L[:, None], key_K[None, :]] = weights_HLK
        return out


def _by_head(x_LHD: Tensor) -> Tensor:
    # A copy, because the sums of a product depend on where in memory its operands begin.
    return x_LHD.transpose(0, 1).clone(memory_format=torch.contiguous_format)
