"""The errors this library raises on purpose, each a subclass of the builtin that callers would catch."""


class ConfigError(ValueError):
    """A configuration holds an impossible value; the message names the field, the value and what is allowed."""


class InputError(ValueError):
    """A model, tokenizer or pipeline was given input that contradicts itself or cannot be served."""


class CheckpointError(ValueError):
    """A checkpoint's files are missing, malformed, of an unsafe kind, or do not fit the model."""


class NotFoundError(CheckpointError, OSError):
    """A file or repository is neither on this disk nor on the Hub, or the Hub cannot be reached."""


class DivergedError(RuntimeError):
    """A training run's loss is no longer a number."""


class InterruptedRunError(RuntimeError):
    """A training run was told to stop, or lost one of its processes; the message says what it goes on from."""


class QuantizationError(ValueError):
    """Quantizing a model would cost more than was allowed; the message gives what it would."""


class BackendError(RuntimeError):
    """An attention backend asked for by name cannot run here; the message gives the reason."""
