"""What other libraries' objects need to work with our models, and what makes them faster. Nothing here imports them."""

from modernbert.lazy import exports

_EXPORTS = {"CheckpointCallback": "interop.trainer"}
__getattr__, __dir__ = exports(__name__, _EXPORTS)
__all__ = ["CheckpointCallback"]
