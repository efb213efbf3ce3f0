"""Classification of tokens on the encoder, such as named entities.

Shapes: B texts, S columns, T real tokens of all texts together, M hidden size.
"""

from __future__ import annotations

from torch import Tensor

from modernbert.models.heads import EncoderClassifier, check_classes
from modernbert.models.outputs import TokenClassifierOutput
from modernbert.nn.inputs import PackedInputs
from modernbert.nn.losses import cross_entropy


class ModernBertForTokenClassification(EncoderClassifier):
    """The encoder with a classifier of every token.

    Logits are (B, S, `num_labels`), zeros at padding, or (T, `num_labels`) for packed input. Labels have the shape of
    the input: class numbers, and -100 at tokens that do not count; the loss is cross-entropy.

    Args:
        config: the architecture.
        attn_implementation: see `PreTrainedModel`.

    Source: ModernBERT, arXiv:2412.13663, and the reference's head.
    """

    def pack_labels(self, inputs: PackedInputs, labels: Tensor) -> Tensor:
        """One class a real token, (T,)."""
        return check_classes(inputs.pack("labels", labels), self.scores_per_row())

    def apply_head(
        self, x_TM: Tensor, inputs: PackedInputs, labels: Tensor | None, num_items: Tensor | float | None
    ) -> TokenClassifierOutput:
        """Scores of each token."""
        logits = self.classify(x_TM)
        loss = None if labels is None else cross_entropy(logits, labels, num_items=num_items)
        return TokenClassifierOutput(loss, inputs.restore(logits))
