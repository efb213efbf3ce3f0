"""Replies: JSON by orjson, which reads NumPy's arrays as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import torch
from starlette.responses import JSONResponse


def _other(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.numpy()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no JSON")


class Json(JSONResponse):
    """A reply of JSON; NaN and infinite numbers become null."""

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content, default=_other, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)


class Encoded(JSONResponse):
    """A reply of JSON that is written already."""

    def render(self, content: bytes) -> bytes:
        return content
