"""Tokens of raw text: those behind the mask, or the next ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from modernbert.auto import AutoModelForCausalLM, AutoModelForMaskedLM
from modernbert.text.tokenizer import Tokenizer
from modernbert.training.contract import Batch, Evaluation
from modernbert.training.examples import Example
from modernbert.training.pretrain.objectives import CausalLM, LanguageObjective, MaskedLM
from modernbert.training.pretrain.texts import Cutter
from modernbert.training.tasks.base import Task
from modernbert.training.tasks.data import Field, Row, text_of


class LanguageModelling(Task):
    """What both kinds share: texts are cut where sentences end into pieces that the context holds; nothing is lost."""

    fields = (Field("text", ("content", "document", "article", "sentence", "body")),)
    metric = "loss"
    greater_is_better = False
    learnt: LanguageObjective
    judged: LanguageObjective

    def prepare(self, rows: Sequence[Row], training: bool) -> list[Example]:
        """An example a piece."""
        documents = [text_of(row, "text") for row in rows]
        texts = Cutter(self.tokenizer.backend, self.max_length, short=0.5).texts(documents)
        pieces = [ids.tolist() for some in texts for ids in some]
        self.notes.append(f"{len(documents)} texts make {len(pieces)} pieces, {sum(map(len, pieces))} tokens")
        return [Example([ids], None, {"text": self.tokenizer.decode(ids[:20])}) for ids in pieces]

    def labels(self, examples: Sequence[Example]) -> Batch:
        """Made by `collate`, which draws them."""
        return {}

    def collate(self, examples: Sequence[Example], seeds: Sequence[int]) -> Batch:
        """A packed batch; what is hidden is drawn anew each time."""
        return self.learnt.batch([row for example in examples for row in example.rows], seeds)

    def judge(self, model: Any, examples: Sequence[Example]) -> Evaluation:
        """Loss in nats a token, perplexity, and the share of tokens that are the model's first guess."""
        score = self.judged.evaluate(model, (example.rows[0] for example in examples))
        figures = {"loss": score.loss, "perplexity": math.exp(min(score.loss, 700)), "accuracy": score.top1}
        return Evaluation(figures)


class MaskedLanguageModelling(LanguageModelling):
    """Tokens behind the mask. Evaluations hide 15 % whatever the training's rate, so that runs can be compared."""

    name = "masked-lm"
    auto_model = AutoModelForMaskedLM

    def use(self, tokenizer: Tokenizer, context: int) -> None:
        """Masks need the tokenizer's special tokens."""
        super().use(tokenizer, context)
        self.learnt = MaskedLM(tokenizer.backend, self.options.mask_rate)
        self.judged = MaskedLM(tokenizer.backend, 0.15)


class CausalLanguageModelling(LanguageModelling):
    """The next token, by a decoder."""

    name = "causal-lm"
    auto_model = AutoModelForCausalLM

    def use(self, tokenizer: Tokenizer, context: int) -> None:
        """Texts begin and end with the tokenizer's special tokens."""
        super().use(tokenizer, context)
        self.learnt = self.judged = CausalLM(tokenizer.backend)
