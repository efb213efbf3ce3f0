"""Answers that are spans of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Encoding

from modernbert.auto import AutoModelForQuestionAnswering
from modernbert.errors import InputError
from modernbert.io.tables.columns import Field
from modernbert.pipelines.question_answering import QuestionAnsweringPipeline
from modernbert.text.tokenizer import Tokenizer
from modernbert.training.contract import Batch, Evaluation
from modernbert.training.examples import Example
from modernbert.training.tasks.base import Task, worst
from modernbert.training.tasks.data import Row, text_of
from modernbert.training.tasks.labels import Labels
from modernbert.training.tasks.metrics import squad_metrics


class QuestionAnswering(Task):
    """Two scores for each token: of the answer's first and of its last one.

    Rows hold a question, a context and answers: a list of {"text", "answer_start"}, or a dict of two lists; without an
    answer the right span is the first token. A context longer than a window is read in windows that overlap, and a
    window that does not hold the whole answer has none. Evaluation is by the pipeline.
    """

    name = "question-answering"
    auto_model = AutoModelForQuestionAnswering
    fields = (
        Field("question", ("query",)),
        Field("context", ("passage", "paragraph", "document", "text")),
        Field("answers", ("answer",)),
        Field("id", ("qid",), required=False),
    )
    metric = "f1"
    usual_length = 384

    def config_changes(self) -> dict[str, Any]:
        return Labels.unnamed(2).config_changes()

    def set_tokenizer(self, tokenizer: Tokenizer, context: int) -> None:
        super().set_tokenizer(tokenizer, context)
        self.stride = min(self.max_length // 2, 128) if self.options.stride is None else self.options.stride
        if self.stride >= self.max_length:
            raise InputError(f"stride is {self.stride}; windows hold {self.max_length} tokens and must share fewer")

    def prepare(self, rows: Sequence[Row], training: bool) -> list[Example]:
        """In training an example for each window, in evaluation one for each question."""
        records = [self.record_of(row) for row in rows]
        questions = [record["question"] for record in records]
        # A window has room for the question and more of the context than it shares with the next one.
        room = self.max_length - self.tokenizer.num_special_tokens_to_add(pair=True) - self.stride
        asked = self.tokenizer(questions, add_special_tokens=False).input_ids
        for row, ids in zip(rows, asked, strict=True):
            if not 0 < len(ids) < room:
                raise InputError(
                    f"{row.where}: the question has {len(ids)} tokens; with max_length {self.max_length} and stride "
                    f"{self.stride} it must have 1 to {room - 1}"
                )
        if not training:
            return [Example([[0]], None, record) for record in records]
        encodings = self.tokenizer(
            questions,
            [record["context"] for record in records],
            truncation="only_second",
            max_length=self.max_length,
            stride=self.stride,
        ).encodings
        assert encodings is not None
        return [
            Example([window.ids], _span(window, record["answers"]), record)
            for record, first in zip(records, encodings, strict=True)
            for window in (first, *first.overflowing)
        ]

    def record_of(self, row: Row) -> dict[str, Any]:
        """A row's id, question, context, and (text, start) of its answers, which stand where they should."""
        question, context = text_of(row, "question"), text_of(row, "context")
        given = row.values["answers"]
        try:
            if isinstance(given, dict):
                pairs = list(zip(given["text"], given["answer_start"], strict=True))
            elif isinstance(given, str):
                pairs = [(given, context.find(given))]
            else:
                pairs = [(answer["text"], answer["answer_start"]) for answer in given]
            if any(text is None for text, _ in pairs):
                raise TypeError
            answers = [(str(text), int(start)) for text, start in pairs]
        except (KeyError, TypeError, ValueError):
            raise InputError(
                f"{row.where} has the answers {given!r}; give a list of text and answer_start, or a dict of two lists"
            ) from None
        for text, start in answers:
            if start < 0 or context[start : start + len(text)] != text:
                there = context[max(start, 0) : max(start, 0) + len(text)]
                raise InputError(
                    f"{row.where}: the answer {text!r} does not stand at character {start} of its context, which has "
                    f"{there!r} there"
                )
        name = str(row.values.get("id", row.where))
        return {"id": name, "question": question, "context": context, "answers": answers}

    def labels(self, examples: Sequence[Example]) -> Batch:
        """(B,) places of the first and the last token."""
        starts, ends = zip(*(example.label for example in examples), strict=True)
        return {"start_positions": torch.tensor(starts), "end_positions": torch.tensor(ends)}

    def count(self, batch: Batch) -> float:
        return float(len(batch["start_positions"]))

    def evaluate_on(self, model: Any, examples: Sequence[Example]) -> Evaluation:
        """Exact match and F1 as SQuAD computes them."""
        records = [example.record for example in examples]
        found = QuestionAnsweringPipeline(model, self.tokenizer, batch_tokens=8192)(
            [{"question": record["question"], "context": record["context"]} for record in records],
            top_k=self.options.n_best,
            max_seq_len=self.max_length,
            doc_stride=self.stride,
            max_answer_len=self.options.max_answer_len,
            handle_impossible_answer=any(not record["answers"] for record in records),
            align_to_words=False,
        )
        wrong, predictions, truth, predicted = [], [], [], []
        for record, answers in zip(records, found, strict=True):
            best = answers if isinstance(answers, list) else [answers]
            truth.append([text for text, _ in record["answers"]])
            predicted.append(best[0]["answer"] if best else "")
            row = {"question": record["question"], "answers": truth[-1], "n_best": best}
            predictions.append({"id": record["id"], **row})
            f1 = squad_metrics(truth[-1:], predicted[-1:])["f1"]
            if f1 < 100:
                expected = " | ".join(dict.fromkeys(truth[-1])) or "(no answer)"
                row = {"question": record["question"], "answer": expected, "predicted": predicted[-1], "f1": f1}
                wrong.append((100 - f1 + (best[0]["score"] if best else 0), row))
        return Evaluation(squad_metrics(truth, predicted), errors=worst(wrong), predictions=predictions)


def _span(window: Encoding, answers: list[tuple[str, int]]) -> tuple[int, int]:
    """The first and the last token of the first answer in a window; the first token twice if it is not all there."""
    if not answers or not answers[0][0]:
        return 0, 0
    text, start = answers[0]
    end = start + len(text)
    inside = [i for i, sequence in enumerate(window.sequence_ids) if sequence == 1]
    if not inside or window.offsets[inside[0]][0] > start or window.offsets[inside[-1]][1] < end:
        return 0, 0
    # Tokens may begin with the space before their word, and answers may begin inside of one.
    first = max((i for i in inside if window.offsets[i][0] <= start), default=inside[0])
    last = min((i for i in inside if window.offsets[i][1] >= end), default=inside[-1])
    return first, last
