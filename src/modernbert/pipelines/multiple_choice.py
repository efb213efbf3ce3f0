"""multiple-choice: which of several continuations fits a prompt."""

from __future__ import annotations

from typing import Any

import torch

from modernbert.auto import AutoModelForMultipleChoice
from modernbert.models.forward import Arguments
from modernbert.models.heads import ModernBertForMultipleChoice
from modernbert.pipelines.base import Job, Pipeline, Results, Row, read
from modernbert.pipelines.inputs import check_fields, check_texts
from modernbert.pipelines.options import MultipleChoiceOptions


class MultipleChoicePipeline(Pipeline[MultipleChoiceOptions, Row, torch.Tensor]):
    """Chooses continuations of prompts.

    A call takes `prompt` and `choices` (a text and a list of texts), or a dict {"prompt", "choices"}, a list of these
    or an iterable of them; prompts may have different numbers of choices.

    For each prompt it gives {"choice", "index", "score", "scores"}: the best choice, its number from 0, its
    probability, and the probabilities of all choices in their order.
    """

    task = "multiple-choice"
    options = MultipleChoiceOptions
    auto_model = AutoModelForMultipleChoice
    models = (ModernBertForMultipleChoice,)
    needs = "an encoder for multiple choice"
    fields = ("prompt", "choices")
    second = "choices"

    def prepare(self, items: list[Any], options: MultipleChoiceOptions) -> list[list[Row]]:
        rows = []
        for item in items:
            check_fields(item, self.fields, self.task)
            choices = check_texts("choices", item["choices"])
            encodings = self.tokenize([item["prompt"]] * len(choices), choices, **options.tokenizing)
            rows.append([Row(encoding.ids) for encoding in encodings])
        return rows

    def run(self, rows: list[Row], options: MultipleChoiceOptions) -> Results[torch.Tensor]:
        logits = self.model.run_packed(self.pack(rows), Arguments(num_choices=[1] * len(rows))).logits
        return read(logits[:, 0].float(), lambda scores: scores.unbind(0))

    def finish(self, job: Job[Row, torch.Tensor], options: MultipleChoiceOptions) -> dict[str, Any]:
        scores = torch.stack(job.results).softmax(0)
        best = int(scores.argmax())
        chosen = job.item["choices"][best]
        return {"choice": chosen, "index": best, "score": scores[best].item(), "scores": scores.tolist()}
