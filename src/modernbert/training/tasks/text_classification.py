"""Classes or values of whole texts, or of pairs of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from modernbert.auto import AutoModelForSequenceClassification
from modernbert.config import Config
from modernbert.errors import InputError, listed
from modernbert.io.tables.columns import Field, list_in
from modernbert.training.contract import Batch, Evaluation
from modernbert.training.examples import Example
from modernbert.training.tasks.base import Task, worst
from modernbert.training.tasks.data import Row, text_of
from modernbert.training.tasks.labels import Labels, class_weights, is_bit, is_ignored, multi_hot_width, number_of
from modernbert.training.tasks.metrics import classification_metrics, multi_label_metrics, regression_metrics

# What the configuration calls a problem, and the metric that checkpoints are compared by.
_PROBLEMS = {
    "single-label": ("single_label_classification", "accuracy"),
    "multi-label": ("multi_label_classification", "f1_macro"),
    "regression": ("regression", "pearson"),
}


class TextClassification(Task):
    """A classifier of texts: one class, several, or a value.

    A row's label is the name or number of a class; a list of them, 0 or 1 for each class, or several names in one cell,
    for several; a number for values, or a name that `labels` gives the place of. The whole column says what labels are:
    numbers are values if one of them has a fraction, and classes otherwise. A label of -100 does not count.

    Attributes:
        problem: single-label, multi-label or regression.
        names: of the classes.
        width: how many classes lists of 0 and 1 are for; None if labels are no such lists.
    """

    name = "text-classification"
    auto_model = AutoModelForSequenceClassification
    fields = (
        Field("text", ("sentence", "content", "sentence1", "premise", "question1", "utterance", "review")),
        Field("label", ("labels", "category", "intent", "class", "target", "score", "level", "emotion", "sentiment")),
        Field("text_pair", ("sentence2", "hypothesis", "question2"), required=False),
    )
    metric = "accuracy"
    width: int | None = None

    def fit_labels(self, rows: Sequence[Row]) -> None:
        """What labels are, which the whole column says, and their names."""
        problem = self.options.problem
        may_be_lists = problem in ("auto", "multi-label")
        # Cells of a table hold lists as text, if all of them do.
        self.reads_lists = may_be_lists and all(_as_list(row.values["label"]) is not None for row in rows)
        values = [self._value(row) for row in rows]
        lists = [row.where for row, value in zip(rows, values, strict=True) if isinstance(value, list)]
        if lists and not may_be_lists:
            raise InputError(
                f'{lists[0]} has a list of labels, and problem is {problem}; problem="multi-label" reads it'
            )
        given = None if self.options.labels is None else Labels.read(self.options.labels)
        reason = ""
        if problem == "auto":
            problem, reason = _problem_of(rows, values, given)
        self.problem, (_, self.metric) = problem, _PROBLEMS[problem]
        if problem == "multi-label":
            several = [(row.where, self._several(row)) for row in rows]
            if len(lists) == len(rows):
                self.width = multi_hot_width(several, None if given is None else len(given.names))
            if self.width is not None:
                reason = "they are lists of 0 and 1"
            found = (label for _, labels in several for label in labels)
            self.names = given or (Labels.unnamed(self.width) if self.width else Labels.found_in(found))
        elif problem == "single-label":
            self.names = given or Labels.found_in(value for value in values if not is_ignored(value))
            if len(self.names.names) < 2 and given is None:
                raise InputError(f"every row has the label {self.names.names[0]!r}; a classifier needs two or more")
        else:
            self.names = given or Labels.unnamed(1)
        if self.options.problem == "auto":
            classes = f"; {len(self.names.names)} classes: {listed(self.names.names, 3)}"
            classes = "" if problem == "regression" else classes
            self.notes.append(f"labels: {problem}, because {reason}{classes}; problem=KIND sets another kind")

    def align_labels(self, config: Config) -> None:
        aligned = self.names.aligned(config)
        if self.width in (None, len(aligned.names)):
            self.names = aligned

    def config_changes(self) -> dict[str, Any]:
        labels = {"num_labels": 1} if self.problem == "regression" else self.names.config_changes()
        return {"problem_type": _PROBLEMS[self.problem][0], **labels}

    def _value(self, row: Row) -> Any:
        """A row's label: a name, a number, or a list of them."""
        value = row.values["label"]
        if isinstance(value, str) and not value.strip():
            raise InputError(f"{row.where} has a blank label")
        if isinstance(value, Mapping):
            raise InputError(f"{row.where} has the label {value!r}; give a name, a number, or a list of them")
        found = _as_list(value) if self.reads_lists else None
        return value if found is None else found

    def _several(self, row: Row) -> list[Any]:
        """A row's labels; of a cell with several, the parts between the separators."""
        value = self._value(row)
        if not isinstance(value, list):
            return [part.strip() for part in str(value).split(self.options.separator) if part.strip()]
        for label in value:
            whole = not isinstance(label, float) or label.is_integer()
            if not whole or not isinstance(label, str | int | float) or is_ignored(label):
                raise InputError(
                    f"{row.where} has {label!r} among its labels; a list holds names or numbers of classes, or 0 or 1 "
                    "for each class"
                )
        return value

    def prepare(self, rows: Sequence[Row], training: bool) -> list[Example]:
        if self.problem == "single-label":
            counted = [row for row in rows if not self.names.leaves_out(self._value(row))]
            if left_out := len(rows) - len(counted):
                self.notes.append(f"not counted, as the label is -100: {left_out} of {len(rows)} rows")
            rows = counted
        paired = [bool(row.values.get("text_pair")) for row in rows]
        if any(paired) and not all(paired):
            where = rows[paired.index(False)].where
            raise InputError(f"{where} has no text_pair, but other rows have one; give every row one, or none")
        texts = [text_of(row, "text") for row in rows]
        pairs = [text_of(row, "text_pair") for row in rows] if any(paired) else None
        labels = [self.label_of(row) for row in rows]
        if training and self.options.class_weights:
            if self.problem == "regression":
                raise InputError("class_weights is given, and labels are values (regression); classes have weights")
            several = self.problem == "multi-label"
            classes = labels if several else [[label] for label in labels]
            self.class_weights = class_weights(self.options.class_weights, self.names, classes, several)
        encodings = self.encode(texts, pairs)
        return [Example([e.ids], label, row.values) for e, label, row in zip(encodings, labels, rows, strict=True)]

    def label_of(self, row: Row) -> Any:
        """A row's label as `labels` takes it: a class, a list of classes, or a value."""
        if self.problem == "multi-label":
            several = self._several(row)
            if self.width is None:
                return [self.names.number(label, row.where) for label in several]
            if len(several) != self.width or not all(is_bit(label) for label in several):
                raise InputError(f"{row.where} has the labels {several!r}; give {self.width} numbers of 0 and 1")
            return [i for i, label in enumerate(several) if number_of(label)]
        value = self._value(row)
        if self.problem == "single-label":
            return self.names.number(value, row.where)
        if self.options.labels is not None:
            return float(self.names.number(value, row.where))
        number = number_of(value)
        if number is None or not math.isfinite(number):
            raise InputError(f"{row.where} has the label {value!r}; regression takes numbers, or names in labels")
        return number

    def labels(self, examples: Sequence[Example]) -> Batch:
        """(B,) classes or values, or (B, classes) zeros and ones."""
        if self.problem != "multi-label":
            return super().labels(examples)
        truth = torch.zeros(len(examples), len(self.names.names))
        for row, example in enumerate(examples):
            truth[row, example.label] = 1.0
        return {"labels": truth}

    def count(self, batch: Batch) -> float:
        """Labels of a batch; of several classes a text, each class counts, and -100 is a value as any other."""
        return super().count(batch) if self.problem == "single-label" else float(batch["labels"].numel())

    def evaluate_on(self, model: Any, examples: Sequence[Example]) -> Evaluation:
        """Accuracy and F1; F1 of each label and of all; or correlation and errors."""
        logits = torch.cat(self.outputs(model, examples))
        truth = self.labels(examples)["labels"].numpy()
        texts = [str(example.record["text"]) for example in examples]
        names = self.names.names
        confusion: list[list[int]] = []
        if self.problem == "regression":
            predicted = logits[:, 0].numpy()
            metrics = regression_metrics(truth, predicted)
            badness = np.abs(truth.astype(float) - predicted)
            cells = zip(texts, truth.tolist(), predicted.tolist(), strict=True)
            rows = [{"text": text, "value": value, "predicted": other} for text, value, other in cells]
        elif self.problem == "multi-label":
            scores, truth = logits.sigmoid().numpy(), truth.astype(int)
            predicted = (scores > 0.5).astype(int)
            metrics = multi_label_metrics(truth, predicted, scores)
            badness = np.abs(scores - truth).max(1)
            named = [[[names[i] for i in np.flatnonzero(row)] for row in side] for side in (truth, predicted)]
            cells = zip(texts, *named, strict=True)
            rows = [{"text": text, "labels": labels, "predicted": others} for text, labels, others in cells]
        else:
            probabilities = logits.softmax(-1).numpy()
            predicted, badness = probabilities.argmax(1), probabilities.max(1)
            metrics, confusion = classification_metrics(truth, predicted, len(names))
            rows = [
                {"text": text, "label": names[label], "predicted": names[other], "probability": probability}
                for text, label, other, probability in zip(texts, truth, predicted, badness.tolist(), strict=True)
            ]
        wrong = (truth != predicted).reshape(len(rows), -1).any(1)
        errors = worst((float(badness[i]), rows[i]) for i in np.flatnonzero(wrong))
        return Evaluation(metrics, names if confusion else [], confusion, errors, rows)


def _as_list(cell: Any) -> list[Any] | None:
    """The list that a cell is or holds as text."""
    return cell if isinstance(cell, list) else list_in(cell) if isinstance(cell, str) else None


def _problem_of(rows: Sequence[Row], values: Sequence[Any], given: Labels | None) -> tuple[str, str]:
    """The problem that a column of labels poses, and why."""
    if any(isinstance(value, list) for value in values):
        return "multi-label", "they are lists"
    if given is not None:
        return "single-label", "names for them are given"
    numbers = [None if isinstance(value, bool) else number_of(value) for value in values]
    if None in numbers:
        return "single-label", "not all are numbers"
    for row, number in zip(rows, numbers, strict=True):
        if number is not None and number != round(number, 0):
            return "regression", f"not all are whole: {number:g} in {row.where}"
    return "single-label", "all are whole numbers"
