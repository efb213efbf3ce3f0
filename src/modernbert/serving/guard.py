"""What every request passes: an id, the API key, the limit on its size, a watch on the client, the log and counters."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
import uuid
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modernbert.serving.problems import KeyRefusedError, ServingError, SlowClientError, TooLargeError, body_of
from modernbert.serving.replies import Json
from modernbert.serving.state import State, path_of

logger = logging.getLogger(__name__)

_OPEN = ("/", "/health", "/health/live", "/health/ready")  # paths that need no key
_LOST = 499  # what the log says where a client left before its reply


class Guard:
    """Middleware of the whole app.

    Args:
        app: what it protects.
        state: of the server.
    """

    def __init__(self, app: ASGIApp, state: State) -> None:
        self.app, self.state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, seen = time.perf_counter(), {"status": 500, "bytes": 0}
        request = Request(scope)
        number = request.headers.get("x-request-id", "")[:128]
        number = number if number and number.isprintable() else uuid.uuid4().hex
        scope.setdefault("state", {})

        async def reply(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen["status"] = message["status"]
                own = {"x-request-id": number, **_headers_of(scope["state"], begun)}
                message["headers"] = [*message["headers"], *((k.encode(), _latin(v)) for k, v in own.items())]
            else:
                seen["bytes"] += len(message.get("body", b""))
                if not message.get("more_body") and self.state.span is not None:  # which ends with the last message
                    self.state.span().set_attributes(_attributes(scope["state"]))
            async with asyncio.timeout(patience):  # of a client that does not read
                await send(message)

        patience = self.state.options.timeout
        self.state.running += 1
        try:
            self._check_key(request)
            try:
                async with asyncio.timeout(patience):
                    body = await self._body(request, receive)
            except TimeoutError:
                raise SlowClientError(f"the request took longer than {patience:g} seconds to come") from None
            if body is None or not await self._run(scope, body, receive, reply):
                seen["status"] = _LOST
        except ServingError as error:
            scope["state"]["problem"] = str(error)
            await Json(body_of(path_of(scope), error), error.status, error.headers)(scope, receive, reply)
        finally:
            self.state.running -= 1
            self._count(request, number, seen, time.perf_counter() - begun)

    def _check_key(self, request: Request) -> None:
        if not self.state.keys or (request.method in ("GET", "HEAD") and path_of(request.scope) in _OPEN):
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        key = given.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
        # All keys are compared, so that the time says nothing about them.
        if not sum(hmac.compare_digest(key.encode("latin-1"), known) for known in self.state.keys):
            raise KeyRefusedError("the API key is missing or wrong; give it as Authorization: Bearer KEY")

    async def _body(self, request: Request, receive: Receive) -> bytes | None:
        """The whole body; None where the client left before its end."""
        most = self.state.options.most_bytes
        too_large = TooLargeError(f"the request is larger than {most:,} bytes")
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > most:
            raise too_large
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > most:
                raise too_large
            if not message.get("more_body"):
                return b"".join(parts)

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> bool:
        """Answer, unless the client leaves before; whether it was answered."""
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                await asyncio.Event().wait()  # the watch below sees the client leave
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def left() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        answer = asyncio.ensure_future(self.app(scope, replay, send))
        watch = asyncio.ensure_future(left())
        try:
            await asyncio.wait({answer, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:  # also where the host itself ends this request
            watch.cancel()
            answer.cancel()
        try:
            await answer
        except (asyncio.CancelledError, ClientDisconnect, TimeoutError):  # the client left, or does not read
            return False
        return True

    def _count(self, request: Request, number: str, seen: dict[str, int], took: float) -> None:
        scope, metrics = request.scope, self.state.metrics
        route = getattr(scope.get("route"), "path", "unknown")
        told = scope["state"]
        model = told.get("model", "")
        metrics.requests.labels(route, model, str(seen["status"])).inc()
        metrics.latency.labels(route, model).observe(took)
        answered = told.get("answered")
        if self.state.log is not None:
            line: dict[str, Any] = {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "request": number,
                "client": (scope.get("client") or ("",))[0],
                "method": request.method,
                "path": path_of(scope),
                "status": seen["status"],
                "seconds": round(took, 6),
                "bytes": seen["bytes"],
                "model": model,
                "tokens": answered.tokens if answered else 0,
                "truncated": answered.cut if answered else 0,
                "waited": round(answered.waited, 6) if answered else 0.0,
                "problem": told.get("problem", ""),
            }
            self.state.log.put(line)


def _attributes(told: dict[str, Any]) -> dict[str, Any]:
    """What a span says of a request, beside what OpenTelemetry sees itself."""
    found = {f"modernbert.{name}": told[name] for name in ("model", "problem") if name in told}
    if answered := told.get("answered"):
        found |= {"modernbert.tokens": answered.tokens, "modernbert.truncated": answered.cut}
    return found


def _headers_of(told: dict[str, Any], begun: float) -> dict[str, str]:
    """What a reply says of how it came about; times are milliseconds."""
    headers = {"x-total-time": f"{1e3 * (time.perf_counter() - begun):.1f}"}
    if answered := told.get("answered"):
        headers |= {
            "x-compute-tokens": str(answered.tokens),
            "x-queue-time": f"{1e3 * answered.waited:.1f}",
            "x-inference-time": f"{1e3 * answered.computed:.1f}",
            "x-truncated-texts": str(answered.cut),
        }
    return headers


def _latin(text: str) -> bytes:
    return text.encode("latin-1", "replace").replace(b"\r", b"").replace(b"\n", b"")
