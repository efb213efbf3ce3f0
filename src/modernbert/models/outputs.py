"""What each model returns."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from modernbert.nn.outputs import ModelOutput


class States(ModelOutput):
    """What every model returns on request.

    Attributes:
        hidden_states: the embeddings and each layer's output, the last one normed: (batch, sequence, hidden), zeros at
            padding; (tokens, hidden) for packed input.
        attentions: for each layer (batch, heads, sequence, sequence), zeros at padding and at what is not seen; where a
            decoder had a cache, the last dimension holds the tokens of each text from its first.
    """

    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


class StatesWithPast(States):
    """What every decoder returns on request, and the `DecoderCache` of all tokens so far."""

    past_key_values: Any


class BaseModelOutput(States):
    """Output of a bare model: the last hidden state, of the shape of the others."""

    last_hidden_state: Tensor | None


class BaseModelOutputWithPast(BaseModelOutput, StatesWithPast):
    """Output of the bare decoder."""


class HeadOutput(States):
    """Output of models with a head: the loss, a scalar, if labels were given, and logits."""

    loss: Tensor | None
    logits: Tensor | None


class MaskedLMOutput(HeadOutput):
    """Logits (batch, sequence, vocabulary), zeros at padding; (tokens, vocabulary) for packed input; (labelled tokens,
    vocabulary) with `sparse_prediction` and labels."""


class CausalLMOutputWithPast(HeadOutput, StatesWithPast):
    """Logits (batch, sequence, vocabulary), zeros at padding; (tokens, vocabulary) for packed input; fewer columns or
    tokens with `logits_to_keep`."""


class SequenceClassifierOutput(HeadOutput):
    """Logits (batch, labels)."""


class SequenceClassifierOutputWithPast(SequenceClassifierOutput, StatesWithPast):
    """Logits (batch, labels)."""


class TokenClassifierOutput(HeadOutput):
    """Logits (batch, sequence, labels), zeros at padding; (tokens, labels) for packed input."""


class MultipleChoiceModelOutput(HeadOutput):
    """Logits (batch, choices); the lowest finite number for choices that a question lacks. Hidden states and attentions
    have the choices one after another."""


class QuestionAnsweringModelOutput(States):
    """Logits (batch, sequence), the lowest finite number at padding, so that padding is never the best place; (tokens,)
    for packed input. The loss is a scalar, if positions were given."""

    loss: Tensor | None
    start_logits: Tensor | None
    end_logits: Tensor | None
