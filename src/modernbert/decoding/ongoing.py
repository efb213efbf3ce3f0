"""Texts that join a running batch and leave it at any step, each with options of its own; beam searches by steps.

A text's tokens are those of `generate` with the same options and generator, whoever else is in the batch, because what
the model says of it does not depend on that (docs/invariance.md).

Shapes: B texts, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from modernbert.decoding.cache import DecoderCache
from modernbert.decoding.decoders import LanguageModel
from modernbert.decoding.loops import Generation, is_over
from modernbert.decoding.options import GenerationOptions
from modernbert.decoding.processors import Handed, Rules
from modernbert.decoding.samplers import Draw, History
from modernbert.decoding.text import Tokenizer
from modernbert.errors import InputError
from modernbert.nn.packing import PackedInputs


class Ongoing:
    """One text that is gone on with.

    Args:
        prompt: ids, one at least.
        limit: how many new tokens it may get.
        options: without beams; `num_return_sequences` is not looked at.
        generator: draws, where the options sample; None takes PyTorch's global one.
        tokenizer: decodes for `stop_strings`.

    Attributes:
        history: the text so far.
        rows: how many texts of the cache it is.
        cancelled: set by the caller to have it leave the batch before its end.

    Raises:
        InputError: the options need beams, or a tokenizer that is not given.
    """

    rows = 1

    def __init__(
        self,
        prompt: Sequence[int],
        limit: int,
        options: GenerationOptions,
        generator: torch.Generator | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        if options.num_beams > 1:
            raise InputError(f"num_beams is {options.num_beams}; texts that join a running batch have one")
        if options.stop_strings and tokenizer is None:
            raise InputError("stop_strings need a tokenizer, which decodes what they are looked for in")
        self.history = History(list(prompt), len(prompt), limit, 0, list(prompt))
        self.options, self.tokenizer = options, tokenizer
        self.draw = Draw(1, None if generator is None else [generator]) if options.do_sample else None
        self.rules: Rules | None = None
        self.cancelled = False

    def choose(self, logits_1V: Tensor, model: LanguageModel) -> tuple[int, Tensor]:
        """The next token, and the scores (1, V) that it was chosen by."""
        if self.rules is None:  # whose clock begins with the first token
            self.rules = Rules(self.options, Handed(without=[self.history.ids[-1:]]), model)
        scores_1V = self.rules.scores(logits_1V, [self.history])
        token = int(scores_1V.argmax(-1) if self.draw is None else self.draw(scores_1V, [0]))
        self.history.ids.append(token)
        return token, scores_1V

    @property
    def is_over(self) -> bool:
        """Whether it has all its tokens."""
        assert self.rules is not None
        return is_over(self.history, self.options, self.rules, self.tokenizer)


class OngoingSearch:
    """A beam search over one prompt that goes on by single steps, with a cache of its own.

    Args:
        prompt, limit, options: see `Ongoing`.
        begin: makes the generation, when the first step begins.

    Attributes:
        history: the prompt, and how many tokens may follow.
        rows, cancelled: see `Ongoing`.
    """

    def __init__(
        self, prompt: Sequence[int], limit: int, options: GenerationOptions, begin: Callable[[], Generation]
    ) -> None:
        self.history = History(list(prompt), len(prompt), limit, 0, list(prompt))
        self.options, self.rows, self.cancelled = options, options.num_beams, False
        self._begin = begin
        self._generation: Generation | None = None
        self._steps: Iterator[None] = iter(())

    @torch.inference_mode()
    def step(self) -> list[list[int]] | None:
        """One token of each beam; at the end the new ids of the best texts."""
        if self._generation is None:
            self._generation = self._begin()
            self._steps = self._generation.search()
        try:
            next(self._steps)
        except StopIteration:
            return [history.new for history in self._generation.texts]
        return None


@dataclasses.dataclass(frozen=True)
class Token:
    """One new token of a text.

    Attributes:
        text: whose it is.
        token: its id.
        logits_V: as the model gave them, float32; None where it raised an error.
        is_last: whether the text is over with it.
        error: why there is no token, because of the text's own options or of the model; it is over then, and `token`
            means nothing.
    """

    text: Ongoing
    token: int
    logits_V: Tensor | None
    is_last: bool
    error: Exception | None = None


class OngoingBatch:
    """A running batch of one model, and its cache.

    Args:
        model: scores tokens; in evaluation mode.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.texts: list[Ongoing] = []
        self.cache = DecoderCache(model.config)

    def __len__(self) -> int:
        return len(self.texts)

    @torch.inference_mode()
    def step(self, joining: Sequence[Ongoing] = ()) -> list[Token]:
        """One token of each text, of those that join as well; texts that are over or cancelled leave.

        Where the model fails, halves of the batch are read apart, down to the texts at which it fails alone: these are
        over, and the others have the tokens that they would have without them.
        """
        try:
            self._leave()
            if not self.texts:
                self.cache = DecoderCache(self.model.config)  # whose memory is free again
            self.cache.extend(len(joining))
            rows = [text.history.ids[-1:] for text in self.texts] + [text.history.ids for text in joining]
            self.texts += joining
            read = self._read(rows, range(len(rows))) if rows else []
        except BaseException:
            self.texts, self.cache = [], DecoderCache(self.model.config)
            raise
        tokens = []
        for text, logits_1V in zip(self.texts, read, strict=True):
            if isinstance(logits_1V, Exception):
                text.cancelled = True
                tokens.append(Token(text, -1, None, True, logits_1V))
                continue
            token, error = -1, None
            try:
                token, _ = text.choose(logits_1V, self.model)
                text.cancelled = text.cancelled or text.is_over
            except Exception as caught:  # scores that cannot be drawn from, such as NaN, end this text alone
                text.cancelled, error = True, caught
            tokens.append(Token(text, token, logits_1V[0], text.cancelled, error))
        return tokens

    def _read(self, rows: Sequence[list[int]], texts: Sequence[int]) -> list[Tensor | Exception]:
        """Scores (1, V) of what follows each of these texts, or why there are none."""
        mark = self.cache.mark()
        try:
            new = [row if i in texts else [] for i, row in enumerate(rows)]
            inputs = PackedInputs.of_rows(new, self.model.device, self.cache.ends)
            return list(self.model.score_next(inputs, self.cache).split(1))
        except Exception as error:
            if not self.cache.back(mark):
                raise
            if len(texts) == 1:
                return [error]
        half = len(texts) // 2
        return self._read(rows, texts[:half]) + self._read(rows, texts[half:])

    def _leave(self) -> None:
        going = [i for i, text in enumerate(self.texts) if not text.cancelled]
        if len(going) < len(self.texts):
            self.cache.select(going)
            self.texts = [self.texts[i] for i in going]


def cache_bytes(model: LanguageModel, tokens: int) -> int:
    """Bytes of a cache that a text of so many tokens takes at the most, all layers together."""
    config = model.config
    each = 2 * config.head_dim * max(model.dtype.itemsize, 2)
    total = 0
    for layer, kind in enumerate(config.layer_types or ()):
        left = config.reach(kind).left
        heads = config.num_attention_heads - len(config.pruned_heads.get(layer, []))
        total += each * heads * (tokens if left is None else min(tokens, left + 1))
    return total
