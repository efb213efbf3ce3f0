"""Reranking in the shapes of Cohere and Jina (`documents`) and of text-embeddings-inference (`texts`)."""

from __future__ import annotations

import uuid
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from modernbert.serving.problems import RequestError
from modernbert.serving.replies import Json
from modernbert.serving.state import state_of

router = APIRouter(tags=["Reranking"])


class RerankRequest(BaseModel):
    """A query, and documents or texts."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"query": "What do plants need?", "documents": ["Plants need light.", "Rain fell."], "top_n": 1}
            ]
        }
    )

    query: str
    documents: list[str | dict[str, Any]] | None = Field(None, description="Texts, or objects with a text.")
    texts: list[str] | None = Field(None, description="Texts, in text-embeddings-inference's shape.")
    model: str | None = Field(None, description="Name of the model; by default the first that ranks.")
    top_n: int | None = Field(None, ge=1, description="Give the best ones only.")
    return_documents: bool = False
    return_text: bool = False
    raw_scores: bool = Field(False, description="A cross-encoder's logits instead of scores from 0 to 1.")
    truncate: bool | None = Field(None, description="Cut pairs that are too long, instead of refusing them.")


@router.post("/rerank", summary="Documents in the order of how well they answer a query")
@router.post("/v1/rerank", summary="Documents in the order of how well they answer a query")
@router.post("/v2/rerank", summary="Documents in the order of how well they answer a query")
async def rerank(given: RerankRequest, request: Request) -> Json:
    """The reply has the shape of the request: Cohere's and Jina's to `documents`, a plain list to `texts`."""
    if (given.documents is None) == (given.texts is None):
        raise RequestError("give either documents or texts")
    documents = given.texts if given.documents is None else [_text(document) for document in given.documents]
    assert documents is not None
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
    if given.documents is None:
        shown = ("index", "score", "text") if given.return_text else ("index", "score")
        return Json([{key: answer[key] for key in shown} for answer in ranked])
    results = []
    for answer in ranked:
        result: dict[str, Any] = {"index": answer["index"], "relevance_score": answer["score"]}
        if given.return_documents:
            result["document"] = {"text": answer["text"]}
        results.append(result)
    version = "2" if request.url.path.startswith("/v2") else "1"
    units = {"search_units": 1, "total_tokens": answered.tokens}
    meta = {"api_version": {"version": version}, "billed_units": units, "truncated": answered.cut}
    usage = {"total_tokens": answered.tokens, "prompt_tokens": answered.tokens}
    return Json({"id": str(uuid.uuid4()), "model": name, "results": results, "meta": meta, "usage": usage})


def _text(document: str | dict[str, Any]) -> str:
    if isinstance(document, str):
        return document
    if not isinstance(document.get("text"), str):
        raise RequestError(f"a document has {', '.join(map(str, document)) or 'nothing'}; it needs a text")
    text: str = document["text"]
    return text
