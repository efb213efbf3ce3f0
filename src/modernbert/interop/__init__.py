"""What other libraries' objects need to work with our models, and what makes them faster. Nothing here imports them."""

from modernbert.interop.trainer import CheckpointCallback

__all__ = ["CheckpointCallback"]
