"""text-classification: the labels of a text or of a pair of texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from modernbert.auto import AutoModelForSequenceClassification
from modernbert.errors import InputError, listed
from modernbert.models.decoder import ModernBertDecoderForSequenceClassification
from modernbert.models.heads import ModernBertForSequenceClassification
from modernbert.pipelines.base import Job, Pipeline, Results, Row, read
from modernbert.pipelines.checks import check_choice, check_count, check_fields

FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits: logits.softmax(-1),
    "none": lambda logits: logits,
}


class ClassifierPipeline(Pipeline):
    """Base of the tasks that ask a classifier of texts: rows in, logits out."""

    auto_model = AutoModelForSequenceClassification
    architecture = None

    def __init__(self, model: Any, tokenizer: Any, **options: Any) -> None:
        if not isinstance(model, ModernBertForSequenceClassification | ModernBertDecoderForSequenceClassification):
            raise InputError(f"{self.task} needs a sequence classification model; this is a {type(model).__name__}")
        super().__init__(model, tokenizer, **options)

    def run(self, rows: list[Row], settings: dict[str, Any]) -> Results:
        """Logits of each row, float32 on the CPU."""
        ids_T, cu_seqlens = self.pack(rows)
        more = {"use_cache": False} if isinstance(self.model, ModernBertDecoderForSequenceClassification) else {}
        return read(self.model(ids_T, cu_seqlens=cu_seqlens, **more).logits.float(), lambda logits: logits.unbind(0))


class TextClassificationPipeline(ClassifierPipeline):
    """Labels of texts.

    A call takes a text, a pair as {"text", "text_pair"}, a list of these or an iterable of them, and the options
    `top_k` (labels a text; 1, and None for all), `function_to_apply` ("sigmoid", "softmax", "none"; if not given,
    softmax over several labels, sigmoid over one or over several that are not exclusive, none for regression),
    `truncation` and `max_length` (cut texts over the context instead of refusing them; `padding` is taken and changes
    nothing, as nothing is padded).

    For each text it gives {"label", "score"}; with `top_k`, a list of them, best first. One text by itself and
    without `top_k` gives a list of one, as in transformers.
    """

    task = "text-classification"
    options = ("top_k", "function_to_apply", "truncation", "max_length", "padding")

    def __call__(self, inputs: Any, **options: Any) -> Any:
        """Answer inputs; see the class and `Pipeline.__call__`."""
        answers = super().__call__(inputs, **options)
        return [answers] if isinstance(inputs, str) and "top_k" not in options else answers

    def settle(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Defaults; `top_k` is missing where nobody gave it."""
        if settings.get("top_k") is not None:
            check_count("top_k", settings["top_k"])
        name = settings.get("function_to_apply")
        function = self._usual_function() if name is None else name.lower() if isinstance(name, str) else name
        return {**settings, "function_to_apply": check_choice("function_to_apply", function, tuple(FUNCTIONS))}

    def _usual_function(self) -> str:
        config = self.model.config
        if config.problem_type == "regression":
            return "none"
        return "sigmoid" if config.problem_type == "multi_label_classification" or config.num_labels == 1 else "softmax"

    def prepare(self, items: list[Any], settings: dict[str, Any]) -> list[Job]:
        """One row a text or pair."""
        cut: dict[str, Any] = {name: settings[name] for name in ("truncation", "max_length") if name in settings}
        if any(isinstance(item, dict) for item in items):
            return [Job([Row(self._encode_one(item, cut))]) for item in items]
        if any(isinstance(item, list | tuple) for item in items):
            raise InputError('an input is a list or a tuple; give a pair of texts as {"text": ..., "text_pair": ...}')
        return [Job([Row(encoding.ids)]) for encoding in self.tokenize(items, **cut)]

    def _encode_one(self, item: Any, cut: dict[str, Any]) -> list[int]:
        if not isinstance(item, dict):
            return self.tokenize([item], **cut)[0].ids
        check_fields(item, ["text"], self.task)
        unknown = set(item) - {"text", "text_pair"}
        if unknown:
            raise InputError(f"an input has {listed(sorted(map(str, unknown)))}; a pair has text and text_pair")
        pair = item.get("text_pair")
        return self.tokenize([item["text"]], None if pair is None else [pair], **cut)[0].ids

    def finish(self, job: Job, settings: dict[str, Any]) -> Any:
        """The best labels."""
        scores = FUNCTIONS[settings["function_to_apply"]](job.results[0]).tolist()
        labels = self.model.config.id2label
        answers = [{"label": labels[i], "score": score} for i, score in enumerate(scores)]
        answers.sort(key=lambda answer: -answer["score"])
        return answers[: settings["top_k"]] if "top_k" in settings else answers[0]
