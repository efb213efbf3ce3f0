"""text-ranking: documents in the order of how well they answer a query, by a cross-encoder or by vectors."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F

from modernbert.auto import kind_of, kind_of_adapter
from modernbert.checks import check_text
from modernbert.errors import CheckpointError, InputError, shown
from modernbert.io.hub import Source
from modernbert.models.base import PreTrainedModel
from modernbert.models.sentence_layout import CROSS_ENCODER, LATE_INTERACTION, MODEL, Contents, contents_of, settings_of
from modernbert.pipelines.base import Job, OptionsT, Pipeline, Results, Row, RowT
from modernbert.pipelines.inputs import check_fields, check_texts
from modernbert.pipelines.late_interaction import VectorsOfTokens, VectorsRow, scores_of
from modernbert.pipelines.options import CrossEncoderOptions, RankingOptions
from modernbert.pipelines.sentence_embedding import EmbeddingPipeline, SpannedRow, VectorKind
from modernbert.pipelines.text_classification import FUNCTIONS, ClassifierPipeline
from modernbert.retrieval.maxsim import maxsim
from modernbert.retrieval.multi_vector import MultiVectorEncoder

# What a cross-encoder's checkpoint may name to make scores of logits; only the name is read.
_ACTIVATIONS = {
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "torch.nn.modules.linear.Identity": "none",
    "torch.nn.modules.activation.Tanh": "tanh",
}
_SIMILARITIES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    # Sums document by document: a matrix product's order of sums depends on how many there are (docs/invariance.md).
    "cosine": lambda query, documents: (F.normalize(documents, dim=-1) * F.normalize(query, dim=-1)).sum(-1),
    "dot": lambda query, documents: (documents * query).sum(-1),
    "euclidean": lambda query, documents: -(documents - query).norm(dim=-1),
    "manhattan": lambda query, documents: -(documents - query).abs().sum(-1),
}


class TextRankingPipeline(Pipeline[OptionsT, RowT, torch.Tensor], abc.ABC):
    """Ranks documents by a query.

    A sequence classifier with one label scores query and document together (a cross-encoder, with the activation that
    its checkpoint names, or the sigmoid); any other checkpoint compares their vectors, with the prompts "query" and
    "document" where it has them, by the similarity it names, or by MaxSim where it keeps a vector for every token.

    A call takes `query` and `documents` (a text and a list of texts), or a dict {"query", "documents"}, a list of
    these or an iterable of them.

    For each query it gives a list of {"index", "score", "text"}, best first; "index" is the document's number from 0.
    """

    task = "text-ranking"
    fields = ("query", "documents")
    second = "documents"

    @classmethod
    def load(cls, model: Any, tokenizer: Any = None, **kwargs: Any) -> Self:
        """Load a cross-encoder or an encoder of sentences, whichever the checkpoint is."""
        if cls is not TextRankingPipeline:
            return super().load(model, tokenizer, **kwargs)
        chosen: type[TextRankingPipeline[Any, Any]] = EmbeddingRanking
        if isinstance(model, str | Path):
            source = Source.pop_from(model, dict(kwargs))
            contents = contents_of(source)
            body = source.inside(contents.inner)
            kind = kind_of_adapter(kwargs.get("adapter"))
            if contents.kind == CROSS_ENCODER or (
                contents.kind == MODEL and (kind or kind_of(body.read_json("config.json"))) == "sequence-classification"
            ):
                chosen = CrossEncoderRanking
            elif contents.kind == LATE_INTERACTION:
                chosen = LateInteractionRanking
        elif isinstance(model, MultiVectorEncoder):
            chosen = LateInteractionRanking
        elif isinstance(model, PreTrainedModel) and model.base_model is not model:
            chosen = CrossEncoderRanking
        return chosen.load(model, tokenizer, **kwargs)  # type: ignore[return-value]

    def prepare(self, items: list[Any], options: OptionsT) -> list[list[RowT]]:
        rows = []
        for item in items:
            check_fields(item, self.fields, self.task)
            check_text(item["query"], "a query")
            documents = check_texts("documents", item["documents"])
            kept = [document for _, document in _kept(documents)]
            if not kept:
                raise documents[0]
            for document in kept:
                check_text(document, "a document")
            rows.append(self.rows(item["query"], kept, options))
        return rows

    def without_refused(self, query: Any, documents: list[Any], **options: Any) -> list[Any]:
        """The documents, with the `InputError` instead of each that cannot be ranked; a call leaves these out.

        Raises:
            InputError: the query or an option cannot be served.
        """
        resolved = self.resolve(self.given(options))
        check_text(query, "a query")
        found = list(documents)
        for i, document in _kept(documents):
            try:
                self.rows(query, [check_text(document, "a document")], resolved)
            except InputError as error:
                found[i] = error
        return found

    @abc.abstractmethod
    def rows(self, query: str, documents: list[str], options: OptionsT) -> list[RowT]:
        """What the model sees of a query and its documents."""

    @abc.abstractmethod
    def scores(self, results: list[torch.Tensor], options: OptionsT) -> list[float]:
        """A score a document, from the results of all rows."""

    def finish(self, job: Job[RowT, torch.Tensor], options: OptionsT) -> list[dict[str, Any]]:
        scored = zip(_kept(job.item["documents"]), self.scores(job.results, options), strict=True)
        answers = [{"index": i, "score": score, "text": document} for (i, document), score in scored]
        answers.sort(key=lambda answer: -answer["score"])
        return answers[: getattr(options, "top_k", None)]


def _kept(documents: list[Any]) -> list[tuple[int, Any]]:
    """Documents with their numbers, without the errors that stand for those that are left out."""
    return [(i, document) for i, document in enumerate(documents) if not isinstance(document, InputError)]


class CrossEncoderRanking(TextRankingPipeline[CrossEncoderOptions, Row], ClassifierPipeline[CrossEncoderOptions]):
    """Ranks by a classifier with one label that reads query and document together."""

    options = CrossEncoderOptions

    def __init__(self, model: Any, tokenizer: Any, **options: Any) -> None:
        super().__init__(model, tokenizer, **options)
        if model.config.num_labels != 1:
            raise InputError(f"text-ranking needs a classifier with one label; this one has {model.config.num_labels}")

    @classmethod
    def load(cls, model: Any, tokenizer: Any = None, **kwargs: Any) -> Self:
        """Load a cross-encoder, with the activation that its folder names."""
        if isinstance(model, str | Path):
            source = Source.pop_from(model, dict(kwargs))
            contents = contents_of(source)
            contents.refuse_unserved()
            body = source.inside(contents.inner)
            # sentence-transformers' cross-encoders cut texts over the context
            usual = {"activation": _activation_of(contents, body), "truncation": contents.kind == CROSS_ENCODER or None}
            settings = settings_of(source, contents.inner)
            kwargs["subfolder"] = body.subfolder
            prompt = settings.get("prompts", {}).get(settings.get("default_prompt_name"))
            kwargs = usual | ({} if prompt is None else {"prompt": prompt}) | kwargs
        return super().load(model, tokenizer, **kwargs)

    def rows(self, query: str, documents: list[str], options: CrossEncoderOptions) -> list[Row]:
        """One row a document, together with the query."""
        asked = options.prompt + query
        pairs = self.tokenize([asked] * len(documents), documents, **options.tokenizing)
        return [Row(encoding.ids) for encoding in pairs]

    def scores(self, results: list[torch.Tensor], options: CrossEncoderOptions) -> list[float]:
        scores: list[float] = FUNCTIONS[options.activation](torch.cat(results)).tolist()
        return scores


class EmbeddingRanking(TextRankingPipeline[RankingOptions, SpannedRow], EmbeddingPipeline[RankingOptions]):
    """Ranks by the similarity of vectors."""

    needs = "a classifier with one label, which reads query and document together, or an encoder, which makes vectors"
    options = RankingOptions

    def resolve(self, options: RankingOptions) -> RankingOptions:
        """Texts are cut if the checkpoint's layout has it so."""
        cut = (self.model.is_layout or None) if options.truncation is None else options.truncation
        return dataclasses.replace(options, truncation=cut)

    def rows(self, query: str, documents: list[str], options: RankingOptions) -> list[SpannedRow]:
        """The query's row, then one a document."""
        out = []
        for name, texts in (("query", [query]), ("document", documents)):
            prompt = self.prompt(name if name in self.embedding.prompts else None)
            skip = self.skipped(prompt)
            for encoding in self.tokenize([prompt + text for text in texts], **options.tokenizing):
                length = len(encoding.ids)
                out.append(SpannedRow(encoding.ids, [(min(skip, length), length)]))
        return out

    def run(self, rows: list[SpannedRow], options: RankingOptions) -> Results[torch.Tensor]:
        """The vector of each row, or the vectors of its tokens, which have length one."""
        poolings = self.embedding.poolings
        return self.vectors(rows, VectorKind(poolings, normalize=not poolings))

    def scores(self, results: list[torch.Tensor], options: RankingOptions) -> list[float]:
        """Similarities of the query's vector and the documents'."""
        query, *documents = results
        if not self.embedding.poolings:
            return [float(score) for score in np.atleast_1d(maxsim(query, documents))]
        scores: list[float] = _SIMILARITIES[self.embedding.similarity](query[0], torch.cat(documents)).tolist()
        return scores


class LateInteractionRanking(TextRankingPipeline[RankingOptions, VectorsRow], VectorsOfTokens[RankingOptions]):
    """Ranks by the vectors of tokens."""

    options = RankingOptions

    def resolve(self, options: RankingOptions) -> RankingOptions:
        """Texts are cut, as in `late-interaction`."""
        return dataclasses.replace(options, truncation=True if options.truncation is None else options.truncation)

    def rows(self, query: str, documents: list[str], options: RankingOptions) -> list[VectorsRow]:
        """The query's row, then one a document."""
        how = options.truncation, options.max_length
        return [
            *self.rows_of([query], True, self.prompt(True), *how),
            *self.rows_of(documents, False, self.prompt(False), *how),
        ]

    def run(self, rows: list[VectorsRow], options: RankingOptions) -> Results[torch.Tensor]:
        """The vectors of each row."""
        return self.vectors(rows, self.model.settings.pool_factor)

    def scores(self, results: list[torch.Tensor], options: RankingOptions) -> list[float]:
        """Similarities of the query and the documents."""
        query, *documents = results
        return [float(score) for score in scores_of(self.model.settings.similarity, [query], documents)[0]]


def _activation_of(contents: Contents, body: Source) -> str:
    """The activation that a cross-encoder's folder names, in any of the places where it was written over time."""
    config = body.read_json("config.json")
    older = config.get("sentence_transformers")
    path = (
        contents.about.get("activation_fn")
        or (older.get("activation_fn") if isinstance(older, dict) else None)
        or config.get("sbert_ce_default_activation_function")
    )
    if path is None:
        return "sigmoid"
    if not isinstance(path, str) or path not in _ACTIVATIONS:
        raise CheckpointError(f"the folder names the activation {shown(path)}; known are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[path]
