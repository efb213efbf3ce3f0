"""Choosing one of several continuations on the encoder.

Shapes: B questions, C choices of each, S columns, T real tokens of all choices together, M hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from modernbert.errors import InputError
from modernbert.models.heads import EncoderClassifier, check_classes
from modernbert.models.outputs import MultipleChoiceModelOutput
from modernbert.nn.inputs import PackedInputs, check_tensors
from modernbert.nn.losses import cross_entropy


class ModernBertForMultipleChoice(EncoderClassifier):
    """The encoder with one score a choice.

    `input_ids`, `attention_mask` and `position_ids` are (B, C, S), `inputs_embeds` (B, C, S, M), and logits (B, C).
    Labels are (B,), the number of the right choice (-100 is ignored); the loss is cross-entropy over a question's
    choices.

    Packed input holds the choices of all questions as texts one after another; `num_choices` says how many there are
    of each question, a number or one a question. Questions with fewer choices than others have the lowest finite
    number in the logits of those they lack.

    Args:
        config: the architecture.
        attn_implementation: see `PreTrainedModel`.

    Source: ModernBERT, arXiv:2412.13663, and the reference's head.
    """

    def scores_per_row(self) -> int:
        """One score a choice, whatever the number of labels."""
        return 1

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
        num_choices: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Score the choices of each question.

        Arguments not listed are those of `ModernBertModel.forward`, with a dimension of choices after the first.

        Args:
            labels: (B,) numbers of the right choices.
            num_items_in_batch: questions of the whole batch when this call sees a part of it.
            num_choices: choices of each question, for packed input; one question where silent.

        Raises:
            InputError: arguments contradict each other or have the wrong shape.
        """
        check_tensors(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cu_seqlens=cu_seqlens,
            labels=labels,
        )
        if cu_seqlens is None:
            given = input_ids if input_ids is not None else inputs_embeds
            dims = 3 if input_ids is not None else 4
            if given is not None:
                if given.dim() != dims:
                    name = "input_ids" if input_ids is not None else "inputs_embeds"
                    raise InputError(
                        f"{name} has shape {tuple(given.shape)}; it must be (batch, choices, sequence"
                        f"{', hidden)' if dims == 4 else ')'}, or packed together with cu_seqlens"
                    )
                if num_choices is not None and num_choices != given.shape[1]:
                    raise InputError(f"num_choices is {num_choices}; the input's shape says {given.shape[1]}")
                num_choices = given.shape[1] if given.shape[0] else ()
                grid = tuple(given.shape[:3])
                attention_mask = _flat("attention_mask", attention_mask, grid)
                position_ids = _flat("position_ids", position_ids, grid)
                if position_ids is not None and attention_mask is None:  # a row is one choice, whatever its positions
                    attention_mask = torch.ones_like(position_ids)
                input_ids = None if input_ids is None else input_ids.flatten(0, 1)
                inputs_embeds = None if inputs_embeds is None else inputs_embeds.flatten(0, 1)
        elif num_choices is None:
            num_choices = cu_seqlens.numel() - 1
        output = super().forward(
            input_ids,
            attention_mask,
            sliding_window_mask,
            position_ids,
            inputs_embeds,
            None,
            indices,
            cu_seqlens,
            max_seqlen,
            batch_size,
            seq_len,
            output_attentions,
            output_hidden_states,
            True,
            **kwargs,
        )
        counts = _counts(num_choices, len(output.logits))
        output.logits = _by_question(output.logits, counts)
        if labels is not None:
            if tuple(labels.shape) not in ((len(counts),), (len(counts), 1)):
                raise InputError(f"labels has shape {tuple(labels.shape)}; with this input it must be ({len(counts)},)")
            right = check_classes(labels.flatten(), max(counts, default=0))
            for question, (label, count) in enumerate(zip(right.tolist(), counts, strict=True)):
                if label >= count:
                    raise InputError(f"labels holds {label} for question {question}, which has {count} choices")
            output.loss = cross_entropy(output.logits, right, num_items=num_items_in_batch)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def apply_head(
        self, x_TM: Tensor, inputs: PackedInputs, labels: None, num_items: Tensor | float | None
    ) -> MultipleChoiceModelOutput:
        """One score a text, (texts,); `forward` puts those of a question together."""
        return MultipleChoiceModelOutput(None, self.classify_texts(x_TM, inputs).squeeze(1))


def _flat(name: str, values: Tensor | None, grid: tuple[int, ...]) -> Tensor | None:
    if values is None:
        return None
    if tuple(values.shape) != grid:
        raise InputError(f"{name} has shape {tuple(values.shape)}; with this input it must be {grid}")
    return values.flatten(0, 1)


def _counts(num_choices: int | Sequence[int] | None, texts: int) -> list[int]:
    """How many choices each question has."""
    if isinstance(num_choices, int):
        if num_choices < 1 or texts % num_choices:
            raise InputError(f"num_choices is {num_choices}; the input holds {texts} choices, which must be a multiple")
        return [num_choices] * (texts // num_choices)
    counts = [] if num_choices is None else [int(n) for n in num_choices]
    if sum(counts) != texts or min(counts, default=1) < 1:
        raise InputError(f"num_choices is {counts}; they must be at least 1 each and add up to the {texts} choices")
    return counts


def _by_question(scores: Tensor, counts: list[int]) -> Tensor:
    """Scores of all choices one after another to (questions, most choices)."""
    if len(set(counts)) <= 1:
        return scores.view(len(counts), counts[0] if counts else 0)
    return pad_sequence(scores.split(counts), batch_first=True, padding_value=torch.finfo(scores.dtype).min)
