"""The engine: one thread a device, which computes the rows of all requests and models in packed batches.

A request's texts are tokenized in a small pool of threads, and their rows wait in one queue. The engine takes rows of
requests that can be computed together in turns, one row a request, until a batch is full, so that a request with ten
thousand texts and one with a single question both go on. The request that has waited longest comes first, and what does
not fit beside it lets shorter rows pass; `benchmarks/order.py` compares other orders. The engine never waits while
there is a row. What a row's result is does not depend on its batch (docs/invariance.md), so a served answer has the
bits of the offline pipeline.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from modernbert.pipelines.base import Job, Pipeline, Row, cut_texts, limited_windows
from modernbert.serving.continuations import Continuations, Stream, check_room
from modernbert.serving.metrics import Metrics
from modernbert.serving.problems import EngineError, LateError, OverloadedError, failed

logger = logging.getLogger(__name__)

_TOKENIZED_TOGETHER = 64
_CHARACTERS = 4  # of a token, about; only for texts that are not tokenized yet
_FIRST_GUESS = 5_000.0  # tokens a second, before anything was computed
_MEASURED = 20  # batches after which the speed is known
_CERTAIN = 0.5  # of a request's time, in which its turns must come, as others that come later have theirs, too

Prepare = Callable[[Pipeline[Any, Any, Any], list[Any], Any], list[list[Row]]]


@dataclasses.dataclass(eq=False)
class Work:
    """One request to one pipeline, on its way through the engine.

    Attributes:
        pipeline, options: what computes it; options are resolved.
        deadline: when its answer is no longer wanted, in seconds of the loop's clock.
        rows: what is still to be computed, as jobs and the numbers of their rows.
        count, left: rows of all, and those without a result.
        whole: whether all its texts are tokenized.
        ended: whether nobody waits for it any more.
        urgent: whether it is computed before others.
    """

    pipeline: Pipeline[Any, Any, Any]
    options: Any
    deadline: float
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[None]
    urgent: bool = False
    rows: collections.deque[tuple[Job[Any, Any], int]] = dataclasses.field(default_factory=collections.deque)
    jobs: list[Job[Any, Any]] = dataclasses.field(default_factory=list)
    count: int = 0
    left: int = 0
    tokens: int = 0
    cut: int = 0
    whole: bool = False
    ended: bool = False
    began: float | None = None  # when its first row was computed

    @property
    def joins(self) -> bool:
        """Whether it is gone on with in the running batch of a model, and not computed at once."""
        return hasattr(self.pipeline, "ongoing")

    def runs_with(self, other: Work) -> bool:
        """Whether rows of both can be computed in one batch."""
        return self.pipeline is other.pipeline and (self.options is other.options or self.options == other.options)


@dataclasses.dataclass(frozen=True)
class Answered:
    """Answers in the order of the inputs, and what they took.

    Attributes:
        answers: one an input.
        tokens: that the model read.
        cut: how many texts were cut to the model's context.
        waited, computed: seconds until the first row was computed, and from there to the last.
    """

    answers: list[Any]
    tokens: int
    cut: int
    waited: float
    computed: float


class Engine:
    """Computes what requests ask for, on one device.

    Args:
        device: that of its models.
        batch_tokens: most tokens of a batch; a single longer row is a batch of its own.
        most_waiting: tokens that may wait; what would be more is refused.
        threads: of the pool that tokenizes.
        metrics: counts.
        most_cache: bytes that the cache of each model that generates may take.
    """

    def __init__(
        self,
        device: torch.device,
        batch_tokens: int,
        most_waiting: int,
        threads: int,
        metrics: Metrics,
        most_cache: int = 2**31,
    ) -> None:
        self.most_cache = most_cache
        self._continuations: dict[Any, Continuations] = {}
        self.device, self.batch_tokens, self.most_waiting, self.metrics = device, batch_tokens, most_waiting, metrics
        self.pool = concurrent.futures.ThreadPoolExecutor(threads, "tokenizer")
        self._condition = threading.Condition()
        self._works: collections.deque[Work] = collections.deque()  # that have rows to compute, the next one first
        self._waiting = 0  # tokens
        self._closing = False
        self._speed, self._measured = _FIRST_GUESS, 0
        self._thread = threading.Thread(target=self._serve, name=f"engine {device}", daemon=True)
        self._thread.start()

    # From the event loop

    @property
    def waiting(self) -> int:
        """Tokens that are accepted and not computed yet."""
        return self._waiting

    @property
    def retry_after(self) -> int:
        """Seconds until what waits now is computed, at the speed of the last batches."""
        return max(1, round(self._waiting / self._speed + 0.5))

    async def run(
        self,
        pipeline: Pipeline[Any, Any, Any],
        items: Sequence[Any],
        options: dict[str, Any],
        deadline: float,
        prepare: Prepare | None = None,
        urgent: bool = False,
    ) -> Answered:
        """Answer inputs of one pipeline.

        Args:
            pipeline: of a model on this device.
            items: what its calls take, in a list.
            options: of a call.
            deadline: seconds of the loop's clock, after which the answer is no longer wanted.
            prepare: makes rows of some items instead of the pipeline.
            urgent: whether it is accepted whatever waits, and computed before it.

        Raises:
            InputError: an input cannot be answered, or an option is not allowed.
            OverloadedError: too much waits already.
            LateError: the deadline has passed.
            EngineError: the model failed.
        """
        loop = asyncio.get_running_loop()
        begun = loop.time()
        options = pipeline.resolve(pipeline.given(options))
        guess = guessed_tokens(items)
        self._admit(guess, urgent, len(items), deadline - begun)
        work = Work(pipeline, options, deadline, loop, loop.create_future(), urgent)
        try:
            async with asyncio.timeout_at(deadline):
                for first in range(0, len(items), _TOKENIZED_TOGETHER):
                    some = list(items[first : first + _TOKENIZED_TOGETHER])
                    await loop.run_in_executor(self.pool, self._tokenize, work, some, prepare)
                self._account(-guess)
                guess = 0
                if work.joins:
                    await self._generated(work)
                else:
                    self._close(work)
                    await work.done
                answers = await loop.run_in_executor(self.pool, _finish, work)
        except TimeoutError:
            raise LateError(f"the answer took longer than the {deadline - begun:.3g} seconds it was given") from None
        finally:
            self._account(-guess)
            self._leave(work)
        began = work.began if work.began is not None else loop.time()
        return Answered(answers, work.tokens, work.cut, began - begun, loop.time() - began)

    def go_on(
        self,
        pipeline: Any,
        rows: Sequence[Any],
        options: Any,
        deadline: float,
        best: int | None = None,
        urgent: bool = False,
    ) -> list[Stream]:
        """Have prompts join the running batch of their model.

        Args:
            pipeline: of text-generation.
            rows: what it prepared, with their numbers.
            options: resolved.
            deadline: seconds of the loop's clock.
            best, urgent: see `Stream`.

        Returns:
            For each row the new tokens of `num_return_sequences` texts, as they come; one stream of a beam search.

        Raises:
            RequestError: a text can never be served.
            OverloadedError: too much waits already.
        """
        loop, streams = asyncio.get_running_loop(), []
        with self._condition:
            if pipeline.model not in self._continuations:
                self._continuations[pipeline.model] = Continuations(pipeline.model, self.most_cache)
            running = self._continuations[pipeline.model]
        for row in rows:
            for copy in range(_streams(options)):
                text = pipeline.ongoing(row, options, copy)
                running.check(text)
                streams.append(Stream(text, loop, deadline, best, urgent))
        self._admit(0, urgent)
        with self._condition:
            running.add(streams)
            self._condition.notify_all()
        return streams

    async def _generated(self, work: Work) -> None:
        """The results of all jobs of a pipeline that generates."""
        rows = [job.rows[0] for job in work.jobs]
        streams = self.go_on(work.pipeline, rows, work.options, work.deadline, urgent=work.urgent)
        try:
            new = await asyncio.gather(*(_ids(stream) for stream in streams))
        except BaseException:
            for stream in streams:
                stream.text.cancelled = True
            raise
        work.began = min((s.began for s in streams if s.began is not None), default=None)
        copies = _streams(work.options)
        for i, job in enumerate(work.jobs):
            own = new[i * copies : (i + 1) * copies]
            job.results = [own[0][0] if work.options.generation.num_beams > 1 else own]
            work.tokens += sum(map(len, job.results[0]))

    def close(self, wait: float = 10.0) -> None:
        """End the threads. What is not computed yet fails."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        self._thread.join(wait)
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _admit(self, tokens: int, urgent: bool, rows: int = 0, seconds: float = math.inf) -> None:
        """Take a request, or refuse it: too much waits, or it would take too long until its turns have come."""
        with self._condition:
            # A request that is larger than the limits is served when nothing else waits.
            waiting = self._waiting + sum(one.pending for one in self._continuations.values())
            wrong = ""
            if waiting and waiting + tokens > self.most_waiting:
                wrong = f"{waiting:,} tokens wait and at most {self.most_waiting:,} may"
            elif waiting and self._measured >= _MEASURED and self._turns(rows) > (most := seconds * _CERTAIN):
                wrong = f"what comes before takes over {most:.3g} of the request's {seconds:.3g} seconds"
            if self._closing or (wrong and not urgent):
                self.metrics.refused.inc()
                raise OverloadedError(f"{wrong or 'the server is closing'}; try again later", self.retry_after)
            self._waiting += tokens
            self.metrics.waiting.set(self._waiting)

    def _turns(self, rows: int) -> float:
        """Seconds until a request of so many rows has had its turns, if no other one comes: each has as many before."""
        before = sum(work.tokens / work.count * min(len(work.rows), rows) for work in self._works)
        return before / self._speed

    def _account(self, tokens: int) -> None:
        with self._condition:
            self._waiting += tokens
            self.metrics.waiting.set(self._waiting)

    # From the pool

    def _tokenize(self, work: Work, items: list[Any], prepare: Prepare | None) -> None:
        """Put the rows of some inputs into the queue."""
        with torch.inference_mode(), cut_texts() as cut, limited_windows(self.most_waiting):
            made = (prepare or _prepare)(work.pipeline, items, work.options)
        jobs: list[Job[Any, Any]] = [Job(item, rows) for item, rows in zip(items, made, strict=True)]
        if hasattr(work.pipeline, "ongoing"):
            beams = work.options.generation.num_beams
            for row in (job.rows[0] for job in jobs):
                check_room(work.pipeline.model, len(row.ids), row.limit, self.most_cache, beams)
        tokens = sum(len(row.ids) for job in jobs for row in job.rows)
        with self._condition:
            if work.ended:
                return
            for job in jobs:
                job.results = [None] * len(job.rows)
                for i, row in enumerate(job.rows):
                    row.number = len(work.jobs)
                    if not work.joins:
                        work.rows.append((job, i))
                work.jobs.append(job)
                work.left += len(job.rows)
                work.count += len(job.rows)
            work.tokens += tokens
            work.cut += len(cut)
            self._waiting += 0 if work.joins else tokens
            if work not in self._works and work.rows:
                (self._works.appendleft if work.urgent else self._works.append)(work)
            self._condition.notify_all()

    def _close(self, work: Work) -> None:
        with self._condition:
            work.whole = True
            if not work.left:
                _resolve(work, None)

    def _leave(self, work: Work) -> None:
        """Nobody waits for it any more: rows that are not computed yet never are."""
        with self._condition:
            work.ended = True
            if work.done.done() and not work.done.cancelled():
                work.done.exception()  # which counts as seen
            self._waiting -= sum(len(job.rows[i].ids) for job, i in work.rows)
            work.rows.clear()
            if work in self._works:
                self._works.remove(work)
            self.metrics.waiting.set(self._waiting)

    # In the engine's own thread

    def _serve(self) -> None:
        while not self._closing:
            try:
                self._go()
            except Exception as error:  # of ours, not of a model; whoever waits is told, and others are served
                wrong = failed(error)
                with self._condition:
                    for work in self._works:
                        work.ended = True
                        _resolve(work, wrong)
                    for continuations in self._continuations.values():
                        continuations.close(wrong)

    def _go(self) -> None:
        """Compute until the engine is closed."""
        running: tuple[list[tuple[Work, Job[Any, Any], int]], Any, float] | None = None
        while True:
            with self._condition:
                going_on = [one for one in self._continuations.values() if len(one)]
                while not self._works and not going_on and not self._closing and running is None:
                    self._condition.wait()
                    going_on = [one for one in self._continuations.values() if len(one)]
                if self._closing:
                    for work in list(self._works):
                        _resolve(work, EngineError("the server is closing"))
                    for continuations in self._continuations.values():
                        continuations.close(EngineError("the server is closing"))
                    return
                batch = self._next_batch()
            # A card computes this batch while the one before is read.
            begun = self._begin(batch) if batch else None
            if running is not None:
                self._end(*running)
            running = begun
            if running is not None and not callable(running[1]):
                self._end(*running)
                running = None
            for continuations in going_on:
                self.metrics.generated.inc(continuations.step())

    def _next_batch(self) -> list[tuple[Work, Job[Any, Any], int]]:
        """Rows of requests that can be computed together, one of each in turns; the first has waited longest."""
        for work in [work for work in self._works if work.ended or work.loop.time() > work.deadline]:
            self._works.remove(work)
        if not self._works:
            return []
        first = self._works[0]
        together = [work for work in self._works if work.runs_with(first)]
        turns = collections.deque(together)
        batch: list[tuple[Work, Job[Any, Any], int]] = []
        tokens, most = 0, first.pipeline.batch_size or sys.maxsize
        while turns and len(batch) < most:
            work = turns.popleft()
            job, i = work.rows[0]
            weight = work.pipeline.weight(job.rows[i])
            if batch and tokens + weight > self.batch_tokens:
                continue  # a shorter row of another request may still fit
            work.rows.popleft()
            batch.append((work, job, i))
            tokens += weight
            if work.began is None:
                work.began = work.loop.time()
            if work.rows:
                turns.append(work)
        for work in together:
            self._works.remove(work)
            if work.rows:
                self._works.append(work)
        read = sum(len(job.rows[i].ids) for _, job, i in batch)
        self._waiting -= read
        self.metrics.waiting.set(self._waiting)
        self.metrics.batch_tokens.observe(read)
        self.metrics.batch_rows.observe(len(batch))
        return batch

    def _begin(
        self, batch: list[tuple[Work, Job[Any, Any], int]]
    ) -> tuple[list[tuple[Work, Job[Any, Any], int]], Any, float] | None:
        begun = time.monotonic()
        work = batch[0][0]
        try:
            with torch.inference_mode():
                results = work.pipeline.run([job.rows[i] for _, job, i in batch], work.options)
            return batch, results, begun
        except Exception as error:
            self._failed(batch, error)
            return None

    def _end(self, batch: list[tuple[Work, Job[Any, Any], int]], results: Any, begun: float) -> None:
        try:
            with torch.inference_mode():
                got = results() if callable(results) else results
        except Exception as error:
            self._failed(batch, error)
            return
        took = time.monotonic() - begun
        tokens = sum(len(job.rows[i].ids) for _, job, i in batch)
        self._measured += 1
        self._speed += 0.1 * (tokens / max(took, 1e-6) - self._speed)
        self.metrics.computing.inc(took)
        for (work, job, i), result in zip(batch, got, strict=True):
            job.results[i] = result
            with self._condition:
                work.left -= 1
                if not work.left and work.whole:
                    _resolve(work, None)

    def _failed(self, batch: list[tuple[Work, Job[Any, Any], int]], error: Exception) -> None:
        """A batch of several requests is computed again request by request, so that only the one at fault fails."""
        works = list(dict.fromkeys(work for work, _, _ in batch))
        if len(works) == 1:
            with self._condition:
                works[0].ended = True
            _resolve(works[0], failed(error))
            return
        for work in works:
            own = [row for row in batch if row[0] is work]
            if (begun := self._begin(own)) is not None:
                self._end(*begun)


def _prepare(pipeline: Pipeline[Any, Any, Any], items: list[Any], options: Any) -> list[list[Row]]:
    made: list[list[Row]] = pipeline.prepare(items, options)
    return made


def _streams(options: Any) -> int:
    """Streams of a prompt: one of all the texts that a beam search finds, else one of each text."""
    copies: int = options.generation.num_return_sequences
    return 1 if options.generation.num_beams > 1 else copies


async def _ids(stream: Stream) -> list[Any]:
    return [token async for token, _ in stream]


def _finish(work: Work) -> list[Any]:
    with torch.inference_mode():
        return [work.pipeline.finish(job, work.options) for job in work.jobs]


def _resolve(work: Work, error: Exception | None) -> None:
    """Wake who waits, from whatever thread."""

    def set_result() -> None:
        if not work.done.done():
            if error is None:
                work.done.set_result(None)
            else:
                work.done.set_exception(error)

    with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
        work.loop.call_soon_threadsafe(set_result)


def guessed_tokens(items: Sequence[Any]) -> int:
    """Tokens of inputs that are not tokenized yet, about."""
    return sum(map(_size, items)) // _CHARACTERS + len(items)


def _size(item: Any) -> int:
    """Characters of an input, about."""
    if isinstance(item, str):
        return len(item)
    if isinstance(item, dict):  # a query or a text is read again with each document or choice
        lists = [value for value in item.values() if isinstance(value, list)]
        once = sum(_size(value) for value in item.values() if not isinstance(value, list))
        return once * max(map(len, lists), default=1) + sum(map(_size, lists))
    return sum(map(_size, item)) if isinstance(item, list | tuple) else 1
