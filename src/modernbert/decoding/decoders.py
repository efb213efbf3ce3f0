"""What the decoding loops see of a model: prompts read once into a cache, or every text anew for each token.

Shapes: B texts, N rows to score, T tokens of all texts together, M hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from modernbert.config import Config
from modernbert.decoding.cache import DecoderCache
from modernbert.errors import InputError
from modernbert.nn.execution import Hidden
from modernbert.nn.inputs import PackedInputs
from modernbert.nn.packing import on_device


class Decoder(Protocol):
    """What the loops need. Texts are numbered as they are when a method is called."""

    def check(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raise `InputError` where these prompts cannot be gone on with."""

    def reserve(self, tokens: int) -> None:
        """Be ready for this many new tokens of each text."""

    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts; scores (B, V), float32, of what follows each."""

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Add one token to each text; scores (B, V), float32, of what follows."""

    def select(self, texts: Sequence[int]) -> None:
        """Go on with these texts, in this order; one may be named several times."""


class Encoder(Protocol):
    """The part of a language model that makes hidden states."""

    def encode(
        self, inputs: PackedInputs, output_attentions: bool, output_hidden_states: bool, cache: DecoderCache | None
    ) -> Hidden:
        """Hidden states of packed inputs, which are added to the cache."""


class LanguageModel(Protocol):
    """A model that scores the next token."""

    training: bool

    @property
    def config(self) -> Config:
        """The architecture."""

    @property
    def device(self) -> torch.device:
        """Where it is."""

    @property
    def model(self) -> Encoder:
        """What makes hidden states."""

    def score(self, x: Tensor) -> Tensor:
        """Scores of the whole vocabulary: (N, M) to (N, V)."""


def decoder_of(
    model: LanguageModel, use_cache: bool = True, cache: DecoderCache | None = None, keep_texts: bool = False
) -> CachedDecoder | UncachedDecoder:
    """A decoder of a model.

    Args:
        model: scores tokens.
        use_cache: False reads every text anew for each token.
        cache: holds the prompts' beginnings already; None makes one.
        keep_texts: keep texts in the cache that are no longer gone on with. A cache that is given keeps them.

    Raises:
        InputError: the cache is none, or the model is in training mode.
    """
    if cache is not None and not isinstance(cache, DecoderCache):
        raise InputError(f"past_key_values is a {type(cache).__name__}; it must be a DecoderCache")
    if model.training:
        raise InputError("generation is for evaluation mode; call model.eval() first")
    if not use_cache:
        return UncachedDecoder(model)
    keep_texts = keep_texts or cache is not None
    return CachedDecoder(model, DecoderCache(model.config) if cache is None else cache, keep_texts)


def _following(model: LanguageModel, inputs: PackedInputs, cache: DecoderCache | None) -> Tensor:
    """Scores after the last token of each text that has any."""
    x_TM = model.model.encode(inputs, False, False, cache).last_TM
    ends = [end - 1 for start, end in inputs.packing.spans if end > start]
    if len(ends) < len(x_TM):
        x_TM = x_TM.index_select(0, on_device(ends, x_TM.device))
    return model.score(x_TM).float()


class CachedDecoder:
    """A decoder that reads each token once; see `decoder_of`."""

    def __init__(self, model: LanguageModel, cache: DecoderCache, keep_texts: bool = False) -> None:
        self.model = model
        self.cache = cache
        self.keep_texts = keep_texts
        self.active: list[int] = []  # texts of the cache that are gone on with

    def check(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raise `InputError` where the prompts do not go on from what the cache holds."""
        self.cache.check_model(self.model.config)
        past = self.cache.lengths or [0] * len(prompts)
        if len(past) != len(prompts):
            raise InputError(f"there are {len(prompts)} prompts; past_key_values holds {len(past)} texts")
        for held, prompt in zip(past, prompts, strict=True):
            if held >= len(prompt):
                raise InputError(
                    f"past_key_values holds {held} tokens of a text and its prompt has {len(prompt)}; a prompt goes "
                    "on from what the cache holds: all of its tokens, and at least one more"
                )

    def reserve(self, tokens: int) -> None:
        """Have room for this many new tokens of each text. A CPU's memory is cheap to move, and dear to touch ahead."""
        if self.model.device.type != "cpu":
            self.cache.reserve(tokens)

    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Scores of what follows each prompt; what the cache holds of it is not read again."""
        past = self.cache.lengths or [0] * len(prompts)
        self.active = list(range(len(prompts)))
        return self._read([prompt[held:] for held, prompt in zip(past, prompts, strict=True)])

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Scores of what follows one more token each."""
        new: list[list[int]] = [[] for _ in range(len(self.cache))]
        for text, token in zip(self.active, tokens, strict=True):
            new[text] = [token]
        return self._read(new)

    def select(self, texts: Sequence[int]) -> None:
        """Go on with these texts."""
        chosen = [self.active[t] for t in texts]
        if self.keep_texts and len(set(chosen)) == len(chosen) and chosen == sorted(chosen):
            self.active = chosen
            return
        self.cache.select(chosen)
        self.active = list(range(len(chosen)))

    def _read(self, new: Sequence[Sequence[int]]) -> Tensor:
        return _following(self.model, PackedInputs.of_rows(new, self.model.device, self.cache.ends), self.cache)


class UncachedDecoder:
    """A decoder that reads every text anew for each token: slow, obvious, and the oracle of the other."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.texts: list[list[int]] = []

    def check(self, prompts: Sequence[Sequence[int]]) -> None:
        """Any prompts will do."""

    def reserve(self, tokens: int) -> None:
        """Nothing is kept, so nothing is made room for."""

    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Scores of what follows each prompt."""
        self.texts = [list(prompt) for prompt in prompts]
        return _following(self.model, PackedInputs.of_rows(self.texts, self.model.device), None)

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Scores of what follows one more token each."""
        return self.start([[*text, token] for text, token in zip(self.texts, tokens, strict=True)])

    def select(self, texts: Sequence[int]) -> None:
        """Go on with these texts."""
        self.texts = [self.texts[t] for t in texts]
