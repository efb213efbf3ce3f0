"""What all routes of a server share."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Any

from fastapi import Request

from modernbert.pipelines.base import Pipeline
from modernbert.serving.engine import Answered, Prepare
from modernbert.serving.metrics import Metrics
from modernbert.serving.models import Models
from modernbert.serving.options import ServeOptions
from modernbert.serving.problems import DrainingError, RequestError, TooLargeError


@dataclasses.dataclass
class State:
    """Options, models and counters.

    Attributes:
        keys: API keys; none where requests need none.
        draining: whether new requests are refused, because the server is about to end.
        running: requests that are being answered.
    """

    options: ServeOptions
    models: Models
    metrics: Metrics
    keys: list[bytes]
    draining: bool = False
    running: int = 0

    async def answer(
        self,
        request: Request,
        task: str,
        model: str | None,
        items: Sequence[Any],
        options: dict[str, Any],
        *,
        texts: int | None = None,
        prepare: Prepare | None = None,
    ) -> tuple[str, Pipeline[Any, Any, Any], Answered]:
        """Compute a request's answers; the model's name, the pipeline that did it, and the answers.

        Args:
            request: gets what its log line and headers say.
            task: of the pipeline.
            model: the name in the request.
            items: inputs of the pipeline.
            options: of the call; those that are None are not given.
            texts: how many texts the inputs hold.
            prepare: see `Engine.run`.

        Raises:
            ServingError, InputError: it cannot be answered.
        """
        if self.draining:
            raise DrainingError("the server is about to end; ask another one")
        served, pipeline = self.models.find(model, task)
        request.state.model = served.name
        count = len(items) if texts is None else texts
        if not items:
            raise RequestError("there is no text; give at least one")
        if count > self.options.most_texts:
            raise TooLargeError(f"the request holds {count} texts; at most {self.options.most_texts} are taken")
        given = {name: value for name, value in options.items() if value is not None}
        known = set(pipeline.options.__dataclass_fields__)
        if "truncation" in known:
            given.setdefault("truncation", self.options.truncate)
        deadline = asyncio.get_running_loop().time() + self._seconds(request)
        answered = await self.models.engine(pipeline).run(pipeline, items, given, deadline, prepare)
        self.metrics.tokens.labels(served.name).inc(answered.tokens)
        self.metrics.texts.labels(served.name).inc(count)
        self.metrics.queued.observe(answered.waited)
        if answered.cut:
            self.metrics.truncated.labels(served.name).inc(answered.cut)
        request.state.answered = answered
        return served.name, pipeline, answered

    def _seconds(self, request: Request) -> float:
        asked = request.headers.get("x-timeout")
        if asked is None:
            return self.options.timeout
        try:
            seconds = float(asked)
        except ValueError:
            seconds = 0.0
        if not 0 < seconds < float("inf"):
            raise RequestError(f"the header X-Timeout is {asked!r}; give a number of seconds above 0")
        return min(seconds, self.options.timeout)


def state_of(request: Request) -> State:
    """The server's state, for routes."""
    state: State = request.app.state.serving
    return state
