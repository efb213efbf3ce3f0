"""Generation for many requests at once: prompts join the running batch of their model whenever there is memory.

Beam searches go on beside the batch, a token of each beam at every step, so that nobody waits for a whole search.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import logging
import threading
from collections.abc import AsyncIterator
from typing import Any

import torch

from modernbert.decoding.ongoing import Ongoing, OngoingBatch, OngoingSearch, Token, cache_bytes
from modernbert.errors import InputError
from modernbert.serving.problems import LateError, RequestError, failed

logger = logging.getLogger(__name__)

_JOINING = 2048  # tokens of prompts that are read in one step at the most, so that others do not wait long


class Stream:
    """The new tokens of one text, or of a beam search's texts at its end, for whoever waits for them.

    Args:
        text: goes on in the engine's thread.
        loop: of the one who waits.
        deadline: in seconds of the loop's clock.
        best: how many likely tokens are told beside each, with their log-probabilities; None tells none.
        urgent: whether it joins before others, and whatever the cache holds.
    """

    def __init__(
        self,
        text: Ongoing | OngoingSearch,
        loop: asyncio.AbstractEventLoop,
        deadline: float,
        best: int | None,
        urgent: bool = False,
    ) -> None:
        self.text, self.loop, self.deadline, self.best, self.urgent = text, loop, deadline, best, urgent
        self.begun = loop.time()
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self.began: float | None = None

    @property
    def tokens(self) -> int:
        """Of the prompt, and those that may follow."""
        return self.text.history.prompt + self.text.history.limit

    def put(self, item: Any) -> None:
        """Give on a token, from the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)

    async def __aiter__(self) -> AsyncIterator[tuple[Any, list[tuple[int, float]]]]:
        """Tokens as they come: the id, and with `best` its log-probability and the likely ones', it first; of a beam
        search once the ids of all texts.

        Raises:
            LateError: the deadline has passed.
            EngineError: the model failed, or the server is closing.
            InputError: the text's options gave no token.
        """
        try:
            async with asyncio.timeout_at(self.deadline):
                while True:
                    item = await self.queue.get()
                    if isinstance(item, Exception):
                        raise item
                    token, likely, is_last = item
                    yield token, likely
                    if is_last:
                        return
        except TimeoutError:
            raise LateError(
                f"the answer took longer than the {self.deadline - self.begun:.3g} seconds it was given"
            ) from None
        finally:
            self.text.cancelled = True


class Continuations:
    """The running batch of one model, and the prompts that wait to join it.

    Args:
        model: a causal language model, frozen.
        most_bytes: that its cache may take.
    """

    def __init__(self, model: Any, most_bytes: int) -> None:
        self.model, self.most_bytes = model, most_bytes
        self.batch = OngoingBatch(model)
        self.waiting: collections.deque[collections.deque[Stream]] = collections.deque()  # each of one request
        self.running: dict[int, Stream] = {}
        self.lock = threading.Lock()

    def __len__(self) -> int:
        """How many texts there are."""
        return sum(map(len, self.waiting)) + len(self.running)

    @property
    def pending(self) -> int:
        """Tokens of the texts that wait."""
        with self.lock:
            return sum(stream.tokens for streams in self.waiting for stream in streams if not stream.text.cancelled)

    def check(self, text: Ongoing | OngoingSearch) -> None:
        """Refuse what can never be served; raises `RequestError`."""
        check_room(self.model, text.history.prompt, text.history.limit, self.most_bytes, text.rows)

    def add(self, streams: list[Stream]) -> None:
        """Have the texts of a request join when there is room, in turns with those of others."""
        with self.lock:
            urgent = any(stream.urgent for stream in streams)
            (self.waiting.appendleft if urgent else self.waiting.append)(collections.deque(streams))

    def step(self) -> int:
        """One token of each text, in the engine's thread; how many there are."""
        joining = self._joining()
        for stream in joining:
            stream.began = stream.loop.time()
            self.running[id(stream.text)] = stream
        count = sum(self._search(stream) for stream in self.running.values())
        try:
            steps = self.batch.step([stream.text for stream in joining if isinstance(stream.text, Ongoing)])
        except Exception as error:  # the batch is lost; where the model fails at a text, its step has the error
            wrong, steps = failed(error), []
            for stream in self.running.values():
                if isinstance(stream.text, Ongoing):
                    stream.put(wrong)
                    stream.text.cancelled = True
        for step in steps:
            stream = self.running[id(step.text)]
            if step.error is not None:
                stream.put(_no_token(step))
                continue
            stream.put((step.token, self._likely(step, stream.best), step.is_last))
            if step.is_last or stream.loop.time() > stream.deadline:
                step.text.cancelled = True
        self.running = {key: s for key, s in self.running.items() if not s.text.cancelled}
        if not any(isinstance(s.text, Ongoing) for s in self.running.values()):
            self.batch = OngoingBatch(self.model)  # its memory is free, even if nobody comes any more
        return count + len(steps)

    @staticmethod
    def _search(stream: Stream) -> int:
        """Go on with a beam search; how many beams got a token."""
        search = stream.text
        if not isinstance(search, OngoingSearch) or search.cancelled:
            return 0
        try:
            if (found := search.step()) is not None:
                stream.put((found, [], True))
        except Exception as error:
            stream.put(failed(error))
            found = []
        search.cancelled = found is not None or stream.loop.time() > stream.deadline
        return search.rows

    def close(self, error: Exception) -> None:
        """Whoever waits is told that nothing more comes."""
        with self.lock:
            for stream in (*self.running.values(), *itertools.chain(*self.waiting)):
                stream.put(error)
            self.running, self.batch = {}, OngoingBatch(self.model)
            self.waiting.clear()

    def _joining(self) -> list[Stream]:
        held = sum(self._bytes(stream) for stream in self.running.values() if not stream.text.cancelled)
        chosen: list[Stream] = []
        tokens = 0
        with self.lock:
            wanted = (
                collections.deque(s for s in streams if not s.text.cancelled and s.loop.time() <= s.deadline)
                for streams in self.waiting
            )
            self.waiting = collections.deque(streams for streams in wanted if streams)
            while self.waiting:
                stream = self.waiting[0][0]
                needed = self._bytes(stream)
                if held and held + needed > self.most_bytes and not stream.urgent:
                    break
                if chosen and tokens + stream.text.history.prompt > _JOINING:
                    break
                self.waiting[0].popleft()
                self.waiting.rotate(-1)
                if not self.waiting[-1]:
                    self.waiting.pop()
                chosen.append(stream)
                held += needed
                tokens += stream.text.history.prompt
        return chosen

    def _bytes(self, stream: Stream) -> int:
        return stream.text.rows * cache_bytes(self.model, stream.tokens)

    @staticmethod
    def _likely(step: Token, best: int | None) -> list[tuple[int, float]]:
        if best is None or step.logits_V is None:
            return []
        with torch.inference_mode():
            logs_V = step.logits_V.log_softmax(-1)
            top = logs_V.topk(min(best, len(logs_V))) if best else None
        own = [(step.token, float(logs_V[step.token]))]
        return own + ([] if top is None else list(zip(top.indices.tolist(), top.values.tolist(), strict=True)))


def _no_token(step: Token) -> Exception:
    """Why there is no token: the request's options, unless the model failed or what it says is no number itself."""
    assert step.error is not None
    if isinstance(step.error, InputError) or step.logits_V is None or not bool(step.logits_V.isfinite().all()):
        return failed(step.error)
    logger.info("no token can be chosen", exc_info=step.error)
    return RequestError(f"no token can be chosen by these options: {type(step.error).__name__}")


def check_room(model: Any, prompt: int, limit: int, most_bytes: int, texts: int = 1) -> None:
    """Refuse texts that would go on beyond their model's context, or fill more than its cache.

    Args:
        model: of the texts.
        prompt, limit: tokens of a text, and of its continuation.
        most_bytes: that the cache may take.
        texts: that are gone on with together.

    Raises:
        RequestError: they cannot be served.
    """
    needed = texts * cache_bytes(model, prompt + limit)
    if needed > most_bytes:
        raise RequestError(
            f"a text of {prompt} tokens with {limit} new ones needs {needed:,} bytes of cache"
            f"{f' for {texts} beams' if texts > 1 else ''}; the server has {most_bytes:,}"
        )
    context = model.config.max_position_embeddings
    if prompt + limit - 1 > context:  # the last token is not read
        raise RequestError(
            f"a text of {prompt} tokens with {limit} new ones is longer than the model's context, which holds {context}"
        )
