"""Scores of documents for a query, read together: a cross-encoder."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from modernbert.auto import AutoModelForSequenceClassification
from modernbert.errors import InputError
from modernbert.io.tables.columns import Field
from modernbert.training.contract import Batch, Evaluation
from modernbert.training.examples import Example
from modernbert.training.tasks.base import Task, shown, worst
from modernbert.training.tasks.data import Row, text_of
from modernbert.training.tasks.metrics import retrieval_figures


class TextRanking(Task):
    """One score a pair, trained as the probability that the document answers the query.

    Rows hold a query, a document and a label from 0 to 1; or a query, the right document and perhaps wrong ones, beside
    which the documents of some other rows are taken as wrong.

    Source: cross-encoders, arXiv:1901.04085.
    """

    name = "text-ranking"
    auto_model = AutoModelForSequenceClassification
    fields = (
        Field("query", ("question", "anchor", "sentence1", "text")),
        Field("document", ("positive", "passage", "answer", "context", "sentence2")),
        Field("label", ("relevance", "score", "target"), required=False),
        Field("negatives", ("negative", "neg", "hard_negatives"), required=False, many=True),
    )
    metric = "mrr"
    group_field = "query"

    def learn(self, rows: Sequence[Row]) -> None:
        """Whether rows are pairs with labels."""
        self.labelled = any("label" in row.values for row in rows)

    def config_changes(self) -> dict[str, Any]:
        """One score, as a probability's logit."""
        return {
            "num_labels": 1,
            "problem_type": "multi_label_classification",
            "id2label": {0: "LABEL_0"},
            "label2id": {"LABEL_0": 0},
        }

    def prepare(self, rows: Sequence[Row], training: bool) -> list[Example]:
        """An example a pair; the record says which query it is of."""
        pairs: list[tuple[str, str, float]] = []
        draw = random.Random(0)
        pool = sorted({text_of(row, "document") for row in rows})
        for row in rows:
            query, document = text_of(row, "query"), text_of(row, "document")
            if self.labelled:
                pairs.append((query, document, _share(row)))
                continue
            wrong = list(row.values.get("negatives") or [])
            if not wrong:
                drawn = draw.sample(pool, min(len(pool), self.options.negatives + 1))
                wrong = [text for text in drawn if text != document][: self.options.negatives]
            if not all(isinstance(text, str) and text.strip() for text in wrong):
                raise InputError(f"{row.where} has the negatives {wrong!r}; texts are wanted")
            pairs += [(query, document, 1.0), *((query, text, 0.0) for text in wrong)]
        ids = self.encode([query for query, _, _ in pairs], [document for _, document, _ in pairs])
        return [
            Example([row], label, {"query": query, "document": document})
            for row, (query, document, label) in zip(ids, pairs, strict=True)
        ]

    def labels(self, examples: Sequence[Example]) -> Batch:
        """(B, 1) probabilities."""
        return {"labels": torch.tensor([[example.label] for example in examples], dtype=torch.float32)}

    def count(self, batch: Batch) -> float:
        """Pairs of a batch."""
        return float(len(batch["labels"]))

    def judge(self, model: Any, examples: Sequence[Example]) -> Evaluation:
        """The rank of each query's best document among its candidates."""
        scores = [0.0] * len(examples)
        for chosen, out in self.outputs(model, examples):
            for i, score in zip(chosen, out.logits[:, 0].sigmoid().tolist(), strict=True):
                scores[i] = score
        queries: dict[str, list[int]] = {}
        for i, example in enumerate(examples):
            queries.setdefault(example.record["query"], []).append(i)
        ranks, wrong, sizes = [], [], []
        for query, rows in queries.items():
            top = max(examples[i].label for i in rows)
            best = max((i for i in rows if examples[i].label == top), key=scores.__getitem__)
            others = [i for i in rows if examples[i].label < top]
            if not others:
                continue  # all are as good
            ranks.append(1 + sum(not scores[i] < scores[best] for i in others))
            sizes.append(1 + len(others))
            first = max(rows, key=scores.__getitem__)
            if ranks[-1] > 1:
                row = {"query": shown(query), "document": shown(examples[best].record["document"])}
                found = {"found": shown(examples[first].record["document"]), "rank": ranks[-1]}
                wrong.append((scores[first] - scores[best], {**row, **found}))
        right = [(score > 0.5) == (example.label > 0.5) for score, example in zip(scores, examples, strict=True)]
        figures = {"accuracy": sum(right) / len(right)}
        if ranks:
            chance = sum(sum(1 / r for r in range(1, n + 1)) / n for n in sizes) / len(sizes)
            figures |= {**retrieval_figures(ranks), "chance_mrr": chance}
        else:  # pairs without rivals are classified, not ranked
            self.metric = "accuracy"
        predictions = [
            {**example.record, "label": example.label, "score": score}
            for example, score in zip(examples, scores, strict=True)
        ]
        return Evaluation(figures, errors=worst(wrong), predictions=predictions)


def _share(row: Row) -> float:
    given = row.values.get("label")
    if given is None:
        raise InputError(f"{row.where} has no label, and other rows have; give all of them one, or none")
    try:
        label = float(given)
    except (TypeError, ValueError):
        label = -1.0
    if not 0 <= label <= 1:
        raise InputError(f"{row.where} has the label {given!r}; it must lie in [0, 1]")
    return label
