"""Tokens of raw text: the masked ones, or the next ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from modernbert.auto import AutoModelForCausalLM, AutoModelForMaskedLM
from modernbert.io.tables.columns import Field
from modernbert.text.tokenizer import Tokenizer
from modernbert.training.contract import Batch, Evaluation
from modernbert.training.examples import Example
from modernbert.training.pretraining.objectives import CausalLM, LanguageObjective, MaskedLM
from modernbert.training.pretraining.texts import Cutter
from modernbert.training.tasks.base import Task
from modernbert.training.tasks.data import Row, text_of


class LanguageModelling(Task):
    """The base of both: texts are cut where sentences end, into pieces that the context holds; nothing is lost."""

    fields = (Field("text", ("content", "document", "article", "sentence", "body")),)
    metric = "loss"
    greater_is_better = False
    trained: LanguageObjective
    evaluated: LanguageObjective

    def prepare(self, rows: Sequence[Row], training: bool) -> list[Example]:
        documents = [text_of(row, "text") for row in rows]
        texts = Cutter(self.tokenizer.backend, self.max_length, short=0.5).texts(documents)
        pieces = [ids.tolist() for some in texts for ids in some]
        self.notes.append(f"{len(documents)} texts make {len(pieces)} pieces, {sum(map(len, pieces))} tokens")
        return [Example([ids], None, {"text": self.tokenizer.decode(ids[:20])}) for ids in pieces]

    def collate(self, examples: Sequence[Example], seeds: Sequence[int]) -> Batch:
        return self.trained.batch([row for example in examples for row in example.rows], seeds)

    def evaluate_on(self, model: Any, examples: Sequence[Example]) -> Evaluation:
        """Loss in nats a token, perplexity, and the share of tokens that the model predicts first."""
        score = self.evaluated.evaluate(model, (example.rows[0] for example in examples))
        perplexity = math.exp(min(score.loss, 700))
        return Evaluation({"loss": score.loss, "perplexity": perplexity, "accuracy": score.top1})


class MaskedLanguageModelling(LanguageModelling):
    """Masked tokens. Evaluations mask 15 % of them whatever the rate of training, so that runs can be compared."""

    name = "masked-lm"
    auto_model = AutoModelForMaskedLM

    def set_tokenizer(self, tokenizer: Tokenizer, context: int) -> None:
        super().set_tokenizer(tokenizer, context)
        self.trained = MaskedLM(tokenizer.backend, self.options.mask_rate)
        self.evaluated = MaskedLM(tokenizer.backend, 0.15)


class CausalLanguageModelling(LanguageModelling):
    """The next token, by a decoder."""

    name = "causal-lm"
    auto_model = AutoModelForCausalLM

    def set_tokenizer(self, tokenizer: Tokenizer, context: int) -> None:
        super().set_tokenizer(tokenizer, context)
        self.trained = self.evaluated = CausalLM(tokenizer.backend)
