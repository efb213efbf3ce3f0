"""What the decoding loops see of a decoder: prompts read once into a cache, or every text anew for each token.

Shapes: B texts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modernbert.decoding.cache import DecoderCache
from modernbert.errors import InputError
from modernbert.nn.packing import PackedInputs, on_device

if TYPE_CHECKING:
    from modernbert.models.decoder import ModernBertDecoderForCausalLM


class CachedDecoder:
    """A decoder that reads each token once.

    Args:
        model: scores tokens.
        cache: holds the prompts' beginnings already, or nothing.
        keep_texts: keep texts in the cache that are no longer gone on with.
    """

    def __init__(self, model: ModernBertDecoderForCausalLM, cache: DecoderCache, keep_texts: bool = False) -> None:
        self.model = model
        self.cache = cache
        self.keep_texts = keep_texts
        self.active: list[int] = []  # texts of the cache that are gone on with

    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Scores of what follows each prompt."""
        past = self.check(prompts)
        self.active = list(range(len(prompts)))
        return self._read([list(prompt[held:]) for held, prompt in zip(past, prompts, strict=True)])

    def check(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """How many tokens of each prompt the cache holds; raises `InputError` where they do not fit."""
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
        return past

    def reserve(self, tokens: int) -> None:
        """Have room for so many new tokens of each text. A CPU's memory is cheap to move, and dear to touch ahead."""
        if self.model.device.type != "cpu":
            self.cache.reserve(tokens)

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

    def _read(self, new: list[list[int]]) -> Tensor:
        """Scores after the last token of each text that has new ones."""
        model, device = self.model, self.model.device
        inputs = PackedInputs.of_rows(new, device, self.cache.ends)
        packing = inputs.packing
        x_TM = model.model.encode(inputs, False, False, self.cache).last_TM
        if packing.tokens > len(self.active):
            ends = [end - 1 for start, end in packing.spans if end > start]
            x_TM = x_TM.index_select(0, on_device(ends, device))
        return model.score(x_TM).float()


class UncachedDecoder:
    """A decoder that reads every text anew for each token: slow, obvious, and the oracle of the other."""

    def __init__(self, model: ModernBertDecoderForCausalLM) -> None:
        self.model = model
        self.texts: list[list[int]] = []

    def check(self, prompts: Sequence[Sequence[int]]) -> None:
        """Any prompts will do."""

    def reserve(self, tokens: int) -> None:
        """Nothing is kept, so nothing is made room for."""

    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Scores of what follows each prompt."""
        self.texts = [list(prompt) for prompt in prompts]
        inputs = PackedInputs.of_rows(self.texts, self.model.device)
        x_TM = self.model.model.encode(inputs, False, False).last_TM
        return self.model.score(
            x_TM.index_select(0, torch.tensor(inputs.packing.starts[1:], device=x_TM.device) - 1)
        ).float()

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Scores of what follows one more token each."""
        return self.start([[*text, token] for text, token in zip(self.texts, tokens, strict=True)])

    def select(self, texts: Sequence[int]) -> None:
        """Go on with these texts."""
        self.texts = [list(self.texts[t]) for t in texts]
