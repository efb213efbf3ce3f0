"""Masked language modelling on the encoder.

Shapes: B texts, S columns, T real tokens of all texts together, M hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from modernbert.config import ModernBertConfig
from modernbert.models.heads import EncoderWithHead, check_classes
from modernbert.models.outputs import MaskedLMOutput
from modernbert.nn.inputs import PackedInputs
from modernbert.nn.layers import Linear
from modernbert.nn.losses import IGNORED, cross_entropy


class ModernBertForMaskedLM(EncoderWithHead):
    """The encoder with a decoder over the vocabulary, whose weight is the token embedding's.

    Labels have the shape of the input: the true ids, and -100 where there is nothing to predict (what
    `sparse_pred_ignore_index` says with `sparse_prediction`).

    Logits are (B, S, V), zeros at padding, or (T, V) for packed input, or (labelled tokens, V) with
    `sparse_prediction` and labels. With labels they carry no gradient once they are repadded, unless
    `repad_logits_with_grad`.

    Args:
        config: the architecture.
        attn_implementation: see `PreTrainedModel`.

    Source: ModernBERT, arXiv:2412.13663.
    """

    tied_weights: ClassVar[Mapping[str, str]] = {"decoder.weight": "model.embeddings.tok_embeddings.weight"}

    def __init__(self, config: ModernBertConfig, attn_implementation: str | None = "auto") -> None:
        super().__init__(config, attn_implementation)
        self.decoder = Linear(config.hidden_size, config.vocab_size, bias=config.decoder_bias)
        self._finish()

    def pack_labels(self, inputs: PackedInputs, labels: Tensor) -> Tensor:
        """One label a real token, (T,)."""
        labels_T = inputs.pack("labels", labels)
        if self.config.sparse_prediction:
            labels_T = labels_T.masked_fill(labels_T == self.config.sparse_pred_ignore_index, IGNORED)
        return check_classes(labels_T, self.config.vocab_size)

    def score(self, x: Tensor) -> Tensor:
        """Scores of the whole vocabulary: (N, M) to (N, V)."""
        return self.decoder(self.head(x))

    def apply_head(
        self, x_TM: Tensor, inputs: PackedInputs, labels: Tensor | None, num_items: Tensor | float | None
    ) -> MaskedLMOutput:
        """Scores of the whole vocabulary at every token, or at labelled ones."""
        sparse = self.config.sparse_prediction and labels is not None
        if sparse:
            assert labels is not None
            labelled = (labels != IGNORED).nonzero().squeeze(1)
            x_TM, labels = x_TM.index_select(0, labelled), labels.index_select(0, labelled)
        logits = self.score(x_TM)
        loss = None if labels is None else cross_entropy(logits, labels, num_items=num_items)
        if not sparse:
            repadded = inputs.packing.grid is not None
            if repadded and labels is not None and not self.config.repad_logits_with_grad:
                logits = logits.detach()
            logits = inputs.restore(logits)
        return MaskedLMOutput(loss, logits)
