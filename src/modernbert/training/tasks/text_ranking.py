"""Scores of documents for a query, read together: a cross-encoder."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modernbert.auto import AutoModelForSequenceClassification
from modernbert.errors import InputError
from modernbert.io.tables.columns import Field
from modernbert.training.contract import Batch, Evaluation, Pass, summed
from modernbert.training.examples import Example
from modernbert.training.tasks.base import Task, texts_in, worst
from modernbert.training.tasks.data import Row, text_of
from modernbert.training.tasks.distillation import SCORES, check_scores, distilled
from modernbert.training.tasks.labels import Labels, number_of
from modernbert.training.tasks.metrics import retrieval_metrics


class TextRanking(Task):
    """One score for each pair, trained as the probability that the document answers the query.

    Rows hold a query, a document and a label from 0 to 1; or a query, the right document and perhaps wrong ones; if
    a row has none, the documents of some other rows are taken as wrong. Or the logits of a row's documents learn a
    teacher's scores; an example is then a query with all its documents.

    Source: cross-encoders, arXiv:1901.04085.
    """

    name = "text-ranking"
    auto_model = AutoModelForSequenceClassification
    fields = (
        Field("query", ("question", "anchor", "sentence1", "text")),
        Field("document", ("positive", "passage", "answer", "context", "sentence2")),
        Field("label", ("relevance", "score", "target"), required=False),
        Field("negatives", ("negative", "neg", "hard_negatives"), required=False, many=True),
        SCORES,
    )
    ranked = ("query", "document")
    metric = "mrr"
    group_field = "query"

    def fit_labels(self, rows: Sequence[Row]) -> None:
        """Rows are pairs with labels if one of them has a label."""
        self.labelled = any("label" in row.values for row in rows)
        if self.labelled and self.options.is_distilled:
            raise InputError(f"loss is {self.options.loss}, and the rows have labels; give each query its negatives")

    def config_changes(self) -> dict[str, Any]:
        """One score, the logit of a probability."""
        return {**Labels.unnamed(1).config_changes(), "problem_type": "multi_label_classification"}

    def prepare(self, rows: Sequence[Row], training: bool) -> list[Example]:
        """An example for each pair, or in distillation for each row."""
        if training and self.options.is_distilled:
            return self._prepare_rows(rows)
        pairs: list[tuple[str, str, float]] = []
        draw = random.Random(0)
        pool = sorted({text_of(row, "document") for row in rows})
        for row in rows:
            query, document = text_of(row, "query"), text_of(row, "document")
            if self.labelled:
                pairs.append((query, document, _probability(row)))
                continue
            wrong = texts_in(row, "negatives")
            if not wrong:
                drawn = draw.sample(pool, min(len(pool), self.options.negatives + 1))
                wrong = [text for text in drawn if text != document][: self.options.negatives]
            pairs += [(query, document, 1.0), *((query, text, 0.0) for text in wrong)]
        encodings = self.encode([query for query, _, _ in pairs], [document for _, document, _ in pairs])
        return [
            Example([encoding.ids], label, {"query": query, "document": document})
            for encoding, (query, document, label) in zip(encodings, pairs, strict=True)
        ]

    def _prepare_rows(self, rows: Sequence[Row]) -> list[Example]:
        """Each of a query with all its documents; labels are the teacher's scores."""
        examples = []
        for row in rows:
            query, documents = text_of(row, "query"), [text_of(row, "document"), *texts_in(row, "negatives")]
            scores = check_scores(row, len(documents))
            ids = [encoding.ids for encoding in self.encode([query] * len(documents), documents)]
            examples.append(Example(ids, scores, {"query": query, "document": documents[0]}))
        return examples

    def labels(self, examples: Sequence[Example]) -> Batch:
        """(B, 1) probabilities; in distillation the teacher's scores and their numbers, (B,) and (queries,)."""
        if self.options.is_distilled:
            sizes = torch.tensor([len(example.label) for example in examples])
            return {"scores": torch.tensor([n for example in examples for n in example.label]), "sizes": sizes}
        return {"labels": torch.tensor([[example.label] for example in examples], dtype=torch.float32)}

    def count(self, batch: Batch) -> float:
        return float(len(batch["sizes"])) if self.options.is_distilled else super().count(batch)

    def losses(self, model: nn.Module, batches: Sequence[Batch], total: float, one_pass: Pass) -> Tensor:
        if not self.options.is_distilled:
            return super().losses(model, batches, total, one_pass)
        return summed(model, batches, total, one_pass, self._distilled_loss)

    def _distilled_loss(self, model: nn.Module, batch: Batch, total: float) -> Tensor:
        sizes = batch["sizes"].tolist()
        logits = model(input_ids=batch["input_ids"], cu_seqlens=batch["cu_seqlens"]).logits.float()[:, 0]
        return distilled(self.options.loss, logits.split(sizes), batch["scores"].split(sizes), total)

    def answers(self, output: Any) -> Tensor:
        return super().answers(output)[:, 0].sigmoid()

    def evaluate_on(self, model: Any, examples: Sequence[Example]) -> Evaluation:
        """The rank of each query's best document among its candidates."""
        scores = torch.cat(self.outputs(model, examples)).tolist()
        queries: dict[str, list[int]] = {}
        predictions, right = [], 0
        for i, (example, score) in enumerate(zip(examples, scores, strict=True)):
            queries.setdefault(example.record["query"], []).append(i)
            predictions.append({**example.record, "label": example.label, "score": score})
            right += (score > 0.5) == (example.label > 0.5)
        ranks, chances, wrong = [], [], []
        for query, rows in queries.items():
            right_one = max(rows, key=lambda i: (examples[i].label, scores[i]))
            first = max(rows, key=lambda i: scores[i])
            others = [i for i in rows if examples[i].label < examples[right_one].label]
            if not others:
                continue  # all are as good
            rank = 1 + sum(not scores[i] < scores[right_one] for i in others)
            ranks.append(rank)
            chances.append(sum(1 / place for place in range(1, len(others) + 2)) / (1 + len(others)))
            if rank > 1:
                document, found = (examples[i].record["document"] for i in (right_one, first))
                row = {"query": query, "document": document, "found": found, "rank": rank}
                wrong.append((scores[first] - scores[right_one], row))
        metrics = {"accuracy": right / len(examples)}
        if ranks:
            metrics |= {**retrieval_metrics(ranks), "chance_mrr": sum(chances) / len(chances)}
        else:  # pairs without rivals are classified, not ranked
            self.metric = "accuracy"
        return Evaluation(metrics, errors=worst(wrong), predictions=predictions)


def _probability(row: Row) -> float:
    given = row.values.get("label")
    if given is None:
        raise InputError(f"{row.where} has no label, and other rows have one; give every row a label, or none")
    label = number_of(given)
    if label is None or not 0 <= label <= 1:
        raise InputError(f"{row.where} has the label {given!r}; it must lie in [0, 1]")
    return label
