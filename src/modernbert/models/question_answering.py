"""Finding the answer to a question in a text, on the encoder.

Shapes: B texts, S columns, T real tokens of all texts together, M hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modernbert.config import ModernBertConfig
from modernbert.errors import ConfigError, InputError
from modernbert.models.heads import EncoderClassifier
from modernbert.models.outputs import QuestionAnsweringModelOutput
from modernbert.nn.inputs import PackedInputs, check_tensors
from modernbert.nn.losses import position_cross_entropy

Rows = list[int | None]


class ModernBertForQuestionAnswering(EncoderClassifier):
    """The encoder with two scores a token: that an answer begins there, and that it ends there.

    The loss is the mean of the cross-entropies of both places, each over the real tokens of its text alone, so that it
    does not change with padding. Logits at padding are the lowest finite number.

    Args:
        config: the architecture, with `num_labels` 2.
        attn_implementation: see `PreTrainedModel`.

    Source: ModernBERT, arXiv:2412.13663, and the reference's head.
    """

    def __init__(self, config: ModernBertConfig, attn_implementation: str | None = "auto") -> None:
        if isinstance(config, ModernBertConfig) and config.num_labels != 2:
            raise ConfigError(f"num_labels is {config.num_labels}; question answering needs 2, a start and an end")
        super().__init__(config, attn_implementation)

    def forward(  # type: ignore[override]  # the reference's order of arguments
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        sliding_window_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        indices: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        batch_size: int | None = None,
        seq_len: int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        inputs_embeds: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Score every token as the answer's first and last one.

        Arguments not listed are those of `ModernBertModel.forward`.

        Args:
            start_positions, end_positions: (B,) columns of the padded input, or places in the texts of packed input,
                of the answer's first and last token. A place outside of the text's real tokens is not counted.
            num_items_in_batch: answers of the whole batch when this call sees a part of it.

        Raises:
            InputError: arguments contradict each other or have the wrong shape.
        """
        if "labels" in kwargs:
            raise InputError("labels is given; question answering takes start_positions and end_positions instead")
        check_tensors(start_positions=start_positions, end_positions=end_positions)
        if (start_positions is None) != (end_positions is None):
            which = "end_positions" if start_positions is not None else "start_positions"
            raise InputError(f"{which} is missing; give both start_positions and end_positions, or neither")
        places: Any = None if start_positions is None else (start_positions, end_positions)
        return super().forward(
            input_ids,
            attention_mask,
            sliding_window_mask,
            position_ids,
            inputs_embeds,
            places,
            indices,
            cu_seqlens,
            max_seqlen,
            batch_size,
            seq_len,
            output_attentions,
            output_hidden_states,
            return_dict,
            num_items_in_batch,
            **kwargs,
        )

    def pack_labels(self, inputs: PackedInputs, labels: tuple[Tensor, Tensor]) -> tuple[Rows, Rows]:
        """For each text the packed rows of the answer's first and last token, None where not counted."""
        start, end = labels
        return _rows("start_positions", start, inputs), _rows("end_positions", end, inputs)

    def apply_head(
        self,
        x_TM: Tensor,
        inputs: PackedInputs,
        labels: tuple[Rows, Rows] | None,
        num_items: Tensor | float | None,
    ) -> QuestionAnsweringModelOutput:
        """Two scores of each token."""
        start_T, end_T = self.classify(x_TM).unbind(-1)
        loss = None
        if labels is not None:
            spans = inputs.packing.spans
            losses = [
                position_cross_entropy(scores_T, spans, rows, num_items=num_items)
                for scores_T, rows in zip((start_T, end_T), labels, strict=True)
            ]
            loss = (losses[0] + losses[1]) / 2
        lowest = torch.finfo(start_T.dtype).min
        return QuestionAnsweringModelOutput(loss, inputs.restore(start_T, lowest), inputs.restore(end_T, lowest))


def _rows(name: str, places: Tensor, inputs: PackedInputs) -> Rows:
    """Packed rows of one place a text, None for a place where its text has no real token."""
    packing = inputs.packing
    texts = len(packing.lengths)
    if tuple(places.shape) not in ((texts,), (texts, 1)) or places.is_floating_point():
        raise InputError(
            f"{name} has shape {tuple(places.shape)} and dtype {places.dtype}; with this input it must be whole "
            f"numbers of shape ({texts},)"
        )
    wanted = places.flatten().tolist()
    if inputs.came_packed:
        ranks = zip(wanted, packing.spans, strict=True)
        return [start + place if 0 <= place < end - start else None for place, (start, end) in ranks]
    assert packing.indices_T is not None
    row_of = {place: row for row, place in enumerate(packing.indices_T.tolist())}
    columns = inputs.given[1]
    return [row_of.get(text * columns + c) if 0 <= c < columns else None for text, c in enumerate(wanted)]
