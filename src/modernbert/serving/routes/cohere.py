"""Reranking in the shapes of Cohere and Jina (`documents`) and of text-embeddings-inference (`texts`)."""

from __future__ import annotations

import uuid
from typing import Any

from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field

from modernbert.serving.bodies import Body, Text, Whole
from modernbert.serving.problems import RequestError
from modernbert.serving.replies import Json
from modernbert.serving.state import path_of, state_of

router = APIRouter(tags=["Reranking"])


class Document(Body):
    """A document as an object; other keys are ignored."""

    text: Text


def _either(schema: dict[str, Any]) -> None:
    """Say that documents or texts are given, and not both."""
    schema["examples"] = [
        {"query": "What do plants need?", "documents": ["Plants need light.", "Rain fell."], "top_n": 1}
    ]
    for name, other in (("documents", "texts"), ("texts", "documents")):
        schema["properties"][name] |= {"minItems": 1}
        del schema["properties"][name]["default"]
        schema.setdefault("oneOf", []).append({"required": [name], "not": {"required": [other]}})


class RerankRequest(Body):
    """A query, and documents or texts."""

    model_config = ConfigDict(strict=True, json_schema_extra=_either)

    query: Text
    documents: list[Text | Document] = Field([], description="Texts, or objects with a text.")
    texts: list[Text] = Field([], description="Texts, in text-embeddings-inference's shape.")
    model: str | None = Field(None, description="Name of the model; by default the first that ranks.")
    top_n: Whole | None = Field(None, ge=1, description="Give the best ones only.")
    return_documents: bool = False
    return_text: bool = False
    raw_scores: bool = Field(False, description="A cross-encoder's logits instead of scores from 0 to 1.")
    truncate: bool | None = Field(None, description="Cut pairs that are too long, instead of refusing them.")


@router.post("/rerank", summary="Documents in the order of how well they answer a query")
@router.post("/v1/rerank", summary="Documents in the order of how well they answer a query")
@router.post("/v2/rerank", summary="Documents in the order of how well they answer a query")
async def rerank(given: RerankRequest, request: Request) -> Json:
    """The reply has the shape of the request: Cohere's and Jina's to `documents`, a plain list to `texts`."""
    if len(given.model_fields_set & {"documents", "texts"}) != 1:
        raise RequestError("give either documents or texts")
    is_tei = "texts" in given.model_fields_set
    documents = given.texts if is_tei else [d if isinstance(d, str) else d.text for d in given.documents]
    if not documents:
        raise RequestError(f"{'texts' if is_tei else 'documents'} is empty; give at least one")
    state = state_of(request)
    _, pipeline = state.models.find(given.model, "text-ranking")
    options: dict[str, Any] = {"top_k": given.top_n, "truncation": given.truncate}
    if given.raw_scores and "activation" in pipeline.options.__dataclass_fields__:
        options["activation"] = "none"  # scores by vectors are raw already
    item = {"query": given.query, "documents": documents}
    name, _, answered = await state.answer(
        request, "text-ranking", given.model, [item], options, texts=len(documents) + 1
    )
    (ranked,) = answered.answers
    if is_tei:
        shown = ("index", "score", "text") if given.return_text else ("index", "score")
        return Json([{key: answer[key] for key in shown} for answer in ranked])
    results = []
    for answer in ranked:
        result: dict[str, Any] = {"index": answer["index"], "relevance_score": answer["score"]}
        if given.return_documents:
            result["document"] = {"text": answer["text"]}
        results.append(result)
    version = "2" if path_of(request.scope).startswith("/v2") else "1"
    units = {"search_units": 1, "total_tokens": answered.tokens}
    meta = {"api_version": {"version": version}, "billed_units": units, "truncated": answered.cut}
    usage = {"total_tokens": answered.tokens, "prompt_tokens": answered.tokens}
    return Json({"id": str(uuid.uuid4()), "model": name, "results": results, "meta": meta, "usage": usage})
