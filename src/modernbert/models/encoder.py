"""The ModernBERT encoder: packed texts in, packed states out, the caller's shape at the door.

Shapes: B texts, S columns of a padded grid, T real tokens of all texts together, M hidden size.
"""

from __future__ import annotations

from torch import Tensor

from modernbert.config import ModernBertConfig
from modernbert.models.base import BareModel, PreTrainedModel
from modernbert.models.forward import ENCODER, PACKED, Arguments, Model, forward_of
from modernbert.models.outputs import BaseModelOutput
from modernbert.nn.layers import EncoderAttention
from modernbert.nn.outputs import ModelOutput
from modernbert.nn.packing import PackedInputs


class ModernBertPreTrainedModel(PreTrainedModel):
    """Base of all encoders, for heads of one's own as well; arguments are those of `PreTrainedModel`.

    A class over it puts the encoder into `model`, and calls `post_init()` at the end of its `__init__`.
    """

    config: ModernBertConfig
    config_class = ModernBertConfig


class ModernBertModel(Model, BareModel, ModernBertPreTrainedModel):
    """The bare encoder, without a head.

    Arguments are those of `PreTrainedModel`. Source: ModernBERT, arXiv:2412.13663.
    """

    config: ModernBertConfig
    attention_class = EncoderAttention

    forward = forward_of(
        """Encode a padded or a packed batch.

        Padded input is (B, S) with `attention_mask`. Packed input is (T,) or (1, T) with `cu_seqlens`; its outputs are
        packed too, unless `indices`, `batch_size` and `seq_len` say how to pad them.""",
        (*ENCODER, *PACKED),
    )

    def apply_head(self, x_TM: Tensor, inputs: PackedInputs, labels: None, given: Arguments) -> ModelOutput:
        return BaseModelOutput(inputs.restore(x_TM))
