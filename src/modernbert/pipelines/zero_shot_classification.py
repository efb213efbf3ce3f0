"""zero-shot-classification: any labels, by asking a model of entailment whether each follows from the text."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from typing import Any

import torch

from modernbert.errors import InputError, listed, shown
from modernbert.pipelines.base import Job, Row
from modernbert.pipelines.inputs import as_list, check_fields
from modernbert.pipelines.options import ZeroShotClassificationOptions
from modernbert.pipelines.text_classification import ClassifierPipeline

logger = logging.getLogger(__name__)


class ZeroShotClassificationPipeline(ClassifierPipeline[ZeroShotClassificationOptions]):
    """Scores labels that the model was not trained for.

    The model must be trained on entailment, with a label whose name begins with "entail". A call takes a text, a list
    of texts or an iterable of them, and `candidate_labels`; or a list of texts and as many lists of labels; or dicts
    {"sequence", "candidate_labels"}.

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

    def __call__(self, inputs: Any = None, *more: Any, **options: Any) -> Any:
        """Texts may have labels of their own; see `Pipeline.__call__`."""
        inputs = as_list(options.pop("sequences", None) if inputs is None else inputs)
        labels = more[0] if more else options.get("candidate_labels")
        if isinstance(labels, list | tuple) and any(isinstance(one, list | tuple) for one in labels):
            texts = [inputs] if isinstance(inputs, str) else inputs
            if not isinstance(texts, list | tuple) or len(texts) != len(labels):
                count = f"{len(texts)} texts" if isinstance(texts, list | tuple) else shown(inputs)
                raise InputError(f"candidate_labels holds {len(labels)} lists of labels, for {count}; give one a text")
            inputs = [{"sequence": text, "candidate_labels": own} for text, own in zip(texts, labels, strict=True)]
            more, options["candidate_labels"] = (), None
        return super().__call__(inputs, *more, **options)

    def resolve(self, options: ZeroShotClassificationOptions) -> ZeroShotClassificationOptions:
        """`candidate_labels` as a list of labels, if they are given for all texts."""
        labels = None if options.candidate_labels is None else _labels(options.candidate_labels)
        template = options.hypothesis_template
        try:
            filled = template.format("a") != template
        except (IndexError, KeyError, ValueError, AttributeError, TypeError):
            filled = False
        if not filled:
            raise InputError(f"hypothesis_template is {shown(template)}; it needs {{}} where the label goes")
        if self.model.config.num_labels < 2:
            raise InputError("the model has one label; entailment needs at least two, and a name that says which")
        return dataclasses.replace(options, candidate_labels=labels)

    def prepare(self, items: list[Any], options: ZeroShotClassificationOptions) -> list[list[Row]]:
        pairs = [
            [(text, options.hypothesis_template.format(label)) for label in labels]
            for text, labels in (self._parts(item, options) for item in items)
        ]
        texts, hypotheses = zip(*itertools.chain(*pairs), strict=True)
        encodings = iter(self.tokenize(list(texts), list(hypotheses), **options.tokenizing))
        return [[Row(next(encodings).ids) for _ in of_text] for of_text in pairs]

    def _parts(self, item: Any, options: ZeroShotClassificationOptions) -> tuple[Any, list[str]]:
        """The text of an input and its labels."""
        if not isinstance(item, dict):
            return item, _labels(options.candidate_labels)
        check_fields(item, ["sequence"], self.task)
        return item["sequence"], _labels(item.get("candidate_labels", options.candidate_labels))

    def finish(self, job: Job[Row, torch.Tensor], options: ZeroShotClassificationOptions) -> dict[str, Any]:
        (text, labels), entail = self._parts(job.item, options), self.entailment_id
        logits = torch.stack(job.results)
        if options.multi_label or len(labels) == 1:
            against = self.model.config.num_labels - 1 if entail == 0 else 0
            scores = logits[:, [against, entail]].softmax(-1)[:, 1]
        else:
            scores = logits[:, entail].softmax(0)
        order = scores.argsort(descending=True, stable=True).tolist()
        return {
            "sequence": text,
            "labels": [labels[i] for i in order],
            "scores": [scores[i].item() for i in order],
        }


def _labels(given: Any) -> list[str]:
    """Labels of a list, or of a string with commas between."""
    labels = [part.strip() for part in given.split(",") if part.strip()] if isinstance(given, str) else given
    if not isinstance(labels, list | tuple) or not labels or not all(isinstance(x, str) and x.strip() for x in labels):
        raise InputError(f"candidate_labels is {shown(given)}; give one label or more, none of them empty")
    return list(labels)
