"""OpenAI's API for decoders: continuations of prompts, whole or as a stream."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import Field
from starlette.responses import StreamingResponse

from modernbert.decoding.text import TextPieces
from modernbert.pipelines.base import Pipeline
from modernbert.pipelines.text_generation import Prompt
from modernbert.serving.bodies import Body, TextsOrIds, Whole, example
from modernbert.serving.continuations import Stream
from modernbert.serving.engine import Answered
from modernbert.serving.problems import RequestError, body_of
from modernbert.serving.replies import Json
from modernbert.serving.state import path_of, state_of

router = APIRouter(tags=["OpenAI"])

_UNSERVED = {"logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0, "best_of": 1, "suffix": ""}


class CompletionRequest(Body):
    """A prompt or several, and how to go on with them."""

    model_config = example(prompt="Once upon a time", max_tokens=8, seed=1) | {"extra": "forbid"}

    prompt: TextsOrIds = Field(description="A text, token ids, or a list of either.")
    model: str | None = Field(None, description="Name of the model; by default the first that generates.")
    max_tokens: Whole = Field(16, ge=1, description="New tokens of each text at the most.")
    temperature: float = Field(1.0, ge=0, le=100, description="0 always takes the likeliest token.")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: Whole = Field(0, ge=0, description="0 keeps all tokens.")
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    n: Whole = Field(1, ge=1, le=64, description="Texts for each prompt.")
    stop: str | list[str] | None = Field(None, description="Strings that end a text and are left out of it.")
    seed: Whole | None = Field(None, ge=0, le=2**32 - 1)
    logprobs: Whole | None = Field(None, ge=0, le=20, description="Log-probabilities of so many likely tokens as well.")
    echo: bool = Field(False, description="Put the prompt before its text.")
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    user: str | None = Field(None, description="Not used.")
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    best_of: Whole | None = None
    suffix: str | None = None


class Text:
    """One text as it is generated: pieces that never cut a character and hold no stop string.

    Args:
        tokenizer: decodes.
        stops: strings that end the text.
        before: characters that stand before it.
    """

    def __init__(self, tokenizer: Any, stops: list[str], before: int = 0) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.pieces = TextPieces(tokenizer)
        self.held, self.count = "", 0
        self.reason: str | None = None
        self.logprobs = _no_logprobs()
        self._length = before

    def push(self, token: Whole, likely: list[tuple[int, float]]) -> str:
        """The text that is certain with a new token."""
        self.count += 1
        if likely:
            self._tell(likely)
        self.held += self.pieces.push([token])
        return self._cut(last=False)

    def finish(self, ends: tuple[int, ...], last: int | None) -> str:
        """What is left at the end."""
        if self.reason is None:
            self.held += self.pieces.finish()
            found = self._cut(last=True)
            self.reason = self.reason or ("stop" if last in ends else "length")
            return found
        return ""

    def told(self) -> dict[str, list[Any]]:
        """Log-probabilities that were not told yet."""
        told, self.logprobs = self.logprobs, _no_logprobs()
        return told

    def _cut(self, last: bool) -> str:
        if self.reason is not None:
            return ""
        places = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if places:
            found, self.held, self.reason = self.held[: min(places)], "", "stop"
            return found
        # The end may be the beginning of a stop string.
        kept = 0 if last else max(
            (n for stop in self.stops for n in range(1, len(stop)) if self.held.endswith(stop[:n])), default=0
        )  # fmt: skip
        found, self.held = self.held[: len(self.held) - kept], self.held[len(self.held) - kept :]
        return found

    def _tell(self, likely: list[tuple[int, float]]) -> None:
        (own, probability), *others = likely
        token = self.tokenizer.decode([own])
        self.logprobs["tokens"].append(token)
        self.logprobs["token_logprobs"].append(probability)
        self.logprobs["top_logprobs"].append({self.tokenizer.decode([i]): p for i, p in others})
        self.logprobs["text_offset"].append(self._length)
        self._length += len(token)


def _no_logprobs() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


_STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}


@router.post("/v1/completions", summary="Continuations of prompts", responses=_STREAMED)
async def completions(given: CompletionRequest, request: Request) -> Response:
    """Texts that go on with the prompts; with `stream` their pieces as server-sent events. The same seed gives the same
    texts, whatever else is generated at the same time."""
    for name, harmless in _UNSERVED.items():
        if getattr(given, name) not in (None, harmless):
            raise RequestError(f"{name} is {getattr(given, name)!r}; this server has none, leave it out")
    stops = [given.stop] if isinstance(given.stop, str) else given.stop or []
    if not all(stops):
        raise RequestError("stop holds an empty string; give strings of at least one character")
    options = {
        "max_new_tokens": given.max_tokens,
        "do_sample": given.temperature > 0,
        "repetition_penalty": given.repetition_penalty,
        "num_return_sequences": given.n if given.temperature > 0 else 1,
        "seed": given.seed,
        "stop_strings": stops or None,
    }
    if given.temperature > 0:
        options |= {"temperature": given.temperature, "top_p": given.top_p, "top_k": given.top_k, "min_p": given.min_p}
    state = state_of(request)
    name, pipeline, streams, prompts = await state.generate(request, given.model, given.prompt, options, given.logprobs)
    copies = given.n if given.temperature > 0 else 1
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": name,
    }
    before = [_shown(pipeline, prompts[i // copies]) if given.echo else "" for i in range(len(streams))]
    texts = [Text(pipeline.tokenizer, stops, len(text)) for text in before]
    read = sum(len(prompt.ids) for prompt in prompts)
    if given.stream:
        usage = bool((given.stream_options or {}).get("include_usage"))
        events = _events(request, head, streams, texts, before, read, usage, given.logprobs is not None)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    try:
        whole = await asyncio.gather(*(_whole(stream, text) for stream, text in zip(streams, texts, strict=True)))
    finally:
        _end(streams)
    request.state.answered = _answered(read, streams, texts)
    choices = [
        {
            "index": i,
            "text": before[i] + found,
            "finish_reason": text.reason,
            "logprobs": text.logprobs if given.logprobs is not None else None,
        }
        for i, (text, found) in enumerate(zip(texts, whole, strict=True))
    ]
    return Json({**head, "choices": choices, "usage": _usage(read, texts)})


def _shown(pipeline: Pipeline[Any, Any, Any], prompt: Prompt) -> str:
    text: str = pipeline.tokenizer.decode(list(prompt.ids), skip_special_tokens=True)
    return text


def _answered(read: int, streams: list[Stream], texts: list[Text]) -> Answered:
    """What the log and headers say of it."""
    now, begun = streams[0].loop.time(), streams[0].begun
    began = min((stream.began for stream in streams if stream.began is not None), default=now)
    return Answered([], _usage(read, texts)["total_tokens"], 0, began - begun, now - began)


def _usage(read: int, texts: list[Text]) -> dict[str, int]:
    new = sum(text.count for text in texts)
    return {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}


async def _pieces(stream: Stream, text: Text) -> AsyncIterator[str]:
    """Pieces of one text."""
    token = None
    tokens = aiter(stream)
    async for token, likely in tokens:
        if piece := text.push(token, likely):
            yield piece
        if text.reason is not None:
            stream.text.cancelled = True
            break
    await tokens.aclose()  # type: ignore[attr-defined]
    if piece := text.finish(stream.text.options.eos_token_id, token):
        yield piece


def _end(streams: list[Stream]) -> None:
    """Nobody waits for these any more."""
    for stream in streams:
        stream.text.cancelled = True


async def _whole(stream: Stream, text: Text) -> str:
    return "".join([piece async for piece in _pieces(stream, text)])


async def _events(
    request: Request,
    head: dict[str, Any],
    streams: list[Stream],
    texts: list[Text],
    before: list[str],
    read: int,
    usage: bool,
    logprobs: bool,
) -> AsyncIterator[bytes]:
    """Server-sent events: pieces of all texts as they come, the reason of each one's end, and the end of all."""
    queue: asyncio.Queue[tuple[int, str | Exception | None, Any]] = asyncio.Queue()

    async def follow(i: int) -> None:
        try:
            if before[i]:
                queue.put_nowait((i, before[i], None))
            async for piece in _pieces(streams[i], texts[i]):
                queue.put_nowait((i, piece, texts[i].told()))
            queue.put_nowait((i, None, texts[i].told()))
        except Exception as error:
            queue.put_nowait((i, error, None))

    def event(i: int, piece: str, reason: str | None, told: Any) -> bytes:
        choice = {"index": i, "text": piece, "finish_reason": reason, "logprobs": told if logprobs else None}
        return b"data: " + orjson.dumps({**head, "choices": [choice]}) + b"\n\n"

    followers = [asyncio.create_task(follow(i)) for i in range(len(streams))]
    try:
        left = len(streams)
        while left:
            i, piece, told = await queue.get()
            if isinstance(piece, Exception):
                yield b"data: " + orjson.dumps(body_of(path_of(request.scope), piece)) + b"\n\n"
                return
            if piece is None:
                left -= 1
                yield event(i, "", texts[i].reason, told)
            else:
                yield event(i, piece, None, told)
        request.state.answered = _answered(read, streams, texts)
        if usage:
            yield b"data: " + orjson.dumps({**head, "choices": [], "usage": _usage(read, texts)}) + b"\n\n"
        yield b"data: [DONE]\n\n"
    finally:
        _end(streams)
        for follower in followers:
            follower.cancel()
