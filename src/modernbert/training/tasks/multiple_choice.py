"""One of several continuations of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from modernbert.auto import AutoModelForMultipleChoice
from modernbert.errors import InputError
from modernbert.io.tables.columns import Field
from modernbert.training.contract import Batch, Evaluation
from modernbert.training.examples import Example
from modernbert.training.tasks.base import Task, shown, worst
from modernbert.training.tasks.data import Row, text_of
from modernbert.training.tasks.labels import name_of


class MultipleChoice(Task):
    """One score a choice, read behind its prompt; questions may have different numbers of choices.

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

    def learn(self, rows: Sequence[Row]) -> None:
        """Whether labels are places: numbers throughout."""
        self.by_place = all(_is_place(row) for row in rows if not row.values.get("choices_keys"))

    def prepare(self, rows: Sequence[Row], training: bool) -> list[Example]:
        """A row of ids for each choice."""
        prompts, choices = [], []
        for row in rows:
            given = row.values["choices"]
            if len(given) < 2 or not all(isinstance(c, str) and c.strip() for c in given):
                raise InputError(f"{row.where} has the choices {given!r}; two texts or more are wanted")
            prompts += [text_of(row, "prompt")] * len(given)
            choices += given
        labels = [choice_number(row, self.by_place) for row in rows]
        ids = iter(self.encode(prompts, choices))
        examples = []
        for row, label in zip(rows, labels, strict=True):
            taken = [next(ids) for _ in row.values["choices"]]
            examples.append(Example(taken, label, row.values))
        return examples

    def labels(self, examples: Sequence[Example]) -> Batch:
        """(B,) numbers of the right choices."""
        counts = [len(example.rows) for example in examples]
        return {"labels": torch.tensor([example.label for example in examples]), "num_choices": counts}

    def judge(self, model: Any, examples: Sequence[Example]) -> Evaluation:
        """Accuracy, beside that of guessing."""
        scores: list[list[float]] = [[] for _ in examples]
        for chosen, out in self.outputs(model, examples):
            rows = iter(out.logits.flatten().tolist())  # without num_choices all are those of one question
            for i in chosen:
                scores[i] = [next(rows) for _ in examples[i].rows]
        wrong, predictions, right = [], [], 0
        for example, score in zip(examples, scores, strict=True):
            record, best = example.record, max(range(len(score)), key=score.__getitem__)
            right += best == example.label
            texts = record["choices"]
            row = {"prompt": str(record["prompt"]), "choice": texts[example.label], "predicted": texts[best]}
            predictions.append({**row, "scores": score})
            if best != example.label:
                surprise = score[best] - score[example.label]
                wrong.append((surprise, {name: shown(text) for name, text in row.items()}))
        chance = sum(1 / len(example.rows) for example in examples) / len(examples)
        figures = {"accuracy": right / len(examples), "chance": chance}
        return Evaluation(figures, errors=worst(wrong), predictions=predictions)


def choice_number(row: Row, by_place: bool = True) -> int:
    """The number of the right choice.

    Args:
        row: with the choices, the label, and perhaps the choices' own keys.
        by_place: whether a number is a place rather than a choice's text, where it could be both.
    """
    given, choices = row.values["label"], row.values["choices"]
    value = name_of(given)
    keys = row.values.get("choices_keys") or []
    texts = [str(choice).strip() for choice in choices]
    if value in keys:
        return int(keys.index(value))
    if by_place and _is_place(row):
        return int(value)
    if str(given).strip() in texts:
        return texts.index(str(given).strip())
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
