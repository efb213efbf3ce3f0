"""What those who run a server need: a page to try it by, health, readiness, metrics."""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import HTMLResponse

from modernbert.serving.problems import DrainingError, NotReadyError, ServingError
from modernbert.serving.replies import Json
from modernbert.serving.routes.tasks import EXAMPLES
from modernbert.serving.state import State, state_of

router = APIRouter(tags=["Operations"])

_PAGE = Path(__file__).parents[1] / "page.html"
# Beside the hashes of its own script and style. Nothing comes from outside, requests go to this server alone, and the
# last two directives make browsers refuse markup that a script builds from text.
_POLICY = (
    "default-src 'none'",
    "connect-src 'self'",
    "img-src data:",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    "require-trusted-types-for 'script'",
    "trusted-types 'none'",
)
_LIMIT = 5.0  # seconds that a text may take before the server counts as stuck


@functools.cache
def _page() -> tuple[bytes, dict[str, str]]:
    """The page, and its headers."""
    page = _PAGE.read_text(encoding="utf-8")
    policy = list(_POLICY)
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        policy.append(f"{tag}-src 'sha256-{digest}'")
    return page.encode(), {
        "Content-Security-Policy": "; ".join(policy),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


@router.get("/", summary="A page to try the tasks by", response_class=HTMLResponse)
async def page() -> Response:
    """A page in which people try the tasks of this server."""
    content, headers = _page()
    return Response(content, headers=headers, media_type="text/html")


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
    if state.probe is None or state.probe.done():  # those who ask at the same time share one text
        state.probe = asyncio.create_task(_probe(state))
    if problem := await asyncio.shield(state.probe):
        raise NotReadyError(f"no text is computed: {problem}")
    return Json({"status": "ready", "waiting_tokens": state.models.waiting})


async def _probe(state: State) -> str:
    """Compute a text on each device; what went wrong."""
    firsts = {one.first.model.device: one.first for one in state.models.served.values()}
    for pipeline in firsts.values():
        text, options = EXAMPLES[pipeline.task]
        options = {"max_new_tokens": 1, "seed": 0} if pipeline.task == "text-generation" else options
        deadline = asyncio.get_running_loop().time() + _LIMIT
        try:
            await state.models.engine(pipeline).run(pipeline, [text], options, deadline, urgent=True)
        except ServingError as error:
            return str(error)
    return ""


@router.get("/metrics", summary="Counters, in Prometheus's form", response_class=Response)
async def metrics(request: Request) -> Response:
    """Requests, latencies, batches, waiting and refused work."""
    return Response(state_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)
