"""The application: an ordinary ASGI app, which any server can host."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from modernbert import __version__
from modernbert.pipelines.base import Pipeline
from modernbert.serving.guard import Guard
from modernbert.serving.metrics import Metrics
from modernbert.serving.models import Models
from modernbert.serving.options import ServeOptions
from modernbert.serving.problems import RequestError, ServingError, body_of, message_of, status_of
from modernbert.serving.replies import Json
from modernbert.serving.routes import cohere, completions, openai, operations, tasks, tei, vllm
from modernbert.serving.state import State

logger = logging.getLogger(__name__)

_ABOUT = """Embeddings, reranking, classification, tagging, answers and generation by ModernBERT models.

Every number is the one that the library computes offline, to the last bit, whatever else is served at the same time.
Texts that are longer than a model's context are refused unless a request asks to cut them."""


def create_app(pipelines: Mapping[str, Pipeline[Any, Any, Any]] | None = None, **options: Any) -> FastAPI:
    """An ASGI app that serves models; each of its paths is described at `/docs` and in `/openapi.json`.

    Example:
        app = create_app(model=["Alibaba-NLP/gte-modernbert-base", "rank=Alibaba-NLP/gte-reranker-modernbert-base"])

    Args:
        pipelines: loaded already, by the name that requests give as `model`.
        options: those of `modernbert serve`; see `ServeOptions`.

    Raises:
        InputError: an option is not allowed.
        NotFoundError, CheckpointError: a model cannot be loaded.
    """
    chosen = ServeOptions.of(options, "create_app")
    metrics = Metrics()
    state = State(chosen, Models(chosen, metrics, dict(pipelines or {})), metrics, chosen.keys())

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.get_running_loop().run_in_executor(None, state.models.close)

    app = FastAPI(
        title="modernbert", version=__version__, description=_ABOUT, lifespan=lifespan, default_response_class=Json
    )
    app.state.serving = state
    for part in (openai, completions, cohere, tei, vllm, tasks, operations):
        app.include_router(part.router)
    for kind in (ServingError, ValueError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _refused)
    app.add_middleware(Guard, state=state)
    return app


async def _refused(request: Request, error: Exception) -> Json:
    """The reply to a request that cannot be answered, in the shape of the API that was called."""
    headers: dict[str, str] = {}
    if isinstance(error, RequestValidationError):
        error = RequestError("; ".join(_line(problem) for problem in error.errors()[:5]))
    if isinstance(error, HTTPException):
        status, headers = error.status_code, dict(error.headers or {})
        body = body_of(request.url.path, RequestError(f"{request.method} {request.url.path}: {error.detail}"))
        return Json(body, status, headers)
    status = status_of(error)
    if status >= 500 and not isinstance(error, ServingError):
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    if isinstance(error, ServingError):
        headers = error.headers
    request.state.problem = message_of(error)
    return Json(body_of(request.url.path, error), status, headers)


def _line(problem: Mapping[str, Any]) -> str:
    if problem["type"] in ("json_invalid", "model_attributes_type"):
        return "the body is no JSON object; send one, with the header Content-Type: application/json"
    place = ".".join(str(part) for part in problem["loc"] if part != "body")
    return f"{place or 'the body'}: {problem['msg']}"
