"""The application: an ordinary ASGI app, which any server can host."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from modernbert import __version__
from modernbert.errors import listed, shown
from modernbert.pipelines.base import Pipeline
from modernbert.serving.guard import Guard
from modernbert.serving.log import AccessLog
from modernbert.serving.metrics import Metrics
from modernbert.serving.models import Models, open_indexes
from modernbert.serving.options import ServeOptions
from modernbert.serving.problems import RequestError, ServingError, body_of, message_of, status_of
from modernbert.serving.replies import Json
from modernbert.serving.routes import answers, cohere, completions, openai, operations, search, tasks, tei, vllm
from modernbert.serving.state import State, path_of

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
    log = AccessLog(chosen.log_file, metrics) if chosen.access_log else None
    indexes = open_indexes(chosen)
    given = {**(pipelines or {}), **{name: index.encoder for name, index in indexes.items()}}
    state = State(chosen, Models(chosen, metrics, given), metrics, chosen.keys(), log, indexes=indexes)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.get_running_loop().run_in_executor(None, state.close)

    app = FastAPI(
        title="modernbert", version=__version__, description=_ABOUT, lifespan=lifespan, default_response_class=Json
    )
    app.state.serving = state
    for part in (openai, completions, cohere, tei, vllm, search, tasks, answers, operations):
        app.include_router(part.router, responses=_PROBLEMS)
    for kind in (ServingError, ValueError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _refused)
    app.add_middleware(Guard, state=state)
    with contextlib.suppress(ImportError):
        from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
        from opentelemetry.trace import get_current_span

        FastAPIInstrumentor.instrument_app(app)
        state.span = get_current_span
    return app


# What any path may answer instead, beside what is wrong with a request.
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"description": said, "content": {"application/json": {"schema": {"type": "object"}}}}
    for status, said in {
        401: "The API key is missing or wrong.",
        404: "There is no such model, or none for this task.",
        408: "The request took too long to come.",
        413: "The request is too large.",
        422: "The request is wrong; the message says how.",
        429: "Too much waits already; the header Retry-After says when to come back.",
        500: "The model failed; the server's log says how.",
        503: "The server is about to end.",
        504: "The answer took too long.",
    }.items()
}


async def _refused(request: Request, error: Exception) -> Json:
    """The reply to a request that cannot be answered, in the shape of the API that was called."""
    headers: dict[str, str] = {}
    if isinstance(error, RequestValidationError):
        error = RequestError(_line(error.errors()))
    if isinstance(error, HTTPException) and error.status_code == 400:
        error = RequestError(_NO_JSON)  # bytes that are no text
    if isinstance(error, HTTPException):
        status, headers = error.status_code, dict(error.headers or {})
        if status == 405 and (known := request.app.openapi()["paths"].get(path_of(request.scope))):
            headers["Allow"] = ", ".join(sorted(map(str.upper, known)))  # the error knows one of a path's routes alone
        body = body_of(
            path_of(request.scope), RequestError(f"{request.method} {path_of(request.scope)}: {error.detail}")
        )
        return Json(body, status, headers)
    status = status_of(error)
    if status >= 500 and not isinstance(error, ServingError):
        logger.error("%s %s failed", request.method, path_of(request.scope), exc_info=error)
    if isinstance(error, ServingError):
        headers = dict(error.headers)
    request.state.problem = message_of(error)
    return Json(body_of(path_of(request.scope), error), status, headers)


_NO_JSON = "the body is no JSON object; send one, with the header Content-Type: application/json"
_KINDS = re.compile(r"[a-z_0-9]+")
_TYPES = ("str", "int", "float", "bool", "body")


def _line(problems: Sequence[Mapping[str, Any]]) -> str:
    """What is wrong with a body: of each key what is nearest to right, where it may be of several types."""
    if any(problem["type"] in ("json_invalid", "model_attributes_type") for problem in problems):
        return _NO_JSON
    found: dict[str, tuple[int, str]] = {}
    for problem in problems:
        parts = [p for p in problem["loc"] if isinstance(p, int) or (_KINDS.fullmatch(p) and p not in _TYPES)]
        place = ".".join(map(str, parts)) or "the body"
        key = str(parts[0]) if parts else ""
        given = "" if problem["type"] == "missing" else f" is {shown(problem['input'])}"
        said = problem["msg"][0].lower() + problem["msg"][1:]
        known = (
            f"; the body has {listed(problem['input'])}" if problem["type"] == "missing" and problem["input"] else ""
        )
        rank = 0 if not problem["type"].endswith("_type") else 1
        if key not in found or rank < found[key][0]:
            found[key] = rank, f"{place}{given}: {said}{known}"
    return "; ".join(text for _, text in list(found.values())[:5])
