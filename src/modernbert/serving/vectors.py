"""Vectors as replies carry them: numbers, base64 or bytes, and in fewer bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pybase64
from numpy.typing import NDArray
from starlette.responses import Response

BYTES = "application/octet-stream"


def as_dtype(vectors: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Vectors (N, dimensions) in fewer bits.

    Args:
        vectors: float32.
        dtype: int8 is 127 times the numbers of the vector scaled to length one, rounded; binary and ubinary are the
            signs, eight a byte, the first in the highest bit, as sentence-transformers has them.
    """
    if dtype == "float32":
        return vectors
    if dtype == "float16":
        return vectors.astype(np.float16)
    if dtype == "int8":
        lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
        scaled: NDArray[np.int8] = np.rint(vectors / np.maximum(lengths, 1e-12) * 127).astype(np.int8)
        return scaled
    packed = np.packbits(vectors > 0, axis=-1)
    return packed if dtype == "ubinary" else (packed.astype(np.int16) - 128).astype(np.int8)


def as_bytes(vectors: NDArray[Any]) -> Response:
    """A reply of the bytes of vectors (N, dimensions) alone; headers say how many there are, and of which type."""
    shape = ",".join(map(str, vectors.shape))
    return Response(vectors.tobytes(), media_type=BYTES, headers={"X-Shape": shape, "X-Dtype": str(vectors.dtype)})


def base64_reply(vectors: NDArray[Any], after: bytes) -> bytes:
    """A reply of OpenAI's API in JSON: as `data` the bytes of each vector (N, dimensions), least significant first, in
    base64, and then `after`. Megabytes are copied once."""
    rows = np.ascontiguousarray(vectors)
    size = rows[0].nbytes
    if size % 3 == 0:  # then no vector ends within a group of four letters
        whole, step = memoryview(pybase64.b64encode(rows.data)), size // 3 * 4
        written = [whole[i * step : (i + 1) * step] for i in range(len(rows))]
    else:
        written = [memoryview(pybase64.b64encode(row.data)) for row in rows]
    parts: list[bytes | memoryview] = [b'{"object":"list","data":[']
    for i, letters in enumerate(written):
        parts += (b'%b{"object":"embedding","index":%d,"embedding":"' % (b'"},' if i else b"", i), letters)
    return b"".join([*parts, b'"}],', after])
