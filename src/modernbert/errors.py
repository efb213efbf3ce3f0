"""The errors this library raises on purpose, each a subclass of the builtin that callers would catch; and how values
and texts are shown in messages."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable
from typing import Any

# What a terminal acts on, what breaks or reorders a line, and what no file can hold.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class ConfigError(ValueError):
    """A configuration holds an impossible value; the message names the field, the value and what is allowed."""


class InputError(ValueError):
    """A model, tokenizer or pipeline was given input that contradicts itself or cannot be served."""


class PatchError(InputError, TypeError):
    """An object cannot be patched; the message says why. Nothing was changed."""


class CheckpointError(ValueError):
    """A checkpoint's files are missing, malformed, of an unsafe kind, or do not fit the model."""


class NotFoundError(CheckpointError, OSError):
    """A file or repository is neither on this disk nor on the Hub, or the Hub cannot be reached."""


class DivergedError(RuntimeError):
    """A training run's loss is no longer a number."""


class InterruptedRunError(RuntimeError):
    """A training run was stopped, or lost one of its processes; the message says what it can continue from."""


class TerminatedRunError(InterruptedRunError):
    """A training run was ended by SIGTERM, and saved its last step."""


class QuantizationError(ValueError):
    """Quantizing a model would cost more than was allowed; the message gives what it would."""


class ExportError(ValueError):
    """The numbers of an exported graph are not the model's."""


class FrozenError(RuntimeError):
    """A weight of an optimized model was used or written to where its numbers are not; the message says what to do."""


class BackendError(RuntimeError):
    """An attention backend asked for by name cannot run here; the message gives the reason."""


def printable(text: str, keep: str = "", limit: int | None = None) -> str:
    """A text that is safe to show: control characters and the like are escaped as in Python.

    Args:
        text: any text, from a file, a checkpoint or an error.
        keep: control characters that stay, such as "\\n".
        limit: characters at the most; the middle of a longer text is left out.
    """
    text = _UNSEEN.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)
    if limit is None or len(text) <= limit:
        return text
    half = (limit - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def shown(value: Any) -> str:
    """A value of any kind for a message: the beginning of its representation, on one line."""
    try:
        text = _SHORTER.repr(value)
    except Exception:  # of a class made elsewhere
        text = f"a {type(value).__name__}"
    text = " ".join(printable(text, keep="\n").split())
    return text if len(text) <= 100 else text[:97] + "..."


_SHORTER = reprlib.Repr()
_SHORTER.maxstring = _SHORTER.maxother = 80


def listed(names: Iterable[Any], most: int = 5) -> str:
    """The first of many names for a message, with commas between, and how many more there are."""
    every = [printable(str(name), limit=80) for name in names]
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")
