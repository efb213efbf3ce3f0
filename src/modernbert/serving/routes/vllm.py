"""vLLM's API for models that do not generate."""

from __future__ import annotations

import time
import uuid
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import AliasChoices, Field

from modernbert.serving.bodies import Body, Texts, example
from modernbert.serving.problems import RequestError
from modernbert.serving.replies import Json
from modernbert.serving.state import state_of

router = APIRouter(tags=["vLLM"])


class ClassifyRequest(Body):
    model_config = example(input=["I like it."])

    input: Texts
    model: str | None = None
    truncate: bool | None = None


class ScoreRequest(Body):
    model_config = example(text_1="What do plants need?", text_2=["Plants need light."])

    text_1: Texts = Field(validation_alias=AliasChoices("text_1", "queries"))
    text_2: Texts = Field(validation_alias=AliasChoices("text_2", "documents"))
    model: str | None = None
    truncate: bool | None = None


class PoolingRequest(Body):
    model_config = example(input="A cat sat.")

    input: Texts
    model: str | None = None
    task: Literal["token_embed", "embed"] = Field("token_embed", description="Vectors of tokens, or of texts.")
    truncate: bool | None = None


def _listed(texts: Texts) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


def _reply(prefix: str, name: str, data: list[Any], tokens: int) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": name,
        "data": data,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
    }


@router.post("/classify", summary="Probabilities of a classifier's labels")
@router.post("/v1/classify", include_in_schema=False)
async def classify(given: ClassifyRequest, request: Request) -> Json:
    """For each text its best label and the probabilities of all, in the order of the labels' numbers."""
    state = state_of(request)
    options = {"top_k": 2**31 - 1, "truncation": given.truncate}
    name, pipeline, answered = await state.answer(
        request, "text-classification", given.model, _listed(given.input), options
    )
    labels = list(pipeline.model.config.id2label.values())
    data = []
    for index, answer in enumerate(answered.answers):
        scores = {one["label"]: one["score"] for one in answer}
        probabilities = [scores[label] for label in labels]
        data.append({"index": index, "label": answer[0]["label"], "probs": probabilities, "num_classes": len(labels)})
    return Json(_reply("classify", name, data, answered.tokens))


@router.post("/score", summary="Scores of pairs of texts")
@router.post("/v1/score", include_in_schema=False)
async def score(given: ScoreRequest, request: Request) -> Json:
    """A score of each pair: one first text with each second one, or the texts of two equally long lists in turn."""
    first, second = _listed(given.text_1), _listed(given.text_2)
    if len(first) == 1:
        items = [{"query": first[0], "documents": second}]
    elif len(first) == len(second):
        items = [{"query": one, "documents": [other]} for one, other in zip(first, second, strict=True)]
    else:
        raise RequestError(
            f"text_1 holds {len(first)} texts and text_2 {len(second)}; give one, or as many as of the other"
        )
    if not second:
        raise RequestError("text_2 is empty; give at least one text")
    options = {"truncation": given.truncate}
    name, _, answered = await state_of(request).answer(
        request, "text-ranking", given.model, items, options, texts=len(second) + len(first)
    )
    if len(items) == 1:
        scores = {answer["index"]: answer["score"] for answer in answered.answers[0]}
    else:
        scores = {index: answer[0]["score"] for index, answer in enumerate(answered.answers)}
    data = [{"index": i, "object": "score", "score": scores[i]} for i in range(len(scores))]
    return Json(_reply("score", name, data, answered.tokens))


@router.post("/pooling", summary="Vectors of tokens or of texts")
async def pooling(given: PoolingRequest, request: Request) -> Json:
    """For each text the vectors of its tokens, or with the task `embed` its own vector. A model of late interaction
    gives those of documents that it compares."""
    tokens, state = given.task == "token_embed", state_of(request)
    options: dict[str, Any] = {"truncation": given.truncate}
    task = "late-interaction" if tokens and state.models.does(given.model, "late-interaction") else "sentence-embedding"
    if task == "sentence-embedding":
        options |= {"multi_vector": tokens or None, "normalize": False if tokens else None}
    name, _, answered = await state.answer(request, task, given.model, _listed(given.input), options)
    data = [{"index": i, "object": "pooling", "data": vectors} for i, vectors in enumerate(answered.answers)]
    return Json(_reply("pool", name, data, answered.tokens))
