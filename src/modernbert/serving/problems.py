"""What goes wrong with a request, and how each API says it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from modernbert import errors
from modernbert.errors import ConfigError, InputError, NotFoundError

logger = logging.getLogger(__name__)


class ServingError(Exception):
    """A request that is not answered.

    Attributes:
        status: of the reply.
        kind: in one word, as OpenAI's API names kinds.
        headers: of the reply.
    """

    status: int
    kind: str
    headers: Mapping[str, str]

    def __init_subclass__(cls, status: int = 500, kind: str = "server_error", **headers: str) -> None:
        super().__init_subclass__()
        cls.status, cls.kind = status, kind
        cls.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class RequestError(ServingError, status=422, kind="invalid_request_error"):
    """The request itself is wrong."""


class KeyRefusedError(ServingError, status=401, kind="authentication_error", WWW_Authenticate="Bearer"):
    """No API key, or a wrong one."""


class UnknownModelError(ServingError, status=404, kind="model_not_found"):
    """There is no such model, or none for this task."""


class SlowClientError(ServingError, status=408, kind="request_timeout", Connection="close"):
    """The client took too long to send its request."""


class TooLargeError(ServingError, status=413, kind="request_too_large"):
    """More bytes or texts than the server takes."""


class OverloadedError(ServingError, status=429, kind="overloaded"):
    """Too much waits already; `seconds` after which to try again."""

    def __init__(self, message: str, seconds: int) -> None:
        super().__init__(message)
        self.headers = {"Retry-After": str(seconds)}


class EngineError(ServingError):
    """The model failed; the log says how."""


class DrainingError(ServingError, status=503, kind="shutting_down", Retry_After="5", Connection="close"):
    """The server is about to end."""


class NotReadyError(ServingError, status=503, kind="not_ready"):
    """Texts are not computed at present."""


class LateError(ServingError, status=504, kind="timeout"):
    """The deadline of a request has passed."""


class LostError(ServingError, status=503, kind="lost", Retry_After="5"):
    """Replicas on a cluster were lost while they answered."""


class NoMetricsError(ServingError, status=404, kind="not_found"):
    """There is nothing to count here."""


def failed(error: Exception) -> Exception:
    """What a client is told of an error that the model raised, which the log has as a whole."""
    if isinstance(error, InputError):
        return error
    logger.error("the model failed", exc_info=error)
    return EngineError(f"the model failed: {type(error).__name__}")


def status_of(error: Exception) -> int:
    """The status of the reply."""
    if isinstance(error, ServingError):
        return error.status
    if isinstance(error, NotFoundError):
        return 404
    return 422 if isinstance(error, InputError | ConfigError) else 500


def message_of(error: Exception) -> str:
    """One line for the client; what is not the client's business is in the log."""
    if isinstance(error, ServingError) or type(error).__module__ == errors.__name__:
        return " ".join(str(error).split())
    return "the server failed; its log says how"


# The style of errors of each API, by how its paths begin.
_STYLES = {
    "openai": ("/v1/embeddings", "/v1/models", "/v1/completions", "/classify", "/score", "/pooling", "/v1/tasks"),
    "cohere": ("/rerank", "/v1/rerank", "/v2/rerank"),
    "tei": ("/embed", "/embed_all", "/predict", "/similarity", "/tokenize", "/decode", "/info", "/"),
}
_TEI_KINDS = {401: "Unauthorized", 413: "Validation", 422: "Validation", 429: "Overloaded", 503: "Unhealthy"}


def body_of(path: str, error: Exception) -> dict[str, Any]:
    """The reply's body, in the shape of the API that was called."""
    status, message = status_of(error), message_of(error)
    kind = (
        error.kind if isinstance(error, ServingError) else "invalid_request_error" if status < 500 else "server_error"
    )
    if path in _STYLES["tei"]:
        return {"error": message, "error_type": _TEI_KINDS.get(status, "Backend" if status >= 500 else "Validation")}
    if path in _STYLES["cohere"]:
        return {"message": message, "error": message, "error_type": _TEI_KINDS.get(status, "Validation")}
    return {"error": {"message": message, "type": kind, "param": None, "code": kind}}
