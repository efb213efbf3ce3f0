"""Tokens of raw text: those behind the mask, or the next ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modernbert.auto import AutoModelForCausalLM, AutoModelForMaskedLM
from modernbert.finetuning.data import Field, Row, text_of
from modernbert.finetuning.tasks.base import Task
from modernbert.models.masked_lm import ModernBertForMaskedLM
from modernbert.tokenizer import Tokenizer
from modernbert.training.contract import Batch, Evaluation, Pass
from modernbert.training.data import Corpus
from modernbert.training.examples import Example, pack_rows
from modernbert.training.objectives import CausalLM, MaskedLM
from modernbert.training.objectives import Objective as LanguageObjective


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
        corpus = Corpus.from_documents(documents, self.tokenizer.backend, self.max_length, seed=0)
        if not training:
            self.corpus = corpus
        starts = corpus.starts
        pieces = [corpus.tokens[starts[i] : starts[i + 1]].tolist() for i in range(len(corpus))]
        self.notes.append(f"{len(documents)} texts make {len(pieces)} pieces, {len(corpus.tokens)} tokens")
        return [Example([ids], None, {"text": self.tokenizer.decode(ids[:20])}) for ids in pieces]

    def labels(self, examples: Sequence[Example]) -> Batch:
        """Made by `collate`, which draws them."""
        return {}

    def collate(self, examples: Sequence[Example], generator: torch.Generator) -> Batch:
        """A packed batch; what is hidden is drawn anew each time."""
        batch: Batch = pack_rows([row for example in examples for row in example.rows])
        batch["input_ids"], batch["labels"] = self.learnt(batch["input_ids"], generator)
        return batch

    def judge(self, model: Any, examples: Sequence[Example]) -> Evaluation:
        """Loss in nats a token, perplexity, and the share of tokens that are the model's first guess."""
        score = self.judged.evaluate(model, self.corpus, seed=0)
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

    def losses(self, model: nn.Module, batches: Sequence[Batch], total: float, one_pass: Pass) -> Tensor:
        """As always, without logits for tokens that have no label."""
        bare = next(module for module in model.modules() if isinstance(module, ModernBertForMaskedLM))
        own = bare.config
        bare.config = own.replace(sparse_prediction=True)
        try:
            return super().losses(model, batches, total, one_pass)
        finally:
            bare.config = own


class CausalLanguageModelling(LanguageModelling):
    """The next token, by a decoder."""

    name = "causal-lm"
    auto_model = AutoModelForCausalLM

    def use(self, tokenizer: Tokenizer, context: int) -> None:
        """Texts begin and end with the tokenizer's special tokens."""
        super().use(tokenizer, context)
        self.learnt = self.judged = CausalLM(tokenizer.backend)
