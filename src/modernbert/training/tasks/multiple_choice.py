"""One of several continuations of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from modernbert.auto import AutoModelForMultipleChoice
from modernbert.errors import InputError
from modernbert.io.tables.columns import Field
from modernbert.training.contract import Batch, Evaluation
from modernbert.training.examples import Example
from modernbert.training.tasks.base import Task, texts_in, worst
from modernbert.training.tasks.data import Row, text_of
from modernbert.training.tasks.labels import name_of


class MultipleChoice(Task):
    """One score for each choice, read after its prompt; questions may have different numbers of choices.

    Rows hold a prompt, choices (a list, or several columns) and the right one: its number from 0, its letter, or its
    text.
    """

    name = "multiple-choice"
    auto_model = AutoModelForMultipleChoice
    fields = (
        Field("prompt", ("question", "context", "ctx", "sent1", "stem", "startphrase")),
        Field("choices", ("endings", "options", "answers", "candidates"), many=True),
        Field("label", ("answer", "answerkey", "gold", "correct", "target")),
    )
    metric = "accuracy"

    def fit_labels(self, rows: Sequence[Row]) -> None:
        """Labels are places if all of them are numbers that can be."""
        self.by_place = all(_is_place(row) for row in rows if not row.values.get("choices_keys"))

    def prepare(self, rows: Sequence[Row], training: bool) -> list[Example]:
        prompts, choices = [], []
        for row in rows:
            texts = texts_in(row, "choices")
            if len(texts) < 2:
                raise InputError(f"{row.where} has the choices {texts!r}; give at least two")
            prompts += [text_of(row, "prompt")] * len(texts)
            choices += texts
        labels = [choice_number(row, self.by_place) for row in rows]
        encodings = iter(self.encode(prompts, choices))
        ids = [[next(encodings).ids for _ in row.values["choices"]] for row in rows]
        return [Example(rows_, label, row.values) for rows_, label, row in zip(ids, labels, rows, strict=True)]

    def labels(self, examples: Sequence[Example]) -> Batch:
        """(B,) numbers of the right choices."""
        return {**super().labels(examples), "num_choices": [len(example.rows) for example in examples]}

    def answers(self, output: Any) -> Tensor:
        return super().answers(output).flatten()  # without num_choices all rows are choices of one question

    def evaluate_on(self, model: Any, examples: Sequence[Example]) -> Evaluation:
        """Accuracy, and that of guessing."""
        wrong, predictions, right = [], [], 0
        for example, output in zip(examples, self.outputs(model, examples), strict=True):
            scores, choices = output.tolist(), example.record["choices"]
            best = scores.index(max(scores))
            right += best == example.label
            row = {"prompt": example.record["prompt"], "choice": choices[example.label], "predicted": choices[best]}
            predictions.append({**row, "scores": scores})
            if best != example.label:
                wrong.append((scores[best] - scores[example.label], row))
        chance = sum(1 / len(example.rows) for example in examples) / len(examples)
        found = {"accuracy": right / len(examples), "chance": chance}
        return Evaluation(found, errors=worst(wrong), predictions=predictions)


def choice_number(row: Row, by_place: bool = True) -> int:
    """The number of the right choice.

    Args:
        row: with the choices, the label, and perhaps the choices' own keys.
        by_place: whether a number is a place and not the text of a choice, if it could be both.
    """
    given, choices = row.values["label"], row.values["choices"]
    value, text, texts = name_of(given), str(given).strip(), [str(choice).strip() for choice in choices]
    keys = row.values.get("choices_keys") or []
    if value in keys:
        return int(keys.index(value))
    if by_place and _is_place(row):
        return int(value)
    if text in texts:
        return texts.index(text)
    if len(value) == 1 and value.isalpha():
        value = str(ord(value.upper()) - ord("A"))
    if value.isdecimal() and int(value) < len(choices):
        return int(value)
    raise InputError(
        f"{row.where} has the label {given!r}; it must be 0 to {len(choices) - 1}, a letter, or one of the choices"
    )


def _is_place(row: Row) -> bool:
    value = name_of(row.values["label"])
    return value.isdecimal() and int(value) < len(row.values["choices"])
