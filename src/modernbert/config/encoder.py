"""The configuration of the encoder."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from modernbert.checks import option
from modernbert.config.base import Config, Reach, keeps_unknown

POOLINGS = ("cls", "mean")


@keeps_unknown
@dataclasses.dataclass(kw_only=True)
class ModernBertConfig(Config):
    """The architecture and options of a ModernBERT encoder; the defaults are those of ModernBERT-base.

    A token of a local layer sees `local_attention // 2` tokens to either side of itself.

    Args:
        classifier_pooling: "cls" (first real token) or "mean" (of the real tokens).
        sparse_prediction: with labels, compute masked-LM logits at labelled tokens only.
        sparse_pred_ignore_index: the label that marks unlabelled tokens for `sparse_prediction`.
        repad_logits_with_grad: False detaches masked-LM logits that are repadded while labels are given.
        **kwargs: every argument of `modernbert.PreTrainedConfig`.

    Raises:
        ConfigError: a value is impossible; the message names the field.

    Source: ModernBERT, arXiv:2412.13663, and the reference configuration's documentation.
    """

    model_type: ClassVar[str] = "modernbert"
    default_theta: ClassVar[dict[str, float]] = {"full_attention": 160_000.0, "sliding_attention": 10_000.0}

    classifier_pooling: str = option("cls", "How a text's states become one.", choices=POOLINGS)
    sparse_prediction: bool = False
    sparse_pred_ignore_index: int = option(-100, "Marks tokens without a label.", above=-(2**31), below=2**31)
    repad_logits_with_grad: bool = False

    def reach(self, layer_type: str) -> Reach:
        """How far a layer of this type attends."""
        if layer_type == "full_attention":
            return Reach(None, None)
        return Reach(self.sliding_window, self.sliding_window)
