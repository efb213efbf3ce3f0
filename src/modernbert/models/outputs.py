"""What models return: by attribute, by key, by position, and as a plain tuple; fields that are None do not count."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, overload

from torch import Tensor


@dataclasses.dataclass
class ModelOutput:
    """Base of the outputs. Iterating gives the names of the fields that are set, as a mapping does."""

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are set, in order."""
        return tuple(self.values())

    def keys(self) -> list[str]:
        """Names of the fields that are set, in order."""
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None]

    def values(self) -> list[Any]:
        """The fields that are set, in order."""
        return [getattr(self, name) for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        """Names and values of the fields that are set, in order."""
        return [(name, getattr(self, name)) for name in self.keys()]

    def get(self, name: str, default: Any = None) -> Any:
        """The field of this name, or `default` where it is not set."""
        return getattr(self, name) if name in self else default

    @overload
    def __getitem__(self, key: slice) -> tuple[Any, ...]: ...
    @overload
    def __getitem__(self, key: str | int) -> Any: ...
    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self:
                raise KeyError(key)
            return getattr(self, key)
        return self.to_tuple()[key]

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


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


@dataclasses.dataclass
class GenerateOutput(ModelOutput):
    """What `generate` returns with `return_dict_in_generate=True`.

    Attributes:
        sequences: (texts, tokens) ids, prompts included, filled up with the padding id.
        sequences_scores: (texts,) of beam search: log-probabilities over lengths.
        scores: for each new token (texts, vocabulary), as it was chosen by; zeros for texts that were finished.
        logits: likewise, as the model gave them.
        past_key_values: the cache of all tokens but the last one of each text; None after a beam search.
    """

    sequences: Tensor | None = None
    sequences_scores: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    past_key_values: Any = None
