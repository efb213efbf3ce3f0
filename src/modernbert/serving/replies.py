"""Replies: JSON by orjson, which reads NumPy's arrays as they are.

Writing a large reply takes long, and orjson holds the interpreter's lock meanwhile, so that a thread of its own would
not help others. It is written in pieces, between which other requests have their turn.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import orjson
import torch
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

_ARRAYS = np.ndarray | torch.Tensor
_PIECE, _ITEMS = 2**15, 256  # numbers of an array, and items of a list, that are written at one time
_TURN = 0.005  # seconds of writing after which others have their turn


def _other(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.numpy()
    if isinstance(value, np.ndarray):  # whose rows do not lie one after another
        return np.ascontiguousarray(value)
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no JSON")


def _written(value: Any) -> bytes:
    return orjson.dumps(value, default=_other, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)


def _holds_arrays(value: Any) -> bool:
    """Whether there is an array in it; items of a list are alike."""
    if isinstance(value, Mapping):
        return any(map(_holds_arrays, value.values()))
    return bool(value) and _holds_arrays(value[0]) if isinstance(value, list) else isinstance(value, _ARRAYS)


def pieces(value: Any) -> Iterator[bytes]:
    """The JSON of a value in pieces: of arrays and lists some rows, of what has arrays in it each part."""
    if isinstance(value, torch.Tensor):
        value = value.numpy()
    before = b"["
    if isinstance(value, np.ndarray) and value.ndim > 1 and value.size > _PIECE:
        step = max(1, _PIECE // value[0].size)
        for first in range(0, len(value), step):
            yield before + _written(value[first : first + step])[1:-1]
            before = b","
        yield b"]"
    elif isinstance(value, list) and _holds_arrays(value):
        for item in value:
            yield before
            yield from pieces(item)
            before = b","
        yield b"]"
    elif isinstance(value, list) and len(value) > _ITEMS:
        for first in range(0, len(value), _ITEMS):
            yield before + _written(value[first : first + _ITEMS])[1:-1]
            before = b","
        yield b"]"
    elif isinstance(value, Mapping) and any(isinstance(part, list | _ARRAYS) for part in value.values()):
        before = b"{"
        for name, part in value.items():
            yield before + _written(str(name)) + b":"
            yield from pieces(part)
            before = b","
        yield b"}"
    else:
        yield _written(value)


class Json(JSONResponse):
    """A reply of JSON; NaN and infinite numbers become null.

    Args:
        content: what is written when the reply is sent.
        status_code, headers: of the reply.
    """

    def __init__(self, content: Any, status_code: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(None, status_code, headers)
        self.content = content

    def render(self, content: Any) -> bytes:
        """Nothing yet."""
        return b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write and send it."""
        parts, turn = [], time.perf_counter() + _TURN
        for part in pieces(self.content):
            parts.append(part)
            if time.perf_counter() > turn:
                await asyncio.sleep(0)
                turn = time.perf_counter() + _TURN
        self.body = b"".join(parts)
        self.headers["content-length"] = str(len(self.body))
        await super().__call__(scope, receive, send)


class Encoded(JSONResponse):
    """A reply of JSON that is written already."""

    def render(self, content: bytes) -> bytes:
        return content
