"""What a language model is trained for: its input, its labels, and how well it predicts them.

Shapes: T tokens of a packed batch, V vocabulary.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from tokenizers import Tokenizer, processors
from torch import Tensor

from modernbert.errors import InputError
from modernbert.models.decoder import ModernBertDecoderForCausalLM
from modernbert.models.heads import ModernBertForMaskedLM
from modernbert.nn.losses import IGNORED
from modernbert.training.contract import Batch
from modernbert.training.examples import moved, pack_rows
from modernbert.training.pretraining.texts import Ids
from modernbert.training.pretraining.train_tokenizer import SPECIALS

LanguageModel = ModernBertForMaskedLM | ModernBertDecoderForCausalLM
_LOGITS = 1 << 27  # numbers that the logits of a pass of an evaluation may have
_ROWS = 4096  # of logits that are compared with the labels together


@dataclasses.dataclass(frozen=True)
class Score:
    """Prediction of tokens of held-out text: mean loss in nats, and shares of the predicted tokens."""

    loss: float
    top1: float
    top5: float
    tokens: int

    @classmethod
    def mean(cls, scores: Sequence[Score]) -> Score:
        """Every token weighs the same."""
        tokens = sum(score.tokens for score in scores)
        loss, top1, top5 = (
            sum(getattr(score, name) * score.tokens for score in scores) / tokens for name in ("loss", "top1", "top5")
        )
        return cls(loss, top1, top5, tokens)


class LanguageObjective(abc.ABC):
    """One way to train a language model.

    Args:
        tokenizer: of the texts; it has `[CLS]`, `[SEP]`, `[PAD]` and `[MASK]`.

    Raises:
        InputError: it lacks one of them.
    """

    model_class: ClassVar[type[LanguageModel]]
    logits: ClassVar[dict[str, Any]] = {}  # arguments of the model that name the logits it needs

    def __init__(self, tokenizer: Tokenizer) -> None:
        ids = {token: tokenizer.token_to_id(token) for token in SPECIALS}
        for token in ("[CLS]", "[SEP]", "[PAD]", "[MASK]"):
            if ids[token] is None:
                raise InputError(f"the tokenizer has no {token}; `modernbert train-tokenizer` makes one that does")
        self.special_ids = {token: i for token, i in ids.items() if i is not None}

    def batch(self, texts: Sequence[Ids], seeds: Sequence[int]) -> Batch:
        """A packed batch with labels, (T,), -100 where there is nothing to predict.

        Args:
            texts: ids of each.
            seeds: of each, for what is drawn at random.
        """
        packed = pack_rows(texts)
        parts = packed["input_ids"].split(packed["cu_seqlens"].diff().tolist())
        inputs, labels = zip(*map(self.label, parts, seeds), strict=True)
        return {**packed, "input_ids": torch.cat(inputs), "labels": torch.cat(labels), **self.logits}

    @abc.abstractmethod
    def label(self, ids_T: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Of the ids of one text, (T,): the model's input and its labels, both (T,)."""

    @abc.abstractmethod
    def targets(self, labels_T: Tensor) -> Tensor:
        """The right token of each row of the logits, (rows,)."""

    def count(self, batch: Batch) -> float:
        return float((batch["labels"] != IGNORED).sum())

    @abc.abstractmethod
    def finish_tokenizer(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer to save beside the model, which frames texts as they were trained on."""

    def _framed(self, tokenizer: Tokenizer, single: str, pair: str) -> Tokenizer:
        copy = Tokenizer.from_str(tokenizer.to_str())
        specials = [(t, self.special_ids[t]) for t in ("[CLS]", "[SEP]")]
        copy.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=specials)
        return copy

    @torch.no_grad()
    def evaluate(
        self,
        model: Any,
        texts: Iterable[Ids],
        *,
        budget: int = 16384,
        seed: int = 0,
        max_tokens: int | None = None,
    ) -> Score:
        """Predict tokens of texts.

        Args:
            model: in any mode, which it keeps.
            texts: ids of each.
            budget: tokens of a forward pass, at most; fewer where the vocabulary is large.
            seed: of the masks.
            max_tokens: stop after about this many tokens of text; None reads all.

        Raises:
            InputError: there is nothing to predict.
        """
        training, device = model.training, next(model.parameters()).device
        budget = min(budget, max(1, _LOGITS // model.config.vocab_size))
        model.eval()
        loss, top1, top5, count, read, first = 0.0, 0, 0, 0, 0, 0
        for some in _passes(texts, budget):
            batch = self.batch(some, range(seed * 1_000_003 + first, seed * 1_000_003 + first + len(some)))
            first, read = first + len(some), read + len(batch["input_ids"])
            if self.count(batch):
                batch = moved(batch, device)
                out = model(**batch, num_items_in_batch=1)
                loss += float(out.loss)
                targets = self.targets(batch["labels"])
                for rows, truth in zip(out.logits.split(_ROWS), targets.split(_ROWS), strict=True):
                    right = rows.topk(5, dim=-1).indices == truth[:, None]
                    top1, top5 = top1 + int(right[:, 0].sum()), top5 + int(right.sum())
                    count += int((truth != IGNORED).sum())
            if max_tokens is not None and read >= max_tokens:
                break
        model.train(training)
        if not count:
            raise InputError("the held-out text is too short to predict anything in")
        return Score(loss / count, top1 / count, top5 / count, count)


class MaskedLM(LanguageObjective):
    """Predict tokens behind the mask.

    All chosen tokens become the mask: BERT's leaving some as they are and replacing others at random does not help
    (arXiv:2202.08005).

    Args:
        tokenizer: of the texts.
        mask_rate: share of the tokens to predict; special ones are never hidden.
    """

    model_class = ModernBertForMaskedLM
    logits: ClassVar[dict[str, Any]] = {"sparse_prediction": True}

    def __init__(self, tokenizer: Tokenizer, mask_rate: float) -> None:
        super().__init__(tokenizer)
        self.mask_rate = mask_rate
        self.special = torch.tensor(list(self.special_ids.values()))

    def label(self, ids_T: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        chosen = (torch.rand(ids_T.shape, generator=generator) < self.mask_rate) & ~torch.isin(ids_T, self.special)
        return ids_T.masked_fill(chosen, self.special_ids["[MASK]"]), ids_T.masked_fill(~chosen, IGNORED)

    def targets(self, labels_T: Tensor) -> Tensor:
        return labels_T[labels_T != IGNORED]

    def finish_tokenizer(self, tokenizer: Tokenizer) -> Tokenizer:
        return self._framed(tokenizer, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:0 [SEP]")


class CausalLM(LanguageObjective):
    """Predict the next token."""

    model_class = ModernBertDecoderForCausalLM

    def label(self, ids_T: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        labels_T = ids_T.clone()
        labels_T[:1] = IGNORED  # nothing comes before it
        return ids_T, labels_T

    def targets(self, labels_T: Tensor) -> Tensor:
        return torch.cat([labels_T[1:], labels_T.new_full((1,), IGNORED)])

    def finish_tokenizer(self, tokenizer: Tokenizer) -> Tokenizer:
        """A prompt is to be continued: texts begin with `[CLS]` and have no `[SEP]` at their end."""
        return self._framed(tokenizer, "[CLS] $A", "[CLS] $A [SEP] $B:0")


def make_objective(name: str, tokenizer: Tokenizer, mask_rate: float) -> LanguageObjective:
    """The objective of this name: "mlm", which hides a share of the tokens, or "clm"."""
    return MaskedLM(tokenizer, mask_rate) if name == "mlm" else CausalLM(tokenizer)


def _passes(texts: Iterable[Ids], budget: int) -> Iterator[list[Ids]]:
    """Consecutive texts of at most `budget` tokens; a longer one is a pass by itself."""
    some: list[Ids] = []
    filled = 0
    for text in texts:
        if some and filled + len(text) > budget:
            yield some
            some, filled = [], 0
        some.append(text)
        filled += len(text)
    if some:
        yield some
