"""feature-extraction: the last hidden state of every token."""

from __future__ import annotations

from typing import Any

from modernbert.auto import AutoModel
from modernbert.errors import InputError, shown
from modernbert.nn.backbone import Backbone
from modernbert.pipelines.base import Job, Pipeline, Results, Row, read
from modernbert.pipelines.checks import check_switch

_TOKENIZE = ("truncation", "max_length", "add_special_tokens", "padding")


class FeatureExtractionPipeline(Pipeline):
    """Hidden states of texts.

    A call takes a text, a list of texts or an iterable of them, and the options `return_tensors` (a tensor in the place
    of nested lists), `truncation` (cut texts over the context instead of refusing them) and `tokenize_kwargs` (a dict
    of `truncation`, `max_length`, `add_special_tokens`).

    For each text it gives numbers of shape (1, tokens, hidden), float32.
    """

    task = "feature-extraction"
    auto_model = AutoModel
    architecture = None
    options = ("return_tensors", "truncation", "tokenize_kwargs")

    def __init__(self, model: Any, tokenizer: Any, **options: Any) -> None:
        if not isinstance(getattr(model, "base_model", None), Backbone):
            raise InputError(f"feature-extraction needs a model of this library; this is a {type(model).__name__}")
        super().__init__(model.base_model, tokenizer, **options)

    def settle(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The tokenizer's options in one place."""
        more = {} if settings.get("tokenize_kwargs") is None else settings["tokenize_kwargs"]
        if not isinstance(more, dict) or set(more) - set(_TOKENIZE):
            raise InputError(f"tokenize_kwargs is {shown(more)}; it may hold {', '.join(_TOKENIZE)}")
        more = {name: value for name, value in more.items() if name != "padding"}  # nothing is padded here
        if "truncation" in settings:
            if "truncation" in more:
                raise InputError("truncation is given twice, by itself and in tokenize_kwargs; give it once")
            more["truncation"] = settings["truncation"]
        if "add_special_tokens" in more:
            more["add_special_tokens"] = check_switch("add_special_tokens", more["add_special_tokens"], True)
        wanted = settings.get("return_tensors")
        wanted = (isinstance(wanted, str) and wanted == "pt") or check_switch("return_tensors", wanted)
        return {"return_tensors": wanted, "tokenize_kwargs": more}

    def prepare(self, items: list[Any], settings: dict[str, Any]) -> list[Job]:
        """One row a text."""
        return [Job([Row(e.ids)]) for e in self.tokenize(items, **settings["tokenize_kwargs"])]

    def run(self, rows: list[Row], settings: dict[str, Any]) -> Results:
        """Hidden states (tokens, hidden) of each row."""
        states = self.model.encode(self.pack(rows)).last_TM
        return read(states.float(), lambda states: states.split([len(row.ids) for row in rows]))

    def finish(self, job: Job, settings: dict[str, Any]) -> Any:
        """A tensor or nested lists of shape (1, tokens, hidden)."""
        states = job.results[0][None]
        return states.clone() if settings["return_tensors"] else states.tolist()
