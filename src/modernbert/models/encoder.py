"""The ModernBERT encoder: packed rows in, packed rows out, the caller's shape at the door.

Shapes: B texts, S columns of a padded grid, T real tokens of all texts together, M hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modernbert.config import ModernBertConfig
from modernbert.models.forward import ENCODER, PACKED, Arguments, Model, forward_of
from modernbert.models.outputs import BaseModelOutput, ModelOutput
from modernbert.nn.backbone import Backbone
from modernbert.nn.inputs import PackedInputs
from modernbert.nn.layers import Attention, Linear, select
from modernbert.nn.linear import Packed, PackedPart


class EncoderAttention(Attention):
    """q, k and v in one projection."""

    def __init__(self, config: ModernBertConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.Wqkv = Linear(config.hidden_size, 3 * self.heads * self.head_dim, bias=config.attention_bias)

    def project(self, x_TM: Tensor) -> Tensor:
        """(T, M) to (T, 3, H, D)."""
        return self.Wqkv(x_TM).unflatten(-1, (3, self.heads, self.head_dim))

    @property
    def packed_projection(self) -> Packed | None:
        """What Wqkv is packed as."""
        packed = getattr(self.Wqkv, "packed", None)
        return None if isinstance(packed, PackedPart) else packed

    def select_heads(self, rows: Tensor) -> None:
        """Keep these outputs of each of the three."""
        width = self.heads * self.head_dim
        self.Wqkv = select(self.Wqkv, torch.cat([rows + part * width for part in range(3)]), dim=0)


class ModernBertModel(Model, Backbone):
    """The bare encoder, without a head.

    Arguments are those of `PreTrainedModel`. Source: ModernBERT, arXiv:2412.13663.
    """

    config: ModernBertConfig
    config_class = ModernBertConfig
    attention_class = EncoderAttention

    forward = forward_of(
        """Encode a padded or a packed batch.

        Padded input is (B, S) with `attention_mask`. Packed input is (T,) or (1, T) with `cu_seqlens`; its outputs are
        packed too, unless `indices`, `batch_size` and `seq_len` say how to pad them.""",
        (*ENCODER, *PACKED),
    )

    def apply_head(self, x_TM: Tensor, inputs: PackedInputs, labels: None, given: Arguments) -> ModelOutput:
        """The hidden states themselves."""
        return BaseModelOutput(inputs.restore(x_TM))
