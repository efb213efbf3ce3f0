"""multiple-choice: which of several continuations fits a prompt."""

from __future__ import annotations

from typing import Any

import torch

from modernbert.auto import AutoModelForMultipleChoice
from modernbert.errors import InputError, shown
from modernbert.models.heads import ModernBertForMultipleChoice
from modernbert.pipelines.base import Job, Pipeline, Results, Row, read
from modernbert.pipelines.checks import check_fields


class MultipleChoicePipeline(Pipeline):
    """Chooses continuations of prompts.

    A call takes `prompt` and `choices` (a text and a list of texts), or a dict {"prompt", "choices"}, a list of these
    or an iterable of them; prompts may have different numbers of choices. Options: `truncation` (cut pairs over the
    context instead of refusing them).

    For each prompt it gives {"choice", "index", "score", "scores"}: the best choice, its number from 0, its
    probability, and the probabilities of all choices in their order.
    """

    task = "multiple-choice"
    auto_model = AutoModelForMultipleChoice
    options = ("truncation",)

    def __init__(self, model: Any, tokenizer: Any, **options: Any) -> None:
        if not isinstance(model, ModernBertForMultipleChoice):
            raise InputError(f"{self.task} needs a multiple choice model; this is a {type(model).__name__}")
        super().__init__(model, tokenizer, **options)

    def __call__(self, inputs: Any = None, choices: Any = None, *, prompt: Any = None, **options: Any) -> Any:
        """Answer inputs, or `(prompt, choices)`; see the class and `Pipeline.__call__`."""
        if choices is not None and prompt is None:
            inputs, prompt = None, inputs
        if (inputs is None) == (prompt is None and choices is None):
            raise InputError("give prompt and choices, or dicts that hold them, and not both")
        return super().__call__({"prompt": prompt, "choices": choices} if inputs is None else inputs, **options)

    def prepare(self, items: list[Any], settings: dict[str, Any]) -> list[Job]:
        """One row a choice."""
        jobs = []
        for item in items:
            check_fields(item, ["prompt", "choices"], self.task)
            choices = item["choices"]
            if not isinstance(choices, list | tuple) or not choices:
                raise InputError(f"choices is {shown(choices)}; give a list of at least one text")
            cut = {"truncation": settings.get("truncation", False)}
            encodings = self.tokenize([item["prompt"]] * len(choices), list(choices), **cut)
            jobs.append(Job([Row(encoding.ids) for encoding in encodings], list(choices)))
        return jobs

    def run(self, rows: list[Row], settings: dict[str, Any]) -> Results:
        """One score a row."""
        ids_T, cu_seqlens = self.pack(rows)
        logits = self.model(ids_T, cu_seqlens=cu_seqlens, num_choices=1).logits
        return read(logits[:, 0].float(), lambda scores: scores.unbind(0))

    def finish(self, job: Job, settings: dict[str, Any]) -> Any:
        """The best choice."""
        scores = torch.stack(job.results).softmax(0)
        best = int(scores.argmax())
        return {"choice": job.context[best], "index": best, "score": scores[best].item(), "scores": scores.tolist()}
