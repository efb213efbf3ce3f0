"""zero-shot-classification: any labels, by asking a model of entailment whether each follows from the text."""

from __future__ import annotations

import logging
from typing import Any

import torch

from modernbert.errors import InputError, listed, shown
from modernbert.pipelines.base import Job, Row
from modernbert.pipelines.checks import check_switch
from modernbert.pipelines.text_classification import ClassifierPipeline

logger = logging.getLogger(__name__)


class ZeroShotClassificationPipeline(ClassifierPipeline):
    """Scores labels that the model was not trained for.

    The model must be trained on entailment, with a label whose name begins with "entail". A call takes a text, a list
    of texts or an iterable of them, then `candidate_labels` (a list, or one string with commas between), and the
    options `hypothesis_template` ("This example is {}."), `multi_label` (each label for itself; otherwise they share
    one probability), `truncation` (cut texts over the context instead of refusing them).

    For each text it gives {"sequence", "labels", "scores"}, best first.
    """

    task = "zero-shot-classification"
    options = ("candidate_labels", "hypothesis_template", "multi_label", "truncation")

    def __init__(self, model: Any, tokenizer: Any, **options: Any) -> None:
        super().__init__(model, tokenizer, **options)
        if not self._entailing and self.model.config.num_labels > 1:
            logger.warning(
                "the model's labels are %s and none begins with 'entail': it was not trained on entailment, and the "
                "scores of its last label, which are taken, mean little",
                listed(self.model.config.label2id),
            )

    def __call__(self, inputs: Any, candidate_labels: Any = None, **options: Any) -> Any:
        """Answer inputs; see the class and `Pipeline.__call__`."""
        if candidate_labels is not None:
            options["candidate_labels"] = candidate_labels
        return super().__call__(inputs, **options)

    @property
    def _entailing(self) -> list[int]:
        return [i for label, i in self.model.config.label2id.items() if label.lower().startswith("entail")]

    @property
    def entailment_id(self) -> int:
        """Number of the label that says that the hypothesis follows; the last one where none is named so."""
        return next(iter(self._entailing), self.model.config.num_labels - 1)

    def settle(self, settings: dict[str, Any]) -> dict[str, Any]:
        """`candidate_labels` as a list of labels, and the other defaults."""
        given = settings.get("candidate_labels")
        labels = [part.strip() for part in given.split(",") if part.strip()] if isinstance(given, str) else given
        if not isinstance(labels, list | tuple) or not all(isinstance(x, str) for x in labels):
            raise InputError(f"candidate_labels is {shown(given)}; give a list of labels")
        if not labels or not all(label.strip() for label in labels):
            raise InputError(f"candidate_labels is {shown(given)}; give at least one label, and none that is empty")
        template = settings.get("hypothesis_template", "This example is {}.")
        try:
            filled = isinstance(template, str) and template.format(labels[0]) != template
        except (IndexError, KeyError, ValueError, AttributeError, TypeError):
            filled = False
        if not filled:
            raise InputError(f"hypothesis_template is {shown(template)}; it needs {{}} where the label goes")
        if self.model.config.num_labels < 2:
            raise InputError("the model has one label; entailment needs at least two, and a name that says which")
        several = check_switch("multi_label", settings.get("multi_label"))
        settings = {**settings, "multi_label": several}
        return {**settings, "candidate_labels": labels, "hypothesis_template": template, "entail": self.entailment_id}

    def check_defaults(self) -> None:
        """The options given so far; the labels may come with a call."""
        self.settle({"candidate_labels": ["a"], **self.defaults})

    def prepare(self, items: list[Any], settings: dict[str, Any]) -> list[Job]:
        """One row a text and label."""
        labels = settings["candidate_labels"]
        hypotheses = [settings["hypothesis_template"].format(label) for label in labels]
        cut = {"truncation": settings.get("truncation", False)}
        rows = self.tokenize([text for text in items for _ in labels], hypotheses * len(items), **cut)
        n = len(labels)
        return [Job([Row(e.ids) for e in rows[i * n : (i + 1) * n]], text) for i, text in enumerate(items)]

    def finish(self, job: Job, settings: dict[str, Any]) -> Any:
        """Labels and scores, best first."""
        labels, entail = settings["candidate_labels"], settings["entail"]
        logits = torch.stack(job.results)
        if settings["multi_label"] or len(labels) == 1:
            against = self.model.config.num_labels - 1 if entail == 0 else 0
            scores = logits[:, [against, entail]].softmax(-1)[:, 1]
        else:
            scores = logits[:, entail].softmax(0)
        order = scores.argsort(descending=True, stable=True).tolist()
        return {
            "sequence": job.context,
            "labels": [labels[i] for i in order],
            "scores": [scores[i].item() for i in order],
        }
