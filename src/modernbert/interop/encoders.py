"""Objects of sentence-transformers and of what is built on it: batches by tokens, where they make vectors or scores.

Their methods stay as they are. While one runs, it hands over more texts at a time than it was asked to, and the
object's parts compute them in groups of rows, each cut to its longest text; all else (prompts, pooling, precision,
conversions, progress) is their code.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from modernbert.interop.replacing import CPU_TOKENS, Replaced, computed_in_turn, reads_padding, replace_class

_BASES = {"SentenceTransformer", "CrossEncoder", "SparseEncoder", "MultiVectorEncoder"}
_LATE = {"MultiVectorEncoder", "ColBERT"}
_TEXTS = 256  # that are tokenized together, if `batch_size` is no larger
_GPU_TOKENS = 65536  # of a group of rows
_BY_TOKEN = {"input_ids", "attention_mask", "token_type_ids", "token_embeddings", "token_scores", "mlm_logits"}
_runs: contextvars.ContextVar[bool] = contextvars.ContextVar("_runs", default=False)


def is_encoder(module: nn.Module) -> bool:
    """Whether an object is one of these, and not patched yet."""
    names = {cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("sentence_transformers.")}
    return bool(names & _BASES) and not isinstance(module, Replaced)


def patch_encoder(module: nn.Module) -> None:
    """Patch such an object, whose models are patched."""
    replace_class(module, PatchedEncoder, ("encode", "predict", "forward", "start_multi_process_pool"))


class PatchedEncoder(Replaced):
    """Goes before the class of such an object."""

    def _encode(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _run(self, "encode", args, kwargs)

    def _predict(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _run(self, "predict", args, kwargs)

    def _start_multi_process_pool(self: Any, *args: Any, **kwargs: Any) -> Any:
        return copy.deepcopy(self).start_multi_process_pool(*args, **kwargs)  # other processes know no patched class

    def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        plain = functools.partial(self.plain.forward, self)
        features = args[0] if args and isinstance(args[0], dict) else {}
        mask = features.get("attention_mask")
        if not _runs.get() or not isinstance(mask, Tensor) or mask.dim() != 2 or len(mask) < 2:
            return plain(*args, **kwargs)
        most = CPU_TOKENS if mask.device.type == "cpu" else _GPU_TOKENS
        if int((mask != 0).sum()) <= most or len(features.get("input_ids", ())) != len(mask):
            return plain(*args, **kwargs)
        # Of queries that are filled up with tokens outside of the mask, no column is padding.
        kinds = {cls.__name__ for cls in type(self).__mro__} if reads_padding.get() else set()
        mask = torch.ones_like(mask) if kinds & _LATE else mask
        return computed_in_turn(lambda part: plain(part, *args[1:], **kwargs), features, mask, most, _BY_TOKEN)


def _run(encoder: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One of their methods, in larger batches."""
    method = getattr(encoder.plain, name)
    try:
        bound = inspect.signature(method).bind(encoder, *args, **kwargs)
    except TypeError:  # their own error, or an older name of an argument
        return method(encoder, *args, **kwargs)
    given = {**bound.arguments, **bound.arguments.get("kwargs", {})}
    size = given.get("batch_size", 32)
    if isinstance(size, int) and size > 0 and given.get("pool") is None:
        bound.arguments["batch_size"] = max(size, _TEXTS)
    # Queries of late interaction may be filled up with tokens that attend and are not attended to.
    queries = bool(given.get("is_query", "is_query" in inspect.signature(method).parameters))
    queries |= given.get("task") == "query"
    with _set(_runs, True), _set(reads_padding, queries):
        return method(*bound.args, **bound.kwargs)


@contextlib.contextmanager
def _set(variable: contextvars.ContextVar[bool], value: bool) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
