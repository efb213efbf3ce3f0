"""sparse-embedding: the entries of the vocabulary that a text is about, with their weights."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from modernbert.checks import check_text
from modernbert.models.heads import ModernBertForMaskedLM
from modernbert.pipelines.base import Job, Pipeline, Results, Row
from modernbert.pipelines.inputs import choose_prompt
from modernbert.pipelines.options import SparseEmbeddingOptions
from modernbert.retrieval.sparse import SparseEncoder, SparseVector, to_csr

logger = logging.getLogger(__name__)

_PROMPTS = {True: ("query",), False: ("document", "passage", "corpus")}  # the checkpoint's own, by what a text is


class SparseEmbeddingPipeline(Pipeline[SparseEmbeddingOptions, Row, SparseVector]):
    """Sparse vectors of texts, for inverted indexes and hybrid search.

    A call takes a text, a list of texts or an iterable of them; `is_query=True` encodes them as queries, by static
    weights where the checkpoint has these.

    For each text it gives, as `form` says, {"indices", "values"}: int32 entries of the vocabulary in ascending order
    and their float32 weights ("arrays"); or {token: weight}, the largest first ("tokens"). `csr` gives one matrix.
    """

    task = "sparse-embedding"
    options = SparseEmbeddingOptions
    auto_model = SparseEncoder
    models = (SparseEncoder,)
    needs = "a SparseEncoder, or an encoder with a head for masked-lm"

    def __init__(self, model: Any, tokenizer: Any, **options: Any) -> None:
        super().__init__(
            SparseEncoder(model) if isinstance(model, ModernBertForMaskedLM) else model, tokenizer, **options
        )

    @classmethod
    def load(cls, model: Any, tokenizer: Any = None, **kwargs: Any) -> Self:
        """Like `Pipeline.load`."""
        pipeline = super().load(model, tokenizer, **kwargs)
        if isinstance(model, str | Path) and not pipeline.model.is_layout:
            logger.info("%s has no settings for sparse vectors, which are good only if it was trained for them", model)
        return pipeline

    @property
    def context(self) -> int:
        """Tokens of a text at the most: what the checkpoint's folder says, or the model's context."""
        return min(super().context, self.model.settings.max_length or super().context)

    def resolve(self, options: SparseEmbeddingOptions) -> SparseEmbeddingOptions:
        """Options with the checkpoint's prompt and number of weights."""
        settings = self.model.settings
        usual = (*_PROMPTS[options.is_query], settings.default_prompt_name)
        prompt = choose_prompt(settings.prompts, usual, options.prompt_name, options.prompt)
        cut = (self.model.is_layout or None) if options.truncation is None else options.truncation
        top_k = settings.top_k if options.top_k is None else options.top_k
        return dataclasses.replace(options, prompt=prompt, prompt_name=None, truncation=cut, top_k=top_k)

    def prepare(self, items: list[Any], options: SparseEmbeddingOptions) -> list[list[Row]]:
        for text in items:
            check_text(text)
        texts, how = [(options.prompt or "") + text for text in items], options.tokenizing
        if self._is_static(options):
            how |= {"add_special_tokens": False}
        return [[Row(encoding.ids)] for encoding in self.tokenize(texts, **how)]

    def reads_states(self, row: Row, options: SparseEmbeddingOptions) -> bool:
        """Queries by static weights need no pass at all."""
        return not self._is_static(options)

    def _is_static(self, options: SparseEmbeddingOptions) -> bool:
        return options.is_query and self.model.static_V is not None

    def run(self, rows: list[Row], options: SparseEmbeddingOptions) -> Results[SparseVector]:
        """The vector of each row."""
        encoder: SparseEncoder = self.model
        if self._is_static(options):
            weights = (encoder.of_ids(row.ids) for row in rows)
        else:
            weights = (weights_V.cpu() for weights_V in encoder.weigh(self.pack(rows)))
        return [SparseVector.of(weights_V, options.top_k) for weights_V in weights]

    def finish(self, job: Job[Row, SparseVector], options: SparseEmbeddingOptions) -> Any:
        vector = job.results[0]
        if options.form == "tokens":
            return vector.tokens(self.tokenizer)
        return {"indices": vector.indices, "values": vector.values}

    def csr(self, texts: Iterable[str], **options: Any) -> Any:
        """The vectors of texts as one matrix of scipy in compressed rows, (texts, vocabulary) float32.

        Args:
            texts: in a list or any other iterable.
            options: as in a call.

        Raises:
            InputError: a text or an option cannot be served, or scipy is not installed.
        """
        answers = self(list(texts), **{**options, "form": "arrays"})
        dimensions = self.model.dimensions
        return to_csr([SparseVector(**answer, dimensions=dimensions) for answer in answers], dimensions)
