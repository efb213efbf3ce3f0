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


def base64_list(vectors: NDArray[Any]) -> list[bytes]:
    """A JSON string of each vector's bytes, least significant first, in base64."""
    rows = np.ascontiguousarray(vectors)
    size = rows[0].nbytes if len(rows) else 0
    if size % 3 == 0:  # then no vector ends within a group of four letters
        whole, step = pybase64.b64encode(rows.tobytes()), size // 3 * 4
        return [b'"%b"' % whole[i * step : (i + 1) * step] for i in range(len(rows))]
    return [b'"%b"' % pybase64.b64encode(row.tobytes()) for row in rows]
