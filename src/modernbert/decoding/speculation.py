"""Guessing tokens ahead: several are read in one pass, and those that the model would have chosen itself are kept.

A pass over a few tokens takes hardly longer than over one, because both read all weights once. The model scores each of
them as if it had come by itself, bit for bit, so the tokens are those that come without guessing; guesses only decide
how many passes they take. Sampling goes on as well: each token is drawn from the scores that it would be drawn from.

Source: Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding", 2023; Saxena, "Prompt
Lookup Decoding", 2023. Here a guess is kept only where it is the very token that was chosen.

Shapes: B texts, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from modernbert.decoding.cache import DecoderCache
from modernbert.decoding.decoders import CachedDecoder, LanguageModel
from modernbert.decoding.options import GenerationOptions
from modernbert.errors import InputError
from modernbert.nn.packing import PackedInputs

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def settling(decoder: Any) -> Iterator[None]:
    """However this ends, the cache holds what was gone on with, and no guesses."""
    try:
        yield
    finally:
        if isinstance(decoder, SpeculatingDecoder):
            decoder.settle()


class Guesser(Protocol):
    """Guesses what follows one text."""

    def guess(self, ids: Sequence[int], most: int) -> list[int]:
        """At most this many tokens that may follow these ids; none where there is no good guess."""
        ...


class PromptLookup:
    """Guesses that a text goes on as it did before: after the last place with the same tokens at its end.

    Args:
        longest: how many tokens at the end are looked for first; then fewer, down to one.
    """

    def __init__(self, longest: int = 2) -> None:
        self.longest = longest
        self._ids: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # after each sequence but that at the very end, where it ended last

    def guess(self, ids: Sequence[int], most: int) -> list[int]:
        """See `Guesser`."""
        known = len(self._ids)
        if list(ids[:known]) != self._ids:
            known, self._ids, self._ends = 0, [], {}
        for end in range(max(1, known), len(ids)):
            for length in range(1, min(self.longest, end) + 1):
                self._ends[tuple(ids[end - length : end])] = end
        self._ids = list(ids)
        for length in range(min(self.longest, len(ids)), 0, -1):
            at = self._ends.get(tuple(ids[-length:]))
            if at is not None:
                return list(ids[at : at + most])
        return []


class Assistant:
    """Guesses what a smaller model would write, the likeliest token at each place.

    Args:
        model: a decoder with the same vocabulary.
        most: how many tokens are guessed at the most.
    """

    def __init__(self, model: LanguageModel, most: int) -> None:
        self.model, self.most = model, most
        self.cache = DecoderCache(model.config, slack=most)
        self.read: list[int] = []  # what the cache holds

    def guess(self, ids: Sequence[int], most: int) -> list[int]:
        """See `Guesser`."""
        same = next((i for i, (a, b) in enumerate(zip(self.read, ids, strict=False)) if a != b), None)
        keep = min(len(self.read), len(ids) - 1) if same is None else same
        if keep < len(self.read):
            try:
                self.cache.cut([keep])
            except InputError:  # further back than local layers keep
                keep, self.cache = 0, DecoderCache(self.model.config, slack=self.most)
            self.read = self.read[:keep]
        found: list[int] = []
        new = list(ids[keep:])
        while len(found) < most:
            inputs = PackedInputs.of_rows([new], self.model.device, self.cache.ends)
            scores_BV = self.model.score_next(inputs, self.cache)
            self.read += new
            new = [int(scores_BV.argmax(-1))]
            found += new
        return found


def speculation(
    model: LanguageModel, options: GenerationOptions, assistant: Any = None
) -> Callable[..., CachedDecoder] | None:
    """What `decoder_of` takes to guess tokens as the options say; None where none are guessed.

    Raises:
        InputError: the assistant is no decoder, or one of another vocabulary; or two ways to guess are asked for.
    """
    most = options.prompt_lookup_num_tokens
    if assistant is None and not most:
        return None
    if assistant is not None:
        if most:
            raise InputError("assistant_model and prompt_lookup_num_tokens are given; give one of them")
        if not callable(getattr(assistant, "score_next", None)):
            kind = type(assistant).__name__
            raise InputError(f"assistant_model is a {kind}; give a ModernBertDecoderForCausalLM of the same vocabulary")
        sizes = [one.config.vocab_size for one in (assistant, model)]
        if sizes[0] != sizes[1]:
            raise InputError(f"assistant_model has a vocabulary of {sizes[0]} and the model one of {sizes[1]}")
        if assistant.training:
            raise InputError("assistant_model is in training mode; call assistant_model.eval() first")
    if options.num_beams > 1 or not model.goes_one_by_one:
        why = "a beam search is running" if options.num_beams > 1 else "the model is not optimized, or not for kernels"
        logger.info("no tokens are guessed: %s", why)
        return None

    def make_guesser() -> Guesser:
        if assistant is None:
            return PromptLookup(options.max_matching_ngram_size)
        return Assistant(assistant, options.num_assistant_tokens)

    def make(
        model: LanguageModel, prompts: Sequence[Sequence[int]], cache: DecoderCache | None, keep_texts: bool
    ) -> CachedDecoder:
        at_once = most if assistant is None else options.num_assistant_tokens
        if cache is None:
            cache = DecoderCache(model.config, slack=at_once)
        cache.check_model(model.config)
        if cache.slack < 1 and any(storage.ring for storage in cache.kinds.values()):
            logger.info("no tokens are guessed: past_key_values has no slack; DecoderCache(config, slack=...) has")
            return CachedDecoder(model, prompts, cache, keep_texts)
        at_once = min(at_once, cache.slack or at_once)
        return SpeculatingDecoder(model, prompts, cache, keep_texts, make_guesser, at_once)

    return make


@dataclasses.dataclass
class _Ahead:
    """One text: all its tokens so far, its guesser, and what was read ahead of it."""

    ids: list[int]
    guesser: Guesser
    most: int  # tokens to guess next
    guessed: int = 0  # tokens that were guessed last
    right: int = 0  # how many of them came
    read: list[tuple[int, Tensor]] = dataclasses.field(default_factory=list)  # a guess, and the scores after it

    def copy(self, guesser: Guesser) -> _Ahead:
        return dataclasses.replace(self, ids=list(self.ids), guesser=guesser, read=list(self.read))


class SpeculatingDecoder(CachedDecoder):
    """A `CachedDecoder` that reads guesses along with the token that is given to it.

    Of a text whose guesses came true more are made the next time, up to `most`; else as many as came, and one.

    Args:
        model, prompts, cache, keep_texts: as there; the cache has to have slack for guesses.
        make_guesser: makes one for each text.
        most: how many tokens to guess at a time.
    """

    def __init__(
        self, model: LanguageModel, prompts: Sequence[Sequence[int]], cache: DecoderCache, keep_texts: bool,
        make_guesser: Callable[[], Guesser], most: int,
    ) -> None:  # fmt: skip
        super().__init__(model, prompts, cache, keep_texts)
        self.make_guesser, self.most = make_guesser, most
        self.texts = [_Ahead(list(prompt), make_guesser(), min(2, most)) for prompt in prompts]  # as in the cache
        self.passes = 0  # of the model, after the first

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Add one token to each text; scores (B, V) of what follows."""
        rows: dict[int, Tensor] = {}
        for number, token in zip(self.active, tokens, strict=True):
            text = self.texts[number]
            text.ids.append(token)
            if text.read and text.read[0][0] == token:
                rows[number] = text.read.pop(0)[1]
                text.right += 1
        waiting = [number for number in self.active if number not in rows]
        if waiting:
            rows |= dict(zip(waiting, self._read_ahead(waiting), strict=True))
        return torch.stack([rows[number] for number in self.active])

    def select(self, texts: Sequence[int]) -> None:
        """Go on with these texts, in this order; one may be named several times."""
        chosen, before = [self.active[t] for t in texts], self.cache.texts
        super().select(texts)
        if self.active == chosen and self.cache.texts == before:
            return  # all are kept in the cache
        first = set[int]()
        found = []
        for number in chosen:
            text = self.texts[number]
            found.append(text.copy(self.make_guesser()) if number in first else text)
            first.add(number)
        self.texts = found

    def settle(self) -> None:
        """Have the cache forget guesses that no token came after, unless a pass failed that wrote to it."""
        if not self.cache.is_whole or not self.cache.lengths:
            return
        held = [len(text.ids) for text in self.texts]
        self.cache.cut([min(n, length) for n, length in zip(held, self.cache.lengths, strict=True)])
        for text in self.texts:
            text.read = []

    def _read_ahead(self, waiting: Sequence[int]) -> list[Tensor]:
        """The scores after the last token of each of these texts, with guesses after it, whose scores are kept."""
        lengths = list(self.cache.lengths)
        new: list[list[int]] = [[] for _ in lengths]
        for number in waiting:
            text = self.texts[number]
            lengths[number] = len(text.ids) - 1
            if text.guessed:
                text.most = min(2 * text.most if text.right == text.guessed else text.right + 1, self.most)
            guesses = text.guesser.guess(text.ids, text.most) if self.model.goes_one_by_one else []
            text.guessed, text.right = len(guesses), 0
            new[number] = [text.ids[-1], *guesses]
        self.cache.cut(lengths)
        self.cache.one_by_one = True
        try:
            inputs = PackedInputs.of_rows(new, self.model.device, self.cache.ends)
            scores_NV = self.model.score_next(inputs, self.cache, every=True)
        finally:
            self.cache.one_by_one = False
        self.passes += 1
        parts = scores_NV.split([len(row) for row in new])
        for number in waiting:
            self.texts[number].read = list(zip(new[number][1:], parts[number][1:], strict=True))
        return [parts[number][0] for number in waiting]
