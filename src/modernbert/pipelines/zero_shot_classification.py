"""zero-shot-classification: any labels, by asking a model of entailment whether each follows from the text."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch

from modernbert.errors import InputError, listed, shown
from modernbert.pipelines.base import Job, Row
from modernbert.pipelines.options import ZeroShotClassificationOptions
from modernbert.pipelines.text_classification import ClassifierPipeline

logger = logging.getLogger(__name__)


class ZeroShotClassificationPipeline(ClassifierPipeline[ZeroShotClassificationOptions]):
    """Scores labels that the model was not trained for.

    The model must be trained on entailment, with a label whose name begins with "entail". A call takes a text, a list
    of texts or an iterable of them, and `candidate_labels`.

    For each text it gives {"sequence", "labels", "scores"}, best first.
    """

    task = "zero-shot-classification"
    options = ZeroShotClassificationOptions
    second = "candidate_labels"

    def __init__(self, model: Any, tokenizer: Any, **options: Any) -> None:
        super().__init__(model, tokenizer, **options)
        if not self._entailing and self.model.config.num_labels > 1:
            logger.warning(
                "the model's labels are %s and none begins with 'entail': it was not trained on entailment, and the "
                "scores, which are those of its last label, mean little",
                listed(self.model.config.label2id),
            )

    @property
    def _entailing(self) -> list[int]:
        return [int(i) for label, i in self.model.config.label2id.items() if label.lower().startswith("entail")]

    @property
    def entailment_id(self) -> int:
        """Number of the label that says that the hypothesis follows; the last one where none is named so."""
        return next(iter(self._entailing), self.model.config.num_labels - 1)

    def resolve(self, options: ZeroShotClassificationOptions) -> ZeroShotClassificationOptions:
        """`candidate_labels` as a list of labels."""
        labels = given = options.candidate_labels
        if isinstance(given, str):
            labels = [part.strip() for part in given.split(",") if part.strip()]
        if not labels or not all(label.strip() for label in labels):
            raise InputError(f"candidate_labels is {shown(given)}; give one label or more, none of them empty")
        template = options.hypothesis_template
        try:
            filled = template.format(labels[0]) != template
        except (IndexError, KeyError, ValueError, AttributeError, TypeError):
            filled = False
        if not filled:
            raise InputError(f"hypothesis_template is {shown(template)}; it needs {{}} where the label goes")
        if self.model.config.num_labels < 2:
            raise InputError("the model has one label; entailment needs at least two, and a name that says which")
        return dataclasses.replace(options, candidate_labels=labels)

    def check_defaults(self) -> None:
        """The options given so far; the labels may come with a call."""
        self.resolve(self.given({} if "candidate_labels" in self.defaults else {"candidate_labels": ["a"]}))

    def prepare(self, items: list[Any], options: ZeroShotClassificationOptions) -> list[list[Row]]:
        hypotheses = [options.hypothesis_template.format(label) for label in options.candidate_labels or ()]
        n = len(hypotheses)
        texts = [text for text in items for _ in hypotheses]
        rows = [Row(e.ids) for e in self.tokenize(texts, hypotheses * len(items), truncation=options.truncation)]
        return [rows[i : i + n] for i in range(0, len(rows), n)]

    def finish(self, job: Job[Row, torch.Tensor], options: ZeroShotClassificationOptions) -> dict[str, Any]:
        labels, entail = list(options.candidate_labels or ()), self.entailment_id
        logits = torch.stack(job.results)
        if options.multi_label or len(labels) == 1:
            against = self.model.config.num_labels - 1 if entail == 0 else 0
            scores = logits[:, [against, entail]].softmax(-1)[:, 1]
        else:
            scores = logits[:, entail].softmax(0)
        order = scores.argsort(descending=True, stable=True).tolist()
        return {
            "sequence": job.item,
            "labels": [labels[i] for i in order],
            "scores": [scores[i].item() for i in order],
        }
