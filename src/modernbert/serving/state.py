"""What all routes of a server share."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import Request
from starlette.types import Scope

from modernbert.indexing.index import Index
from modernbert.pipelines.base import Pipeline
from modernbert.pipelines.one_pass import OnePass
from modernbert.pipelines.text_generation import Prompt
from modernbert.serving.continuations import Stream
from modernbert.serving.engine import Answered, Prepare, guessed_tokens
from modernbert.serving.log import AccessLog
from modernbert.serving.metrics import Metrics
from modernbert.serving.models import Chosen, Models
from modernbert.serving.options import ServeOptions
from modernbert.serving.problems import DrainingError, LateError, RequestError, TooLargeError


@dataclasses.dataclass
class State:
    """Options, models and counters.

    Attributes:
        keys: API keys; none where requests need none.
        log: gets a line for each request.
        span: the one of OpenTelemetry that a request is, where that is installed.
        draining: whether new requests are refused, because the server is about to end.
        running: requests that are being answered.
        probe: finds out whether the server is ready.
        indexes: to search, by the names of their models.
    """

    options: ServeOptions
    models: Models
    metrics: Metrics
    keys: list[bytes]
    log: AccessLog | None = None
    span: Callable[[], Any] | None = None
    draining: bool = False
    running: int = 0
    probe: asyncio.Task[str] | None = None
    indexes: dict[str, Index] = dataclasses.field(default_factory=dict)

    def close(self) -> None:
        """End the engines and the log."""
        self.models.close()
        if self.log is not None:
            self.log.close()

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
        self._refuse_draining()
        served, pipeline = self.models.find(model, task)
        given = {name: value for name, value in options.items() if value is not None}
        items, count = self._checked(task, pipeline, items, given, texts)
        answered = await self._computed(request, {served.name: count}, pipeline, items, given, prepare)
        return served.name, pipeline, answered

    async def answer_together(
        self, request: Request, one: OnePass, wanted: Sequence[tuple[Chosen, dict[str, Any]]], texts: Sequence[str]
    ) -> Answered:
        """Compute several answers to texts from one pass, in dicts by their keys.

        Args:
            request: see `answer`.
            one: what gives them all.
            wanted: each with the options of its call.
            texts: what all of them read.

        Raises:
            ServingError, InputError: it cannot be answered.
        """
        self._refuse_draining()
        items: list[dict[str, Any]] = [{} for _ in texts]
        counts: dict[str, int] = {}
        options: dict[str, Any] = {}
        for chosen, of_one in wanted:
            given = options[chosen.key] = {name: value for name, value in of_one.items() if value is not None}
            own, count = self._checked(chosen.task, chosen.pipeline, texts, given)
            counts[chosen.served.name] = counts.get(chosen.served.name, 0) + count
            for item, text in zip(items, own, strict=True):
                item[chosen.key] = text
        self._check_count(sum(counts.values()))
        given = {"answers": list(options), "options": options}
        return await self._computed(request, counts, one, items, given)

    def _refuse_draining(self) -> None:
        if self.draining:
            raise DrainingError("the server is about to end; ask another one")

    def _checked(
        self,
        task: str,
        pipeline: Pipeline[Any, Any, Any],
        items: Sequence[Any],
        given: dict[str, Any],
        texts: int | None = None,
    ) -> tuple[list[Any], int]:
        """The inputs of a task, and how many texts they hold; the server's own default is added to its options.

        Raises:
            ServingError: there are none, or too much is asked.
        """
        if not items:
            raise RequestError("there is no text; give at least one")
        count = max(texts or 0, _count(items, given))
        self._check_count(count)
        check_options(given)
        if task == "fill-mask":
            self._check_filled(items, pipeline.tokenizer.mask_token, given.get("top_k", 1))
        known = set(pipeline.options.__dataclass_fields__)
        most, cut = sys.maxsize, False
        if "truncation" in known and task != "token-classification":  # which reads long texts in windows
            given.setdefault("truncation", self.options.truncate)
            most = _CHARACTERS * pipeline.context
            cut = given["truncation"] not in (None, False, "do_not_truncate")
        items = [_shortened(item, most, cut) for item in items]
        if task == "feature-extraction" or given.get("multi_vector"):
            tokens, limit = guessed_tokens(items), self.options.most_waiting
            if tokens > limit:
                raise TooLargeError(f"the answers are vectors of about {tokens:,} tokens; at most {limit:,} are given")
        return items, count

    async def _computed(
        self,
        request: Request,
        counts: dict[str, int],
        pipeline: Pipeline[Any, Any, Any],
        items: Sequence[Any],
        given: dict[str, Any],
        prepare: Prepare | None = None,
    ) -> Answered:
        """The answers to a request, counted; `counts` are the texts of each model, the first of which reads them."""
        name = next(iter(counts))
        request.state.model = ",".join(counts)
        deadline = asyncio.get_running_loop().time() + self._seconds(request)
        answered = await self.models.engine(pipeline).run(pipeline, items, given, deadline, prepare)
        self.metrics.tokens.labels(name).inc(answered.tokens)
        for one, count in counts.items():
            self.metrics.texts.labels(one).inc(count)
        self.metrics.queued.observe(answered.waited)
        if answered.cut:
            self.metrics.truncated.labels(name).inc(answered.cut)
        request.state.answered = answered
        return answered

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
        self._refuse_draining()
        served, pipeline = self.models.find(model, "text-generation")
        request.state.model = served.name
        several = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
        if not several:
            raise RequestError("there is no prompt; give at least one")
        given = {name: value for name, value in options.items() if value is not None}
        self._check_count(_count(several, given))
        check_options(given)
        most = _CHARACTERS * pipeline.context
        several = [_shortened(item, most, cut=False) if isinstance(item, str) else item for item in several]
        resolved = pipeline.resolve(pipeline.given(given))
        engine, loop = self.models.engine(pipeline), asyncio.get_running_loop()
        seconds = self._seconds(request)
        deadline = loop.time() + seconds
        try:
            async with asyncio.timeout_at(deadline):
                rows = await loop.run_in_executor(engine.pool, _prompts, pipeline, several, resolved)
        except TimeoutError:
            raise LateError(f"the answer took longer than the {seconds:.3g} seconds it was given") from None
        for number, row in enumerate(rows):
            row.number = number
        streams = engine.go_on(pipeline, rows, resolved, deadline, best)
        self.metrics.tokens.labels(served.name).inc(sum(len(row.ids) for row in rows))
        self.metrics.texts.labels(served.name).inc(len(streams))
        return served.name, pipeline, streams, rows

    async def aside(
        self, pipeline: Pipeline[Any, Any, Any], items: Sequence[Sequence[Any]], act: Callable[[], Any]
    ) -> Any:
        """What a function makes of items without the model, in the threads that tokenize, so that nobody waits.

        Raises:
            TooLargeError: there are too many items, or they are too long.
        """
        self._check_count(len(items))
        size, most = sum(map(len, items)), _CHARACTERS * self.options.most_waiting
        if size > most:
            raise TooLargeError(f"the request holds {size:,} characters or ids; at most {most:,} are taken")
        return await asyncio.get_running_loop().run_in_executor(self.models.engine(pipeline).pool, act)

    def _check_filled(self, items: Sequence[Any], mask: str, top_k: int) -> None:
        """Each candidate for a mask comes with the whole text."""
        size = top_k * sum(item.count(mask) * len(item) for item in items if isinstance(item, str))
        if size > self.options.most_bytes:
            raise TooLargeError(
                f"the answers hold {size:,} characters, a text for each mask and candidate; at most "
                f"{self.options.most_bytes:,} are given, so ask for fewer with top_k"
            )

    def _check_count(self, count: int) -> None:
        if count > self.options.most_texts:
            raise TooLargeError(
                f"the request holds {count} texts, each counted once for every label, document, choice, beam or "
                f"continuation of it; at most {self.options.most_texts} are taken"
            )

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


_DEPTH = 8  # of lists in lists; no task takes more than three


def _shortened(item: Any, most: int, cut: bool, depth: int = 0) -> Any:
    """An input without what is far beyond a context, where texts may be cut; raises `RequestError` where not."""
    if isinstance(item, str):
        if len(item) > most and not cut:
            raise RequestError(
                f"a text has {len(item):,} characters, which are more tokens than the model's context holds; "
                "make it shorter, or give truncate where there is that option"
            )
        return item[:most]
    if depth > _DEPTH:
        raise RequestError("inputs are lists in lists in lists; see /docs for what a task takes")
    if isinstance(item, dict):
        return {name: _shortened(value, most, cut, depth + 1) for name, value in item.items()}
    return [_shortened(value, most, cut, depth + 1) for value in item] if isinstance(item, list) else item


_PARTS = ("documents", "choices", "candidate_labels")  # of an input, each of which is read beside its text


def _count(items: Sequence[Any], options: dict[str, Any]) -> int:
    """Texts that a model reads or makes for these inputs, at the most."""
    labels = options.get("candidate_labels", "")
    each = [labels.count(",") + 1 if isinstance(labels, str) else len(labels)]
    each += [options.get(name, 1) for name in ("num_beams", "num_return_sequences")]
    inside = 0
    for item in items:
        parts = [item[name] for name in _PARTS if name in item] if isinstance(item, dict) else []
        inside += max((len(part) for part in parts if isinstance(part, list)), default=1)
    return inside * max(each)


_MOST_REPEATED = 1000  # characters of an option that is put beside every text or word


def check_options(options: dict[str, Any]) -> None:
    """Refuse options that are no text, or make far more of texts than was sent; raises `RequestError`."""
    for name, value in options.items():
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, str) and part.encode(errors="replace") != part.encode(errors="surrogatepass"):
                raise RequestError(f"{name} holds a lone surrogate, which is no valid Unicode")
    for name in ("prompt", "hypothesis_template", "delimiter"):
        value = options.get(name)
        if isinstance(value, str) and len(value) > _MOST_REPEATED:
            raise RequestError(f"{name} has {len(value):,} characters; at most {_MOST_REPEATED:,} are taken")
    template = options.get("hypothesis_template", "{}")
    if template.count("{}") != 1 or {*"{}"} & {*template.replace("{}", "")}:
        raise RequestError(f"hypothesis_template is {template!r}; it needs one {{}} where the label goes, and no other")


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


def path_of(scope: Scope) -> str:
    """The path that routes are chosen by; that of `request.url` depends on what the client says of its host."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def state_of(request: Request) -> State:
    """The server's state, for routes."""
    state: State = request.app.state.serving
    return state
