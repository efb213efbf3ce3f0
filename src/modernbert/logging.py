"""How much the library logs, by transformers' names: `modernbert.logging.set_verbosity_error()`."""

from __future__ import annotations

import logging
from logging import CRITICAL, DEBUG, ERROR, FATAL, INFO, WARN, WARNING, Logger

__all__ = ["CRITICAL", "DEBUG", "ERROR", "FATAL", "INFO", "WARN", "WARNING"]


def get_logger(name: str | None = None) -> Logger:
    """The logger of this name, or the library's."""
    return logging.getLogger(name or "modernbert")


def get_verbosity() -> int:
    """The level from which on the library logs."""
    return get_logger().getEffectiveLevel()


def set_verbosity(verbosity: int) -> None:
    """Log from this level on, such as `logging.INFO`; to stderr if the program has set up no logging of its own."""
    logger = get_logger()
    logger.setLevel(verbosity)
    if verbosity < WARNING and not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())


def set_verbosity_debug() -> None:
    set_verbosity(DEBUG)


def set_verbosity_info() -> None:
    set_verbosity(INFO)


def set_verbosity_warning() -> None:
    set_verbosity(WARNING)


def set_verbosity_error() -> None:
    set_verbosity(ERROR)
