"""feature-extraction: the last hidden state of every token."""

from __future__ import annotations

from typing import Any

import torch

from modernbert.auto import AutoModel
from modernbert.nn.backbone import Backbone
from modernbert.pipelines.base import Job, Pipeline, Results, Row, read
from modernbert.pipelines.options import FeatureExtractionOptions


class FeatureExtractionPipeline(Pipeline[FeatureExtractionOptions, Row, torch.Tensor]):
    """Hidden states of texts.

    A call takes a text, a list of texts or an iterable of them. For each text it gives numbers of shape (1, tokens,
    hidden), float32.
    """

    task = "feature-extraction"
    options = FeatureExtractionOptions
    auto_model = AutoModel
    models = (Backbone,)
    needs = "a model of this library"
    architecture = None

    def __init__(self, model: Any, tokenizer: Any, **options: Any) -> None:
        super().__init__(getattr(model, "base_model", model), tokenizer, **options)

    def prepare(self, items: list[Any], options: FeatureExtractionOptions) -> list[list[Row]]:
        return [[Row(e.ids)] for e in self.tokenize(items, **options.tokenizing)]

    def run(self, rows: list[Row], options: FeatureExtractionOptions) -> Results[torch.Tensor]:
        """Hidden states (tokens, hidden) of each row."""
        states = self.model.encode(self.pack(rows)).last_TM
        return read(states.float(), lambda states: states.split([len(row.ids) for row in rows]))

    def finish(self, job: Job[Row, torch.Tensor], options: FeatureExtractionOptions) -> torch.Tensor | list[Any]:
        """(1, tokens, hidden)."""
        states = job.results[0][None]
        return states.clone() if options.return_tensors else states.tolist()
