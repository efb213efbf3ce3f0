"""Token batches for language modelling: texts of any length, packed to a token budget.

Shapes: B texts of a batch, T tokens of all of them together.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from modernbert.errors import InputError
from modernbert.training.text import pieces

# Ids (T,) to what the model reads and what it should say, both (T,); -100 where nothing.
Labelling = Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]]
_ENCODED_AT_ONCE = 2048  # texts handed to the tokenizer's threads together


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokenized texts, end to end: text i is `tokens[starts[i]:starts[i + 1]]`, special tokens included."""

    tokens: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each text."""
        return np.diff(self.starts)

    @classmethod
    def from_documents(cls, documents: Sequence[str], tokenizer: Tokenizer, max_length: int, seed: int) -> Corpus:
        """Cut documents into texts of at most `max_length` tokens and tokenize them.

        Args:
            documents: raw text.
            tokenizer: gives ids without special tokens; `[CLS]` and `[SEP]` are put around each text here.
            max_length: longest text in tokens, the two special ones included.
            seed: of the lengths that documents are cut to.
        """
        rng = random.Random(seed)
        cls_id, sep_id = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
        if cls_id is None or sep_id is None:
            raise InputError("the tokenizer has no [CLS] or no [SEP]; `modernbert train-tokenizer` makes one that does")
        if max_length < 3:
            raise InputError(f"max_length is {max_length}; [CLS], [SEP] and a token between them need 3")
        room = max_length - 2
        parts: list[npt.NDArray[np.int32]] = []

        def flush(texts: list[str]) -> None:
            for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                ids = encoding.ids
                for i in range(0, len(ids), room):
                    parts.append(np.array([cls_id, *ids[i : i + room], sep_id], dtype=np.int32))

        waiting: list[str] = []
        for document in documents:
            for text in pieces(document, room, rng):
                waiting.append(text)
                if len(waiting) == _ENCODED_AT_ONCE:
                    flush(waiting)
                    waiting = []
        flush(waiting)
        starts = np.zeros(len(parts) + 1, dtype=np.int64)
        np.cumsum([len(p) for p in parts], out=starts[1:])
        return cls(np.concatenate(parts) if parts else np.zeros(0, np.int32), starts)


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """One packed batch.

    Attributes:
        input_ids: (T,) ids, as the model reads them.
        labels: (T,) the true ids where there is something to predict, -100 elsewhere.
        cu_seqlens: (B + 1,) int32.
        number: its place in the stream, from 0.
    """

    input_ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    number: int


def batch_order(lengths: npt.NDArray[np.int64], budget: int, seed: int) -> list[npt.NDArray[np.int64]]:
    """Shuffle texts and fill batches up to `budget` tokens, in one pass; every text is in exactly one batch."""
    order = np.random.default_rng(seed).permutation(len(lengths))
    ends = np.cumsum(lengths[order])
    batches, first = [], 0
    while first < len(order):
        done = ends[first - 1] if first else 0
        last = max(int(np.searchsorted(ends, done + budget, side="right")), first + 1)
        batches.append(order[first:last])
        first = last
    return batches


def token_batches(
    corpus: Corpus, labelling: Labelling, budget: int, seed: int, start: int = 0, epochs: float = math.inf
) -> Iterator[TokenBatch]:
    """Packed batches with labels, shuffled anew in each epoch.

    A batch depends on the seed and its number alone, so that a run goes on where it stopped.

    Args:
        corpus: the texts.
        labelling: what the model reads and what it should say, such as an objective.
        budget: tokens a batch.
        seed: of order and masks.
        start: number of the first batch to give.
        epochs: passes over the corpus.
    """
    if not len(corpus):
        raise ValueError("the corpus holds no text")
    lengths, epoch, number = corpus.lengths, 0, 0
    while epoch < epochs:
        for texts in batch_order(lengths, budget, seed * 1_000_003 + epoch):
            if number >= start:
                ids = np.concatenate([corpus.tokens[corpus.starts[i] : corpus.starts[i + 1]] for i in texts])
                generator = torch.Generator().manual_seed(seed * 1_000_000_007 + number)
                input_ids, labels = labelling(torch.from_numpy(ids).long(), generator)
                starts = np.concatenate([[0], np.cumsum(lengths[texts])]).astype(np.int32)
                yield TokenBatch(input_ids, labels, torch.from_numpy(starts), number)
            number += 1
        epoch += 1
