"""What those who run a server need: health, readiness, metrics."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from modernbert.serving.problems import DrainingError
from modernbert.serving.replies import Json
from modernbert.serving.routes.tasks import EXAMPLES
from modernbert.serving.state import state_of

router = APIRouter(tags=["Operations"])

_LIMIT = 5.0  # seconds that a text may take before the server counts as stuck


@router.get("/health/live", summary="Whether the process answers")
@router.get("/health", summary="Whether the process answers")
async def live() -> Json:
    """Status 200 as long as the process answers at all."""
    return Json({"status": "live"})


@router.get("/health/ready", summary="Whether texts are computed")
async def ready(request: Request) -> Json:
    """Computes a text on each device: status 503 where that takes over five seconds, or the server is about to end."""
    state = state_of(request)
    if state.draining:
        raise DrainingError("the server is about to end")
    firsts = {one.first.model.device: one.first for one in state.models.served.values()}
    for pipeline in firsts.values():
        text, options = EXAMPLES[pipeline.task]
        options = {"max_new_tokens": 1, "seed": 0} if pipeline.task == "text-generation" else options
        deadline = asyncio.get_running_loop().time() + _LIMIT
        await state.models.engine(pipeline).run(pipeline, [text], options, deadline, urgent=True)
    return Json({"status": "ready", "waiting_tokens": state.models.waiting})


@router.get("/metrics", summary="Counters, in Prometheus's form", response_class=Response)
async def metrics(request: Request) -> Response:
    """Requests, latencies, batches, waiting and refused work."""
    return Response(state_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)
