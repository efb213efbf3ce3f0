"""Masked language modelling on the encoder.

Shapes: B texts, S columns, T real tokens of all texts together, M hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from modernbert.config import ModernBertConfig
from modernbert.errors import InputError
from modernbert.models.base import PreTrainedModel
from modernbert.models.encoder import ModernBertModel, check_kwargs, restore_all
from modernbert.models.layers import Linear, PredictionHead
from modernbert.models.outputs import MaskedLMOutput
from modernbert.ops.losses import cross_entropy


class ModernBertForMaskedLM(PreTrainedModel):
    """The encoder with a decoder over the vocabulary, whose weight is the token embedding's.

    Args:
        config: the architecture.
        attn_implementation: "auto", "eager" or "sdpa".

    Source: ModernBERT, arXiv:2412.13663.
    """

    tied_weights = {"decoder.weight": "model.embeddings.tok_embeddings.weight"}  # noqa: RUF012 (never changed)

    def __init__(self, config: ModernBertConfig, attn_implementation: str | None = "auto") -> None:
        super().__init__(config, attn_implementation)
        self.model = ModernBertModel(config, attn_implementation)
        self.head = PredictionHead(config)
        self.decoder = Linear(config.hidden_size, config.vocab_size, bias=config.decoder_bias)
        self._finish()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        sliding_window_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        indices: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        batch_size: int | None = None,
        seq_len: int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | float | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """Score every token of the vocabulary at every real token.

        Arguments not listed are those of `ModernBertModel.forward`.

        Args:
            labels: of the shape of the input: the true ids, and -100 where there is nothing to predict (what
                `sparse_pred_ignore_index` says with `sparse_prediction`).
            num_items_in_batch: labels of the whole batch when this call sees a part of it; the loss is then the
                sum over the labels divided by this.

        Returns:
            Loss, logits (B, S, V), or (T, V) for packed input, or (labelled tokens, V) with
            `sparse_prediction` and labels. With labels the logits carry no gradient once they are repadded,
            unless `repad_logits_with_grad`.

        Raises:
            InputError: arguments contradict each other or have the wrong shape.
        """
        check_kwargs(kwargs)
        config = self.config
        inputs = self.model.pack_inputs(
            input_ids,
            inputs_embeds,
            attention_mask=attention_mask,
            sliding_window_mask=sliding_window_mask,
            position_ids=position_ids,
            indices=indices,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            batch_size=batch_size,
            seq_len=seq_len,
        )
        labels_T = None if labels is None else inputs.pack("labels", labels)
        self._check_labels(labels_T)
        encoded = self.model.encode(inputs, output_attentions, output_hidden_states)
        x_TM = encoded.last_hidden_state
        assert x_TM is not None
        sparse = config.sparse_prediction and labels_T is not None
        if sparse:
            assert labels_T is not None
            ignore = config.sparse_pred_ignore_index
            labelled = (labels_T != ignore).nonzero().squeeze(1)
            x_TM, labels_T = x_TM.index_select(0, labelled), labels_T.index_select(0, labelled)
        logits = self.decoder(self.head(x_TM))
        loss = None
        if labels_T is not None:
            loss = cross_entropy(logits, labels_T, num_items=num_items_in_batch)
        if not sparse:
            repadded = inputs.packing.grid is not None
            if repadded and labels_T is not None and not config.repad_logits_with_grad:
                logits = logits.detach()
            logits = inputs.restore(logits)
        output = MaskedLMOutput(loss, logits, restore_all(inputs, encoded.hidden_states), encoded.attentions)
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _check_labels(self, labels_T: Tensor | None) -> None:
        if labels_T is None or not labels_T.numel():
            return
        vocabulary = self.config.vocab_size
        ignored = (labels_T == -100) | (
            (labels_T == self.config.sparse_pred_ignore_index) & self.config.sparse_prediction
        )
        wrong = labels_T[~ignored & ((labels_T < 0) | (labels_T >= vocabulary))]
        if wrong.numel():
            raise InputError(f"labels holds {int(wrong[0])}; it must hold ids 0 to {vocabulary - 1}, or -100")
