"""Documents to texts of tokens that a context holds: cut where sentences or words end, nothing truncated."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import math
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, pre_tokenizers

from modernbert.errors import InputError

Ids = npt.NDArray[np.integer]
# The end of a sentence or of a line; what begins behind it begins with the white space there.
_END = re.compile(r"[.!?][\"'\u201d\u2019)\]]*(?=\s)|[\u3002\uff01\uff1f]+|(?<!\n)(?=\n)")
_CHARACTERS_A_TOKEN = 4  # a guess: how finely documents are split before their tokens are counted
_SPARE = 2  # tokens that a text's first word may have more of without the space before it
_FULL = 0.99  # of the context: a text that is filled less goes on to the end of a word
_CHARACTERS_TOGETHER = 1 << 19  # what a thread encodes at once


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokenized texts, end to end: text i is `tokens[starts[i]:starts[i + 1]]`, special tokens included."""

    tokens: Ids
    starts: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, i: int) -> Ids:
        return self.tokens[self.starts[i] : self.starts[i + 1]]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.diff(self.starts)

    @classmethod
    def of(cls, texts: Sequence[Ids]) -> Corpus:
        starts = np.zeros(len(texts) + 1, dtype=np.int64)
        np.cumsum([len(text) for text in texts], out=starts[1:])
        return cls(np.concatenate(texts) if len(texts) else np.zeros(0, np.int32), starts)


@dataclasses.dataclass(frozen=True)
class Cutter:
    """Cuts documents into texts and tokenizes them.

    A text is as long as the context holds, but for the last of a document: it ends with a sentence where that fills
    it, else with a word. `short` of the texts are cut sooner, to any length from a sentence on, so that a model knows
    short texts too. The lengths depend on the seed and the document's number alone.

    Args:
        tokenizer: gives ids without special tokens; `[CLS]` and `[SEP]` are put around each text here.
        max_length: longest text in tokens, the two special ones included.
        short: share of the texts that are cut sooner.
        seed: seed of their lengths.

    Raises:
        InputError: the tokenizer lacks a token, or an argument is impossible.
    """

    tokenizer: Tokenizer
    max_length: int
    short: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if None in self._around():
            raise InputError("the tokenizer has no [CLS] or no [SEP]; `modernbert train-tokenizer` makes one that does")
        if self.max_length < 3 + _SPARE:
            raise InputError(f"max_length is {self.max_length}; it must be at least {3 + _SPARE}")
        if not 0 <= self.short <= 1:
            raise InputError(f"short is {self.short}, a share of the texts; it must lie in [0, 1]")

    def _around(self) -> tuple[int | None, int | None]:
        return self.tokenizer.token_to_id("[CLS]"), self.tokenizer.token_to_id("[SEP]")

    def cut(self, documents: Sequence[str], first: int = 0) -> list[list[Ids]]:
        """The texts of each document, (tokens,) int32 arrays; `first` is the number of the first document."""
        room = self.max_length - 2
        least = 1 if self.short else self.max_length * _CHARACTERS_A_TOKEN // 16  # sentences, or more in long texts
        units = [split(document.strip(), least) for document in documents]
        counts = iter(self._encode([unit for some in units for unit in some]))
        planned: list[list[list[Ids]]] = []  # texts of each document, as lists of units
        heads: list[str] = []
        for number, some in enumerate(units, first):
            texts: list[list[Ids]] = []
            rng = random.Random(self.seed * 1_000_003 + number)
            filled = target = 0
            for unit in some:
                ids = next(counts)
                if texts and filled + len(ids) > target > _FULL * room > filled:
                    fits = self._words(ids, target - filled)
                    if fits:
                        texts[-1].append(ids[:fits])
                        ids, filled = ids[fits:], target
                        unit = self.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
                if not texts or filled + len(ids) > target:
                    texts.append([])
                    heads.append(unit.lstrip())
                    filled, target = 0, self._target(rng, room - _SPARE)
                texts[-1].append(ids)
                filled += len(ids)
            planned.append(texts)
        beginnings = iter(self._encode(heads))  # a text does not begin with white space
        before, behind = (np.array([i], dtype=np.int32) for i in self._around())
        cut: list[list[Ids]] = []
        for texts in planned:
            cut.append([])
            for parts in texts:
                ids = np.concatenate([next(beginnings), *parts[1:]])
                while len(ids) > room:  # a sentence may be longer than the context
                    fits = self._words(ids, room) or room
                    cut[-1].append(np.concatenate([before, ids[:fits], behind]))
                    ids = ids[fits:]
                cut[-1].append(np.concatenate([before, ids, behind]))
        return cut

    def texts(self, documents: Iterable[str]) -> Iterator[list[Ids]]:
        """The texts of each document, in order; documents are tokenized on all cores."""
        workers = min(4, os.cpu_count() or 1)  # each hands the tokenizer's own threads work while others prepare it
        waiting: collections.deque[concurrent.futures.Future[list[list[Ids]]]] = collections.deque()
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            for first, some in _together(documents):
                waiting.append(pool.submit(self.cut, some, first))
                if len(waiting) > workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()

    def corpus(self, documents: Iterable[str]) -> Corpus:
        return Corpus.of([text for texts in self.texts(documents) for text in texts])

    def _words(self, ids: Ids, room: int) -> int:
        """How many of the first tokens are whole words and fit."""
        starts = np.flatnonzero(self._begins_word[ids[: room + 1]])
        return int(starts[-1]) if len(starts) else 0

    @functools.cached_property
    def _begins_word(self) -> npt.NDArray[np.bool_]:
        """Whether each id begins with the white space before a word, as byte-level tokens write it."""
        marks = tuple(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(c)[0][0]
                      for c in " \n\t\r")  # fmt: skip
        tokens = (self.tokenizer.id_to_token(i) or "" for i in range(self.tokenizer.get_vocab_size()))
        return np.array([token.startswith(marks) for token in tokens])

    def _target(self, rng: random.Random, room: int) -> int:
        if not self.short or rng.random() >= self.short:
            return room
        return int(math.exp(rng.uniform(0, math.log(room))))

    def _encode(self, texts: list[str]) -> list[Ids]:
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encoded]


def split(document: str, least: int) -> list[str]:
    """Cut a text at the ends of sentences or lines, into pieces of at least `least` characters that join to the text.

    White space stays at the beginning of pieces, where tokenizers that split words from each other leave it, so that
    the tokens of the pieces are those of the whole.
    """
    pieces, start, look = [], 0, least
    while match := _END.search(document, look):
        end = match.end()
        if end - start >= least and document[start:end].strip():
            pieces.append(document[start:end])
            start, look = end, end + least
        else:
            look = end + 1
    if start < len(document):
        pieces.append(document[start:])
    return pieces


def _together(documents: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Consecutive documents of about equal work, and the number of the first."""
    first, some, size = 0, [], 0
    for document in documents:
        some.append(document)
        size += len(document)
        if size >= _CHARACTERS_TOGETHER:
            yield first, some
            first, some, size = first + len(some), [], 0
    if some:
        yield first, some
