"""Classes or values of whole texts, or of pairs of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from modernbert.auto import AutoModelForSequenceClassification
from modernbert.config import Config
from modernbert.errors import InputError
from modernbert.finetuning.data import Field, Row, text_of
from modernbert.finetuning.labels import Labels
from modernbert.finetuning.metrics import classification_figures, multi_label_figures, regression_figures
from modernbert.finetuning.tasks.base import Task, shown, worst
from modernbert.training.contract import Batch, Evaluation
from modernbert.training.examples import Example

_KINDS = {
    "single-label": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}
_METRICS = {"single-label": "accuracy", "multi-label": "f1_macro", "regression": "pearson"}


class TextClassification(Task):
    """A classifier of texts: one class, several, or a value.

    The rows' label is a name or number of a class; a list of them, or several in one cell, for several; a number for
    values, or a name that `labels` gives the place of.
    """

    name = "text-classification"
    auto_model = AutoModelForSequenceClassification
    fields = (
        Field("text", ("sentence", "content", "sentence1", "premise", "question1", "utterance", "review")),
        Field("label", ("labels", "category", "intent", "class", "target", "score", "level", "emotion", "sentiment")),
        Field("text_pair", ("sentence2", "hypothesis", "question2"), required=False),
    )
    metric = "accuracy"

    def learn(self, rows: Sequence[Row]) -> None:
        """What kind of labels there are, and their names."""
        for row in rows:
            if isinstance(row.values["label"], str) and not row.values["label"].strip():
                raise InputError(f"{row.where} has a blank label")
        values = [row.values["label"] for row in rows]
        problem = self.options.problem
        if problem == "auto":
            several = any(isinstance(v, list | tuple) for v in values)
            real = all(isinstance(v, float) or _is_fraction(v) for v in values)
            problem = "multi-label" if several else "regression" if real else "single-label"
            self.notes.append(f"labels look like {problem}; --problem says otherwise")
        self.problem = problem
        self.metric = _METRICS[problem]
        self.names: Labels | None = None
        if self.options.labels is not None:
            self.names = Labels.named(self.options.labels)
        elif problem == "multi-label":
            self.names = Labels.found(label for row in rows for label in self._several(row))
        elif problem == "single-label":
            self.names = Labels.found(values)
        if self.names is not None and len(self.names.names) < 2 and problem == "single-label":
            raise InputError(f"every row has the label {self.names.names[0]!r}; a classifier needs two or more")

    def adopt(self, config: Config) -> None:
        """Go on with the model's labels where it knows all of the data's."""
        if self.names is not None:
            self.names = self.names.of_model(config)

    def _several(self, row: Row) -> list[Any]:
        value = row.values["label"]
        if isinstance(value, list | tuple):
            return list(value)
        return [part.strip() for part in str(value).split(self.options.separator) if part.strip()]

    def config_changes(self) -> dict[str, Any]:
        """Labels and the kind of problem."""
        changes: dict[str, Any] = {"problem_type": _KINDS[self.problem]}
        if self.problem == "regression" or self.names is None:
            return {**changes, "num_labels": 1}
        return {**changes, **self.names.config_changes()}

    def prepare(self, rows: Sequence[Row], training: bool) -> list[Example]:
        """One row each."""
        texts = [text_of(row, "text") for row in rows]
        paired = [bool(row.values.get("text_pair")) for row in rows]
        if any(paired) and not all(paired):
            raise InputError(f"{rows[paired.index(False)].where} has no text_pair, and other rows have")
        pairs = [text_of(row, "text_pair") for row in rows] if any(paired) else None
        labels = [self.label_of(row) for row in rows]
        ids = self.encode(texts, pairs)
        records = [row.values for row in rows]
        return [Example([i], label, record) for i, label, record in zip(ids, labels, records, strict=True)]

    def label_of(self, row: Row) -> Any:
        """A row's label as `labels` takes it: a class, a list of classes, or a value."""
        if self.problem == "multi-label":
            assert self.names is not None
            return [self.names.number(label, row.where) for label in self._several(row)]
        value = row.values["label"]
        if self.problem == "single-label":
            assert self.names is not None
            return self.names.number(value, row.where)
        if self.names is not None:
            return float(self.names.number(value, row.where))
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise InputError(
                f"{row.where} has the label {value!r}; regression learns numbers, or names that labels has"
            )
        return number

    def labels(self, examples: Sequence[Example]) -> Batch:
        """(B,) classes or values, or (B, labels) zeros and ones."""
        return {"labels": self._truth(examples)}

    def _truth(self, examples: Sequence[Example]) -> torch.Tensor:
        if self.problem == "single-label":
            return torch.tensor([example.label for example in examples])
        if self.problem == "regression":
            return torch.tensor([example.label for example in examples], dtype=torch.float32)
        assert self.names is not None
        truth = torch.zeros(len(examples), len(self.names.names))
        for row, example in enumerate(examples):
            truth[row, example.label] = 1.0
        return truth

    def judge(self, model: Any, examples: Sequence[Example]) -> Evaluation:
        """Accuracy and F1; F1 of each label and of all; or correlation and errors."""
        parts = [(chosen, out.logits.float().cpu()) for chosen, out in self.outputs(model, examples)]
        logits = torch.empty(len(examples), parts[0][1].shape[1])
        for chosen, part in parts:
            logits[chosen] = part
        truth = self._truth(examples)
        texts = [str(example.record["text"]) for example in examples]
        if self.problem == "regression":
            return self._judge_values(logits[:, 0].numpy(), truth.numpy(), texts)
        assert self.names is not None
        names = self.names.names
        if self.problem == "multi-label":
            return self._judge_sets(logits.sigmoid().numpy(), truth.numpy().astype(int), names, texts)
        probabilities = logits.softmax(-1).numpy()
        predicted, right = probabilities.argmax(1), truth.numpy()
        wrong = [
            (
                float(probabilities[i, predicted[i]]),
                {"text": shown(texts[i]), "label": names[right[i]], "predicted": names[predicted[i]],
                 "probability": round(float(probabilities[i, predicted[i]]), 3)},
            )
            for i in np.flatnonzero(predicted != right)
        ]  # fmt: skip
        figures, confusion = classification_figures(right, predicted, len(names))
        predictions = [
            {"text": text, "label": names[t], "predicted": names[p], "probability": float(row[p])}
            for text, t, p, row in zip(texts, right, predicted, probabilities, strict=True)
        ]
        return Evaluation(figures, names, confusion, worst(wrong), predictions)

    def _judge_sets(self, scores: Any, truth: Any, names: list[str], texts: list[str]) -> Evaluation:
        predicted = (scores > 0.5).astype(int)

        def named(row: Any) -> list[str]:
            return [names[i] for i in np.flatnonzero(row)]

        wrong = [
            (
                float(np.abs(scores[i] - truth[i]).max()),
                {"text": shown(texts[i]), "labels": ", ".join(named(truth[i])),
                 "predicted": ", ".join(named(predicted[i]))},
            )
            for i in np.flatnonzero((predicted != truth).any(1))
        ]  # fmt: skip
        predictions = [
            {"text": text, "labels": named(t), "predicted": named(p)}
            for text, t, p in zip(texts, truth, predicted, strict=True)
        ]
        return Evaluation(multi_label_figures(truth, predicted, scores), errors=worst(wrong), predictions=predictions)

    def _judge_values(self, predicted: Any, truth: Any, texts: list[str]) -> Evaluation:
        rows, wrong = [], []
        for text, right, said in zip(texts, truth.tolist(), predicted.tolist(), strict=True):
            rows.append({"text": text, "value": right, "predicted": said})
            wrong.append((abs(right - said), {"text": shown(text), "value": right, "predicted": said}))
        return Evaluation(regression_figures(truth, predicted), errors=worst(wrong), predictions=rows)

    def count(self, batch: Batch) -> float:
        """Labels of a batch; of several classes a text, each class counts."""
        return float(batch["labels"].numel())


def _is_fraction(value: Any) -> bool:
    """Whether a table's cell holds a number that is not whole."""
    try:
        return isinstance(value, str) and "." in value and math.isfinite(float(value))
    except ValueError:
        return False
