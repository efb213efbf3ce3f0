"""text-classification: the labels of a text or of a pair of texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from modernbert.auto import AutoModelForSequenceClassification
from modernbert.errors import InputError, listed
from modernbert.models.decoder import ModernBertDecoderForSequenceClassification
from modernbert.models.heads import ModernBertForSequenceClassification
from modernbert.pipelines.base import Job, OptionsT, Pipeline, Results, Row, read
from modernbert.pipelines.inputs import check_fields
from modernbert.pipelines.options import TextClassificationOptions

FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits: logits.softmax(-1),
    "none": lambda logits: logits,
    "tanh": torch.tanh,
}


class ClassifierPipeline(Pipeline[OptionsT, Row, torch.Tensor]):
    """Base of the tasks that ask a classifier of texts: rows in, logits out."""

    auto_model = AutoModelForSequenceClassification
    models = (ModernBertForSequenceClassification, ModernBertDecoderForSequenceClassification)
    needs = "a sequence classification model"
    architecture = None

    def run(self, rows: list[Row], options: OptionsT) -> Results[torch.Tensor]:
        """Logits of each row, float32 on the CPU."""
        return read(self.model.run_packed(self.pack(rows)).logits.float(), lambda logits: logits.unbind(0))


class TextClassificationPipeline(ClassifierPipeline[TextClassificationOptions]):
    """Labels of texts.

    A call takes a text, a pair as {"text", "text_pair"}, a list of these or an iterable of them.

    For each text it gives {"label", "score"}; with `top_k`, a list of them, best first (all with None). A single text
    without `top_k` gives a list of one, as in transformers.
    """

    task = "text-classification"
    options = TextClassificationOptions

    def __call__(self, inputs: Any = None, *more: Any, **options: Any) -> Any:
        """A text by itself is answered by a list, as in transformers; see `Pipeline.__call__`."""
        answers = super().__call__(inputs, *more, **options)
        return [answers] if isinstance(inputs, str) and "top_k" not in options else answers

    def accepted(self, options: dict[str, Any]) -> dict[str, Any]:
        """`return_all_scores` is the older way to ask for all labels."""
        every = options.get("return_all_scores")
        options = {name: value for name, value in options.items() if name != "return_all_scores"}
        if every is not None:
            options.setdefault("top_k", None if every else "best")
        return super().accepted(options)

    def resolve(self, options: TextClassificationOptions) -> TextClassificationOptions:
        """The function that fits what the model was trained for."""
        config = self.model.config
        function = "softmax"
        if config.problem_type == "regression":
            function = "none"
        elif config.problem_type == "multi_label_classification" or config.num_labels == 1:
            function = "sigmoid"
        return dataclasses.replace(options, function_to_apply=options.function_to_apply or function)

    def prepare(self, items: list[Any], options: TextClassificationOptions) -> list[list[Row]]:
        cut = options.tokenizing
        items = [_pair(item) for item in items]
        if any(isinstance(item, list | tuple) for item in items):
            raise InputError('an input is a list or a tuple; give a pair of texts as {"text": ..., "text_pair": ...}')
        if not any(isinstance(item, dict) for item in items):
            return [[Row(encoding.ids)] for encoding in self.tokenize(items, **cut)]
        rows = []
        for item in items:
            fields = check_fields(item, ["text"], self.task) if isinstance(item, dict) else {"text": item}
            unknown = set(fields) - {"text", "text_pair"}
            if unknown:
                raise InputError(f"an input has {listed(sorted(map(str, unknown)))}; a pair has text and text_pair")
            pair = fields.get("text_pair")
            rows.append([Row(self.tokenize([fields["text"]], None if pair is None else [pair], **cut)[0].ids)])
        return rows

    def finish(self, job: Job[Row, torch.Tensor], options: TextClassificationOptions) -> Any:
        scores = FUNCTIONS[str(options.function_to_apply)](job.results[0]).tolist()
        labels = self.model.config.id2label
        answers = [{"label": labels[i], "score": score} for i, score in enumerate(scores)]
        answers.sort(key=lambda answer: -answer["score"])
        return answers[0] if isinstance(options.top_k, str) else answers[: options.top_k]


def _pair(item: Any) -> Any:
    """A pair in a list of one, as transformers takes it from its early days on, as a dict."""
    inner = item[0] if isinstance(item, list) and len(item) == 1 else None
    is_pair = isinstance(inner, list | tuple) and len(inner) == 2
    return {"text": inner[0], "text_pair": inner[1]} if inner is not None and is_pair else item
