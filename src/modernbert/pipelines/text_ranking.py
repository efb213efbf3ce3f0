"""text-ranking: documents in the order of how well they answer a query, by a cross-encoder or by vectors."""

from __future__ import annotations

import abc
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F

from modernbert.auto import kind_of
from modernbert.errors import CheckpointError, InputError, shown
from modernbert.io.hub import Source
from modernbert.models.base import PreTrainedModel
from modernbert.models.sentence_layout import CROSS_ENCODER, MODEL, Contents, contents_of, settings_of
from modernbert.pipelines.base import Job, Pipeline, Row
from modernbert.pipelines.checks import check_choice, check_count, check_fields, check_text
from modernbert.pipelines.sentence_embedding import EmbeddingPipeline, Spans, maxsim
from modernbert.pipelines.text_classification import ClassifierPipeline

# What a cross-encoder's checkpoint may name to make scores of logits; only the name is read.
_ACTIVATIONS = {
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "torch.nn.modules.linear.Identity": "none",
    "torch.nn.modules.activation.Tanh": "tanh",
}
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid": torch.sigmoid,
    "none": lambda logits: logits,
    "tanh": torch.tanh,
}
_SIMILARITIES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    # Sums document by document: a matrix product's order of sums depends on how many there are (docs/invariance.md).
    "cosine": lambda query, documents: (F.normalize(documents, dim=-1) * F.normalize(query, dim=-1)).sum(-1),
    "dot": lambda query, documents: (documents * query).sum(-1),
    "euclidean": lambda query, documents: -(documents - query).norm(dim=-1),
    "manhattan": lambda query, documents: -(documents - query).abs().sum(-1),
}


class TextRankingPipeline(Pipeline, abc.ABC):
    """Ranks documents by a query.

    A sequence classifier with one label scores query and document together (a cross-encoder, with the activation that
    its checkpoint names, or the sigmoid); any other checkpoint compares their vectors, with the prompts "query" and
    "document" where it has them, by the similarity it names, or by MaxSim where it keeps a vector for every token.

    A call takes `query` and `documents` (a text and a list of texts), or a dict {"query", "documents"}, a list of
    these or an iterable of them. Options: `top_k` (documents to give; all), `activation` ("sigmoid", "none", "tanh";
    for cross-encoders), `prompt` (what to put before the query; for cross-encoders, whose checkpoint may name one),
    `truncation` (cut texts over the context; if not given, they are cut if the checkpoint is in
    sentence-transformers' layout, and refused otherwise).

    For each query it gives a list of {"index", "score", "text"}, best first; "index" is the document's number from 0.
    """

    task = "text-ranking"

    @classmethod
    def load(cls, model: Any, tokenizer: Any = None, **kwargs: Any) -> Self:
        """Load a cross-encoder or an encoder of sentences, whichever the checkpoint is."""
        if cls is not TextRankingPipeline:
            return super().load(model, tokenizer, **kwargs)
        chosen: type[TextRankingPipeline] = EmbeddingRanking
        if isinstance(model, str | Path):
            source = Source.pop_from(model, dict(kwargs))
            contents = contents_of(source)
            body = source.inside(contents.inner)
            if contents.kind == CROSS_ENCODER or (
                contents.kind == MODEL and kind_of(body.read_json("config.json")) == "sequence-classification"
            ):
                chosen = CrossEncoderRanking
        elif isinstance(model, PreTrainedModel) and model.base_model is not model:
            chosen = CrossEncoderRanking
        return chosen.load(model, tokenizer, **kwargs)  # type: ignore[return-value]

    def __call__(self, inputs: Any = None, documents: Any = None, *, query: Any = None, **options: Any) -> Any:
        """Answer inputs, or `(query, documents)`; see the class and `Pipeline.__call__`."""
        if documents is not None and query is None:
            inputs, query = None, inputs
        if (inputs is None) == (query is None and documents is None):
            raise InputError("give query and documents, or dicts that hold them, and not both")
        return super().__call__({"query": query, "documents": documents} if inputs is None else inputs, **options)

    def prepare(self, items: list[Any], settings: dict[str, Any]) -> list[Job]:
        """Rows of each query and its documents."""
        jobs = []
        for item in items:
            check_fields(item, ["query", "documents"], self.task)
            check_text(item["query"], "a query")
            documents = item["documents"]
            if not isinstance(documents, list | tuple) or not documents:
                raise InputError(f"documents is {shown(documents)}; give a list of at least one text")
            # Errors stand for documents that are left out; the others keep their numbers.
            kept = [(i, document) for i, document in enumerate(documents) if not isinstance(document, InputError)]
            if not kept:
                raise documents[0]
            for _, document in kept:
                check_text(document, "a document")
            jobs.append(Job(self.rows(item["query"], [document for _, document in kept], settings), kept))
        return jobs

    def without_refused(self, query: Any, documents: list[Any], **options: Any) -> list[Any]:
        """The documents, with the `InputError` instead of each that cannot be ranked; a call leaves these out.

        Raises:
            InputError: the query or an option cannot be served.
        """
        settings = self.settle({**self.defaults, **self._checked(options)})
        check_text(query, "a query")

        def tried(document: Any) -> Any:
            try:
                self.rows(query, [check_text(document, "a document")], settings)
            except InputError as error:
                return error
            return document

        return [document if isinstance(document, InputError) else tried(document) for document in documents]

    @abc.abstractmethod
    def rows(self, query: str, documents: list[str], settings: dict[str, Any]) -> list[Row]:
        """What the model sees of a query and its documents."""

    @abc.abstractmethod
    def scores(self, results: list[Any], settings: dict[str, Any]) -> list[float]:
        """A score a document, from the results of all rows."""

    def finish(self, job: Job, settings: dict[str, Any]) -> Any:
        """Documents, best first."""
        scores = self.scores(job.results, settings)
        order = sorted(range(len(scores)), key=lambda i: -scores[i])[: settings["top_k"]]
        return [{"index": job.context[i][0], "score": scores[i], "text": job.context[i][1]} for i in order]


class CrossEncoderRanking(TextRankingPipeline, ClassifierPipeline):
    """Ranks by a classifier with one label that reads query and document together."""

    options = ("top_k", "activation", "prompt", "truncation")

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
            usual = {"activation": _activation_of(contents, body), "truncation": contents.kind == CROSS_ENCODER}
            settings = settings_of(source, contents.inner)
            kwargs["subfolder"] = body.subfolder
            prompt = settings.get("prompts", {}).get(settings.get("default_prompt_name"))
            kwargs = usual | ({} if prompt is None else {"prompt": prompt}) | kwargs
        return super().load(model, tokenizer, **kwargs)

    def settle(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Defaults, checked."""
        name = "sigmoid" if settings.get("activation") is None else settings["activation"]
        check_choice("activation", name, tuple(ACTIVATIONS))
        prompt = "" if settings.get("prompt") is None else settings["prompt"]
        if not isinstance(prompt, str):
            raise InputError(f"prompt is {shown(prompt)}; it must be a string")
        cut = settings.get("truncation", False)
        return {**_common(settings), "activation": name, "prompt": prompt, "truncation": cut}

    def rows(self, query: str, documents: list[str], settings: dict[str, Any]) -> list[Row]:
        """One row a document, together with the query."""
        asked = settings["prompt"] + query
        pairs = self.tokenize([asked] * len(documents), documents, truncation=settings["truncation"])
        return [Row(encoding.ids) for encoding in pairs]

    def scores(self, results: list[Any], settings: dict[str, Any]) -> list[float]:
        """Activated logits."""
        scores: list[float] = ACTIVATIONS[settings["activation"]](torch.cat(results)).tolist()
        return scores


class EmbeddingRanking(TextRankingPipeline, EmbeddingPipeline):
    """Ranks by the likeness of vectors."""

    needs = "a classifier with one label, which reads query and document together, or an encoder, which makes vectors"
    options = ("top_k", "truncation")

    def settle(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Defaults, checked."""
        prompts = self.embedding.prompts
        tokens = not self.embedding.poolings
        return {
            **_common(settings),
            "query": self.prompt("query" if "query" in prompts else None),
            "document": self.prompt("document" if "document" in prompts else None),
            "poolings": self.embedding.poolings,
            "tokens": tokens,
            "normalize": tokens,
            "truncation": self.usual_truncation(settings.get("truncation")),
        }

    def rows(self, query: str, documents: list[str], settings: dict[str, Any]) -> list[Row]:
        """The query's row, then one a document."""
        out = []
        for prompt, texts in ((settings["query"], [query]), (settings["document"], documents)):
            skip = self.skipped(prompt)
            for encoding in self.tokenize([prompt + text for text in texts], truncation=settings["truncation"]):
                length = len(encoding.ids)
                out.append(Row(encoding.ids, Spans([(min(skip, length), length)])))
        return out

    def scores(self, results: list[Any], settings: dict[str, Any]) -> list[float]:
        """Similarities of the query's vector and the documents'."""
        query, *documents = results
        if settings["tokens"]:
            return [maxsim(query.numpy(), np.asarray(document)) for document in documents]
        scores: list[float] = _SIMILARITIES[self.embedding.similarity](query[0], torch.cat(documents)).tolist()
        return scores


def _common(settings: dict[str, Any]) -> dict[str, Any]:
    top_k = settings.get("top_k")
    return {"top_k": None if top_k is None else check_count("top_k", top_k)}


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
