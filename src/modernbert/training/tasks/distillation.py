"""A teacher's scores of documents: read from a column or made by a cross-encoder, and the losses that learn them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modernbert.errors import InputError, shown
from modernbert.io.files import write_text
from modernbert.io.tables.columns import Field, list_in
from modernbert.pipelines.text_ranking import CrossEncoderRanking
from modernbert.training.tasks.base import texts_in
from modernbert.training.tasks.data import Row, text_of
from modernbert.training.tasks.labels import number_of
from modernbert.training.tasks.options import DistillationOptions

SCORES = Field("scores", ("teacher_scores",), required=False)
_FILE = ".teacher.json"  # in the run's folder: what the teacher said, for a run that is resumed
_TOGETHER = 256  # queries that the teacher scores between two lines about it


def distilled(loss: str, student: Sequence[Tensor], teacher: Sequence[Tensor], total: float) -> Tensor:
    """The loss of scores of each query's documents, the right one first; every query weighs the same.

    Args:
        loss: "margin-mse", squared differences of the margins between the right document and each other one; or "kl",
            the divergence of the softmax over the documents from the teacher's.
        student, teacher: (N,) scores of each query.
        total: what the sum over the queries is divided by.

    Source: margin MSE, arXiv:2010.02666; KL over a teacher's scores, arXiv:2112.01488.
    """
    losses = []
    for ours, theirs in zip(student, teacher, strict=True):
        if loss == "margin-mse":
            losses.append(F.mse_loss(ours[0] - ours[1:], theirs[0] - theirs[1:]))
        else:
            logs = F.log_softmax(ours, 0), F.log_softmax(theirs, 0)
            losses.append(F.kl_div(*logs, reduction="sum", log_target=True))
    return torch.stack(losses).sum() / total


def check_scores(row: Row, documents: int) -> list[float]:
    """The teacher's scores of a row's documents, the right one first.

    Raises:
        InputError: there are none, or not one for each document, or the row has no wrong document.
    """
    given = row.values.get("scores")
    if documents < 2:
        raise InputError(f"{row.where} has no negatives; a teacher's scores are learned of several documents a row")
    if given is None:
        raise InputError(f"{row.where} has no scores; give a column of them, or a cross-encoder (teacher=FOLDER)")
    found = list_in(given) if isinstance(given, str) else given
    numbers = [number_of(one) for one in found] if isinstance(found, list) else []
    if len(numbers) != documents or any(number is None for number in numbers):
        raise InputError(
            f"{row.where} has the scores {shown(given)}; give a list of {documents} numbers, the first of them for the "
            "right document, then those for its negatives"
        )
    return [float(number) for number in numbers if number is not None]


class Teacher:
    """A cross-encoder that gives logits.

    Args:
        name: folder or Hub repository.
        device: where it runs; None is a GPU if there is one.
    """

    def __init__(self, name: str, device: str | None) -> None:
        self.serve = CrossEncoderRanking.load(
            name, device=device, activation="none", truncation=True, dtype="float32"
        )  # fmt: skip

    def __call__(self, asked: list[dict[str, Any]]) -> list[list[float]]:
        """The scores of the documents of each {"query", "documents"}, in their order."""
        found = []
        for answer in self.serve(asked):
            of_query = {one["index"]: one["score"] for one in answer}
            found.append([of_query[i] for i in range(len(of_query))])
        return found


def add_teacher_scores(
    rows: Sequence[Row],
    fields: tuple[str, str],
    options: DistillationOptions,
    folder: Path,
    process: Any,
    say: Callable[[str], None],
) -> None:
    """Put the logits of the teacher into rows, under "scores"; one process makes them for all.

    Args:
        rows: to train on.
        fields: of the query and of the right document.
        options: the run's, which name the teacher.
        folder: of the run, which keeps the scores.
        process: this process.
        say: takes lines about progress.
    """
    assert options.teacher is not None
    asked = [
        {"query": text_of(row, fields[0]), "documents": [text_of(row, fields[1]), *texts_in(row, "negatives")]}
        for row in rows
    ]
    key = hashlib.sha256(json.dumps([str(options.teacher), asked]).encode()).hexdigest()
    path = folder / _FILE
    if process.is_main_process and _kept(path, key) is None:
        teacher = Teacher(options.teacher, options.device)
        scores: list[list[float]] = []
        for first in range(0, len(asked), _TOGETHER):
            scores += teacher(asked[first : first + _TOGETHER])
            say(f"the teacher has scored {len(scores)} of {len(asked)} rows")
        write_text(path, json.dumps({"key": key, "scores": scores}))
    process.wait_for_everyone()
    kept = _kept(path, key)
    assert kept is not None
    for row, of_row in zip(rows, kept, strict=True):
        row.values["scores"] = of_row


def _kept(path: Path, key: str) -> list[list[float]] | None:
    """Scores that an earlier run left for the same rows and teacher."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found["scores"] if isinstance(found, dict) and found.get("key") == key else None
