"""Classes or values of whole texts, or of pairs of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from modernbert.auto import AutoModelForSequenceClassification
from modernbert.config import Config
from modernbert.errors import InputError
from modernbert.io.tables.columns import Field, list_in
from modernbert.training.contract import Batch, Evaluation
from modernbert.training.examples import Example
from modernbert.training.tasks.base import Task, shown, worst
from modernbert.training.tasks.data import Row, text_of
from modernbert.training.tasks.labels import Labels, is_ignored, multi_hot_width, number_of, some
from modernbert.training.tasks.metrics import classification_figures, multi_label_figures, regression_figures

_KINDS = {
    "single-label": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}
_METRICS = {"single-label": "accuracy", "multi-label": "f1_macro", "regression": "pearson"}


class TextClassification(Task):
    """A classifier of texts: one class, several, or a value.

    The rows' label is a name or number of a class; a list of them, 0 or 1 for each class, or several names in one cell,
    for several; a number for values, or a name that `labels` gives the place of. What it is, the whole column says:
    numbers are values where one of them has a fraction, and classes otherwise. A label of -100 does not count.
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
        """What kind of labels there are, which the whole column says, and their names."""
        problem = self.options.problem
        may_be_several = problem in ("auto", "multi-label")
        cells = [row.values["label"] for row in rows]
        # Cells of a table hold lists as text, where all of them do.
        self.reads_lists = may_be_several and all(
            isinstance(cell, list) or (isinstance(cell, str) and list_in(cell) is not None) for cell in cells
        )
        values = [self._value(row) for row in rows]
        has_lists = any(isinstance(value, list) for value in values)
        if has_lists and not may_be_several:
            where = next(row.where for row, value in zip(rows, values, strict=True) if isinstance(value, list))
            raise InputError(f'{where} has a list of labels, and problem is {problem}; problem="multi-label" reads it')
        given = None if self.options.labels is None else Labels.named(self.options.labels)
        self.width: int | None = None
        reason = "problem"
        if problem == "auto":
            problem, reason = self._kind_of(rows, values, has_lists, given)
        self.problem, self.metric = problem, _METRICS[problem]
        self.names = given
        if problem == "multi-label":
            several = [(row.where, self._several(row)) for row in rows]
            if all(isinstance(value, list) for value in values):
                self.width = multi_hot_width(several, None if given is None else len(given.names))
            if self.width is not None:
                reason = "they are lists of 0 and 1"
                self.names = given or Labels([f"LABEL_{i}" for i in range(self.width)])
            elif given is None:
                self.names = Labels.found(label for _, some in several for label in some)
        elif problem == "single-label" and given is None:
            self.names = Labels.found(value for value in values if not is_ignored(value))
            if len(self.names.names) < 2:
                raise InputError(f"every row has the label {self.names.names[0]!r}; a classifier needs two or more")
        classes = "" if self.names is None else f"; {len(self.names.names)} classes: {some(self.names.names, 3)}"
        if self.options.problem == "auto":
            self.notes.append(f"labels look like {problem}, as {reason}{classes}; problem=KIND says otherwise")

    def _kind_of(
        self, rows: Sequence[Row], values: Sequence[Any], has_lists: bool, given: Labels | None
    ) -> tuple[str, str]:
        """The kind of problem that a column of labels poses, and why."""
        if has_lists:
            return "multi-label", "they are lists"
        numbers = [number_of(value) for value in values if not isinstance(value, bool)]
        if given is not None:
            return "single-label", "names for them are given"
        if len(numbers) < len(values) or None in numbers:
            return "single-label", "not all are numbers"
        for row, number in zip(rows, numbers, strict=True):
            if number is not None and number != round(number, 0):
                return "regression", f"not all are whole: {number:g} in {row.where}"
        return "single-label", "all are whole numbers"

    def adopt(self, config: Config) -> None:
        """Go on with the model's labels where it knows all of the data's."""
        if self.names is not None:
            theirs = self.names.of_model(config)
            if self.width in (None, len(theirs.names)):
                self.names = theirs

    def _value(self, row: Row) -> Any:
        """A row's label: a name, a number, or a list of them."""
        value = row.values["label"]
        if isinstance(value, str) and not value.strip():
            raise InputError(f"{row.where} has a blank label")
        if isinstance(value, Mapping):
            raise InputError(f"{row.where} has the label {value!r}; give a name, a number, or a list of them")
        found = list_in(value) if self.reads_lists and isinstance(value, str) else None
        return value if found is None else found

    def _several(self, row: Row) -> list[Any]:
        """A row's labels; of a cell with several, the parts between the separators."""
        value = self._value(row)
        if not isinstance(value, list):
            return [part.strip() for part in str(value).split(self.options.separator) if part.strip()]
        for label in value:
            whole = not isinstance(label, float) or (math.isfinite(label) and label == int(label))
            if not whole or not isinstance(label, str | int | float) or is_ignored(label):
                raise InputError(
                    f"{row.where} has {label!r} among its labels; a list holds names or numbers of classes, or 0 or 1 "
                    "for each class"
                )
        return value

    def config_changes(self) -> dict[str, Any]:
        """Labels and the kind of problem."""
        changes: dict[str, Any] = {"problem_type": _KINDS[self.problem]}
        if self.problem == "regression" or self.names is None:
            return {**changes, "num_labels": 1}
        return {**changes, **self.names.config_changes()}

    def prepare(self, rows: Sequence[Row], training: bool) -> list[Example]:
        """One row each; those with the label -100 do not count."""
        if self.problem == "single-label":
            assert self.names is not None
            counted = [row for row in rows if not self.names.leaves_out(self._value(row))]
            if len(counted) < len(rows):
                self.notes.append(f"not counted, as the label is -100: {len(rows) - len(counted)} of {len(rows)} rows")
            rows = counted
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
            labels = self._several(row)
            if self.width is None:
                return [self.names.number(label, row.where) for label in labels]
            if len(labels) != self.width or not all(number_of(label) in (0.0, 1.0) for label in labels):
                raise InputError(f"{row.where} has the labels {labels!r}; {self.width} numbers of 0 and 1 are wanted")
            return [i for i, label in enumerate(labels) if number_of(label)]
        value = self._value(row)
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
