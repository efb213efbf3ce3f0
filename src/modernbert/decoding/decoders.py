"""What the decoding loops see of a model: prompts read once into a cache, or every text anew for each token.

Shapes: B texts, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from modernbert.decoding.cache import DecoderCache
from modernbert.errors import InputError
from modernbert.nn.packing import PackedInputs


class LanguageModel(Protocol):
    """A model that scores the next token."""

    config: Any
    device: Any
    dtype: Any
    training: bool

    @property
    def goes_one_by_one(self) -> bool:
        """Whether several new tokens of a text can be scored as if each had come by itself, bit for bit."""
        ...

    def score_next(self, inputs: PackedInputs, cache: DecoderCache | None, every: bool = False) -> Tensor:
        """Scores (B, V), float32, of what follows each text that has tokens in the input; the cache gets those.

        With `every` of what follows each token.
        """
        ...


class CachedDecoder:
    """Goes on with prompts, reading each token once. Texts are numbered as they are when a method is called.

    Args:
        model: scores tokens.
        prompts: ids.
        cache: holds the prompts' beginnings already, or nothing.
        keep_texts: keep texts in the cache that are no longer gone on with.
        embeds: vectors of each prompt (S, M), instead of what its ids would be embedded to; its ids may be none.

    Raises:
        InputError: the prompts do not go on from what the cache holds.
    """

    def __init__(
        self, model: LanguageModel, prompts: Sequence[Sequence[int]], cache: DecoderCache, keep_texts: bool = False,
        embeds: Sequence[Tensor] = (),
    ) -> None:  # fmt: skip
        self.model, self.prompts, self.cache, self.keep_texts = model, prompts, cache, keep_texts
        self.device, self.embeds = model.device, embeds
        self.active = list(range(len(prompts)))  # texts of the cache that are gone on with
        self._past()

    def start(self, most: int) -> Tensor:
        """Read the prompts; scores (B, V) of what follows. At most this many new tokens will come of each text."""
        past = self._past()
        if self.model.device.type != "cpu":  # whose memory is cheap to move, and dear to touch ahead
            self.cache.reserve(most)
        if self.embeds:
            embeds_TM = torch.cat([row[held:] for held, row in zip(past, self.embeds, strict=True)])
            lengths = [len(row) - held for held, row in zip(past, self.embeds, strict=True)]
            inputs = PackedInputs.of_rows([[0] * n for n in lengths], offsets=self.cache.ends)
            inputs = dataclasses.replace(inputs, ids_T=None, embeds_TM=embeds_TM.to(self.model.dtype))
            return self.model.score_next(inputs.to(self.model.device), self.cache)
        return self._read([prompt[held:] for held, prompt in zip(past, self.prompts, strict=True)])

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Add one token to each text; scores (B, V) of what follows."""
        new: list[list[int]] = [[] for _ in range(self.cache.texts)]
        for text, token in zip(self.active, tokens, strict=True):
            new[text] = [token]
        return self._read(new)

    def select(self, texts: Sequence[int]) -> None:
        """Go on with these texts, in this order; one may be named several times."""
        chosen = [self.active[t] for t in texts]
        if self.keep_texts and len(set(chosen)) == len(chosen) and chosen == sorted(chosen):
            self.active = chosen
            return
        self.cache.select(chosen)
        self.active = list(range(len(chosen)))

    def _past(self) -> list[int]:
        """How many tokens of each prompt the cache holds."""
        self.cache.check_model(self.model.config)
        past = self.cache.lengths or [0] * len(self.prompts)
        if len(past) != len(self.prompts):
            raise InputError(f"there are {len(self.prompts)} prompts; past_key_values holds {len(past)} texts")
        lengths = [len(row) for row in self.embeds] if self.embeds else [len(prompt) for prompt in self.prompts]
        for held, length in zip(past, lengths, strict=True):
            if held >= length:
                raise InputError(
                    f"past_key_values holds {held} tokens of a text and its prompt has {length}; a prompt goes "
                    "on from what the cache holds: all of its tokens, and at least one more"
                )
        return past

    def _read(self, new: Sequence[Sequence[int]]) -> Tensor:
        return self.model.score_next(PackedInputs.of_rows(new, self.device, self.cache.ends), self.cache)


class UncachedDecoder:
    """Goes on with prompts, reading every text anew for each token: slow, obvious, and the oracle of the other."""

    def __init__(self, model: LanguageModel, prompts: Sequence[Sequence[int]]) -> None:
        self.model, self.prompts = model, prompts
        self.texts = [list(prompt) for prompt in prompts]

    def start(self, most: int) -> Tensor:
        return self.model.score_next(PackedInputs.of_rows(self.texts, self.model.device), None)

    def step(self, tokens: Sequence[int]) -> Tensor:
        self.texts = [[*text, token] for text, token in zip(self.texts, tokens, strict=True)]
        return self.start(0)

    def select(self, texts: Sequence[int]) -> None:
        self.texts = [self.texts[t] for t in texts]


def decoder_of(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    use_cache: bool = True,
    cache: DecoderCache | None = None,
    keep_texts: bool = False,
    embeds: Sequence[Tensor] = (),
    speculate: Callable[..., CachedDecoder] | None = None,
) -> CachedDecoder | UncachedDecoder:
    """What goes on with prompts: without a cache, with one that is given and keeps all texts, or with a new one.

    Args:
        speculate: makes it where tokens are guessed, from a model, prompts, a cache or None, and `keep_texts`.

    Raises:
        InputError: the cache is none, does not fit, or the model is in training mode.
    """
    if cache is not None and not isinstance(cache, DecoderCache):
        raise InputError(f"past_key_values is a {type(cache).__name__}; it must be a DecoderCache")
    if model.training:
        raise InputError("generation is for evaluation mode; call model.eval() first")
    if not use_cache:
        if embeds:
            raise InputError("inputs_embeds are gone on with from a cache; leave use_cache=False out")
        return UncachedDecoder(model, prompts)
    if speculate is not None and not embeds:
        return speculate(model, prompts, cache, keep_texts or cache is not None)
    if cache is None:
        return CachedDecoder(model, prompts, DecoderCache(model.config), keep_texts, embeds)
    return CachedDecoder(model, prompts, cache, keep_texts=True, embeds=embeds)
