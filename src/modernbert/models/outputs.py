"""What each model returns."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from modernbert.nn.outputs import ModelOutput


@dataclasses.dataclass
class BaseModelOutput(ModelOutput):
    """Output of the bare encoder.

    Attributes:
        last_hidden_state: (batch, sequence, hidden), zeros at padding; (tokens, hidden) for packed input.
        hidden_states: the embeddings and each layer's output, shaped likewise; the last one is normed.
        attentions: for each layer (batch, heads, sequence, sequence), zeros at padding.
    """

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclasses.dataclass
class BaseModelOutputWithPast(ModelOutput):
    """Output of the bare decoder.

    Attributes:
        last_hidden_state: as in `BaseModelOutput`.
        past_key_values: the `DecoderCache` of all tokens so far, where one was asked for.
        hidden_states: as in `BaseModelOutput`.
        attentions: for each layer (batch, heads, sequence, sequence), or the tokens of each text from its first where
            there was a cache; zeros at padding and at what is not seen.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclasses.dataclass
class HeadOutput(ModelOutput):
    """Output of models with a head.

    Attributes:
        loss: scalar, where labels were given.
        logits: what the head says; each class below has its shape.
        hidden_states, attentions: as in `BaseModelOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class MaskedLMOutput(HeadOutput):
    """Logits (batch, sequence, vocabulary), zeros at padding; (tokens, vocabulary) for packed input; (labelled tokens,
    vocabulary) with `sparse_prediction` and labels.
    """


class SequenceClassifierOutput(HeadOutput):
    """Logits (batch, labels)."""


class TokenClassifierOutput(HeadOutput):
    """Logits (batch, sequence, labels), zeros at padding; (tokens, labels) for packed input."""


class MultipleChoiceModelOutput(HeadOutput):
    """Logits (batch, choices); the lowest finite number where a question has fewer choices than others.

    Hidden states and attentions have the choices one after another.
    """


@dataclasses.dataclass
class QuestionAnsweringModelOutput(ModelOutput):
    """Output of models that find an answer in a text.

    Attributes:
        loss: scalar, where positions were given.
        start_logits, end_logits: (batch, sequence), the lowest finite number at padding, so that padding is never
            the best place; (tokens,) for packed input.
        hidden_states, attentions: as in `BaseModelOutput`.
    """

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclasses.dataclass
class HeadOutputWithPast(ModelOutput):
    """Output of decoders with a head.

    Attributes:
        loss: scalar, where labels were given.
        logits: what the head says; each class below has its shape.
        past_key_values, hidden_states, attentions: as in `BaseModelOutputWithPast`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class CausalLMOutputWithPast(HeadOutputWithPast):
    """Logits (batch, sequence, vocabulary), zeros at padding; (tokens, vocabulary) for packed input; fewer columns or
    tokens with `logits_to_keep`.
    """


class SequenceClassifierOutputWithPast(HeadOutputWithPast):
    """Logits (batch, labels)."""
