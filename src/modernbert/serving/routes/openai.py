"""OpenAI's API: embeddings and models."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import orjson
from fastapi import APIRouter, Request, Response
from pydantic import Field

from modernbert.pipelines.base import Pipeline, Row
from modernbert.pipelines.sentence_embedding import SpannedRow
from modernbert.serving.bodies import Body, TextsOrIds, Whole, example
from modernbert.serving.problems import UnknownModelError
from modernbert.serving.replies import Encoded, Json
from modernbert.serving.state import check_ids, state_of
from modernbert.serving.vectors import BYTES, as_bytes, as_dtype, base64_reply

router = APIRouter(tags=["OpenAI"])


class EmbeddingsRequest(Body):
    """Texts, or the ids of their tokens."""

    model_config = example(input=["A cat sat.", "Rain fell."])

    input: TextsOrIds = Field(description="A text, token ids, or a list of either.")
    model: str | None = Field(None, description="Name of the model; by default the first that makes vectors.")
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Whole | None = Field(None, ge=1, description="Keep the first dimensions, for models trained for it.")
    user: str | None = Field(None, description="Not used.")
    output_dtype: Literal["float32", "float16", "int8", "binary", "ubinary"] = Field(
        "float32", description="Type of the numbers: int8 is 127 times the vector of length one; binary is signs."
    )
    normalize: bool | None = Field(None, description="Scale vectors to length one; by default as the model says.")
    prompt_name: str | None = Field(None, description="Name of the model's prompt, such as query.")
    truncate: bool | None = Field(None, description="Cut texts that are too long, instead of refusing them.")


@router.post("/v1/embeddings", summary="Vectors of texts")
@router.post("/embeddings", include_in_schema=False)
async def embeddings(given: EmbeddingsRequest, request: Request) -> Response:
    """A vector of each text. With the header `Accept: application/octet-stream` the reply is their bytes alone, one
    vector after another, and the header `X-Shape` says how many there are and their dimensions."""
    items, prepare = _inputs(given.input)
    options = {
        "truncate_dim": given.dimensions,
        "normalize": given.normalize,
        "prompt_name": given.prompt_name,
        "truncation": given.truncate,
    }
    name, _, answered = await state_of(request).answer(
        request, "sentence-embedding", given.model, items, options, prepare=prepare
    )
    vectors = as_dtype(np.stack(answered.answers), given.output_dtype)
    if BYTES in request.headers.get("accept", ""):
        return as_bytes(vectors)
    if given.encoding_format == "float":
        rows = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)]
        usage = {"prompt_tokens": answered.tokens, "total_tokens": answered.tokens}
        return Json({"object": "list", "data": rows, "model": name, "usage": usage, "truncated": answered.cut})
    rest = b'"model":%b,"usage":{"prompt_tokens":%d,"total_tokens":%d},"truncated":%d}'
    rest %= (orjson.dumps(name), answered.tokens, answered.tokens, answered.cut)
    return Encoded(base64_reply(vectors, rest))


def _inputs(given: Any) -> tuple[list[Any], Any]:
    """Inputs of a pipeline, and what makes rows of them where they are token ids."""
    if isinstance(given, str):
        return [given], None
    if all(isinstance(item, str) for item in given):
        return given, None
    return ([given] if isinstance(given[0], int) else given), ids_as_rows


def ids_as_rows(pipeline: Pipeline[Any, Any, Any], items: list[list[int]], options: Any) -> list[list[Row]]:
    """Rows of token ids, which are taken as they are."""
    for ids in items:
        check_ids(ids, pipeline)
    return [[SpannedRow(ids, [(0, len(ids))])] for ids in items]


@router.get("/v1/models", summary="Models of this server")
async def models(request: Request) -> Json:
    """Each model with the tasks that it can do and its context in tokens."""
    served = state_of(request).models.served.values()
    return Json({"object": "list", "data": [_described(one) for one in served]})


@router.get("/v1/models/{name:path}", summary="One model")
async def model(name: str, request: Request) -> Json:
    """A model by its name."""
    served = state_of(request).models.served
    if name not in served:
        raise UnknownModelError(f"there is no model {name!r}; this server has {', '.join(sorted(served))}")
    return Json(_described(served[name]))


def _described(served: Any) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "modernbert",
        "tasks": list(served.pipelines),
        "max_model_len": served.context,
    }
