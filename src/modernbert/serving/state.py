"""What all routes of a server share."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Any

from fastapi import Request

from modernbert.pipelines.base import Pipeline
from modernbert.pipelines.text_generation import Prompt
from modernbert.serving.continuations import Stream
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
            most = _CHARACTERS * pipeline.context
            cut = given["truncation"] not in (None, False, "do_not_truncate")
            items = [_shortened(item, most, cut) for item in items]
        deadline = asyncio.get_running_loop().time() + self._seconds(request)
        answered = await self.models.engine(pipeline).run(pipeline, items, given, deadline, prepare)
        self.metrics.tokens.labels(served.name).inc(answered.tokens)
        self.metrics.texts.labels(served.name).inc(count)
        self.metrics.queued.observe(answered.waited)
        if answered.cut:
            self.metrics.truncated.labels(served.name).inc(answered.cut)
        request.state.answered = answered
        return served.name, pipeline, answered

    async def generate(
        self, request: Request, model: str | None, given: Any, options: dict[str, Any], best: int | None
    ) -> tuple[str, Any, list[Stream], list[Prompt]]:
        """Have prompts gone on with: the model's name, its pipeline, the streams of new tokens, and the prompts.

        Args:
            request, model: see `answer`.
            given: a prompt or several, as texts or token ids.
            options: of the pipeline; those that are None are not given.
            best: see `Stream`.

        Raises:
            ServingError, InputError: it cannot be answered.
        """
        if self.draining:
            raise DrainingError("the server is about to end; ask another one")
        served, pipeline = self.models.find(model, "text-generation")
        request.state.model = served.name
        several = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
        if not several:
            raise RequestError("there is no prompt; give at least one")
        if len(several) > self.options.most_texts:
            raise TooLargeError(f"the request holds {len(several)} texts; at most {self.options.most_texts} are taken")
        resolved = pipeline.resolve(pipeline.given({k: v for k, v in options.items() if v is not None}))
        engine, loop = self.models.engine(pipeline), asyncio.get_running_loop()
        rows = await loop.run_in_executor(engine.pool, _prompts, pipeline, several, resolved)
        for number, row in enumerate(rows):
            row.number = number
        streams = engine.go_on(pipeline, rows, resolved, loop.time() + self._seconds(request), best)
        self.metrics.tokens.labels(served.name).inc(sum(len(row.ids) for row in rows))
        self.metrics.texts.labels(served.name).inc(len(streams))
        return served.name, pipeline, streams, rows

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


_CHARACTERS = 32  # of a token at the most, on average; what is longer is not worth the time to count its tokens


def _shortened(item: Any, most: int, cut: bool) -> Any:
    """An input without what is far beyond a context, where texts may be cut; raises `RequestError` where not."""
    if isinstance(item, str):
        if len(item) > most and not cut:
            raise RequestError(
                f"a text has {len(item):,} characters, which are more tokens than the model's context holds; "
                "truncate cuts it"
            )
        return item[:most]
    if isinstance(item, dict):
        return {name: _shortened(value, most, cut) for name, value in item.items()}
    return [_shortened(value, most, cut) for value in item] if isinstance(item, list) else item


def _prompts(pipeline: Any, given: list[Any], options: Any) -> list[Prompt]:
    """Prompts of texts or token ids, which are taken as they are."""
    texts = [item for item in given if isinstance(item, str)]
    prepared = iter(pipeline.prepare(texts, options)) if texts else iter(())
    rows: list[Prompt] = []
    for item in given:
        if isinstance(item, str):
            rows.append(next(prepared)[0])
            continue
        check_ids(item, pipeline)
        rows.append(Prompt(list(item), options.generation.new_tokens(len(item)), 1))
    return rows


def check_ids(ids: Sequence[int], pipeline: Pipeline[Any, Any, Any]) -> None:
    """Refuse token ids that the model cannot read; raises `RequestError`."""
    vocabulary = pipeline.model.config.vocab_size
    if not ids:
        raise RequestError("a text has no token ids; give at least one")
    if len(ids) > pipeline.context:
        raise RequestError(f"a text has {len(ids)} token ids; the model's context holds {pipeline.context}")
    if wrong := [i for i in ids if not 0 <= i < vocabulary]:
        raise RequestError(f"token ids hold {wrong[0]}; the vocabulary has ids 0 to {vocabulary - 1}")


def state_of(request: Request) -> State:
    """The server's state, for routes."""
    state: State = request.app.state.serving
    return state
