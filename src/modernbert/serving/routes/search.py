"""Searches in indexes of documents."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import Field

from modernbert.errors import listed
from modernbert.indexing.index import Result, marked, reranked
from modernbert.indexing.options import SearchOptions
from modernbert.serving.bodies import Body, Text, Whole, example
from modernbert.serving.problems import RequestError, UnknownModelError
from modernbert.serving.replies import Json
from modernbert.serving.state import state_of

router = APIRouter(tags=["Search"])

_MOST = 1000  # passages that are given or reranked
_LONGEST = 1000  # characters of a condition


# What is no comparison: comments, and calls of functions, which could make texts of any size.
_CALLS = re.compile(r"--|/\*|(?<!\w)(?!(?:in|and|or|not|between|like)\s*\()[\w\"`]+\s*\(", re.IGNORECASE)


def _check_condition(where: str) -> None:
    if found := _CALLS.search(re.sub(r"'(?:[^']|'')*'", "''", where)):
        raise RequestError(f"where holds {found[0]!r}; it may compare columns with values, and call no function")


class SearchRequest(Body):
    """A question to an index."""

    model_config = example(query="when is the rent due?", top_k=3, where="path LIKE '%.pdf'")

    query: Text
    index: str | None = Field(None, description="Name of the index; by default the first.")
    top_k: Whole = Field(10, ge=1, le=_MOST)
    where: str | None = Field(None, max_length=_LONGEST, description="Condition on columns, in SQL.")
    by: Literal["both", "vectors", "words"] = "both"
    rerank: str | None = Field(None, description="Name of the model that orders the best passages; by default none.")
    reranked: Whole = Field(50, ge=1, le=_MOST, description="Passages that it reads.")


@router.post("/v1/search", summary="Passages of an index that answer a question")
async def search(given: SearchRequest, request: Request) -> Json:
    """The passages that `modernbert search` finds, with the same scores."""
    state = state_of(request)
    name = next(iter(state.indexes), None) if given.index is None else given.index
    if name is None or name not in state.indexes:
        asked = "no index" if name is None else f"no index {name!r}"
        raise UnknownModelError(f"there is {asked}; this server has {listed(state.indexes) or 'none'}")
    index = state.indexes[name]
    _check_condition(given.where or "")
    chosen = SearchOptions(top_k=given.top_k, where=given.where, by=given.by, reranked=given.reranked)
    prompt = {**index.prompt("query"), "truncation": None}
    _, _, answered = await state.answer(request, "sentence-embedding", name, [given.query], prompt)
    loop, (vector,) = asyncio.get_running_loop(), answered.answers
    found: list[Result] = await loop.run_in_executor(None, index.proposed, given.query, vector, chosen)
    tokens = answered.tokens
    if given.rerank is not None and found:
        best = found[: given.reranked]
        item = {"query": given.query, "documents": [one.text for one in best]}
        options = {"truncation": True}
        _, _, answered = await state.answer(request, "text-ranking", given.rerank, [item], options, texts=len(best) + 1)
        found, tokens = reranked(best, answered.answers[0]), tokens + answered.tokens
    results = [dataclasses.asdict(one) for one in marked(found[: given.top_k], given.query)]
    return Json({"index": name, "results": results, "usage": {"tokens": tokens}})
