"""What commands say on standard error: one line a message, escaped and bounded, options in the spelling of flags."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import re
import signal
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import typer

from modernbert.errors import printable

_LONGEST = 600  # characters of a message
_flags: contextvars.ContextVar[Mapping[str, str]] = contextvars.ContextVar("flags", default=MappingProxyType({}))
# A quoted value, which stays as it is; or what may be an option's name: a word with an underscore, one before "=", or
# one that begins a clause and of which something is said.
_OPTION = re.compile(
    r"""
    (?<!\w) (?: '(?:[^'\\]|\\.)*' | "(?:[^"\\]|\\.)*" )
    | (?<![\w./-]) (?<!--option\ )
      (?P<name>
        [a-z]+_[a-z_]+ | [a-z]+(?==)
        | (?:^|(?<=[;:,(]\ )|(?<=give\ )|(?<=and\ )) [a-z]+ (?=\ (?:is|are|was|holds|and)\ |,\ such)
      )
      (?![\w/-]|\.\w)
      (?P<value>=True\b|="[^"]*"|=)?
    """,
    re.VERBOSE,
)


class InterruptedCommandError(Exception):
    """A command was interrupted, from the keyboard or by SIGTERM; the message says how to go on.

    Args:
        message: one line.
        code: exit code of the command: 128 and the number of the signal.
    """

    def __init__(self, message: str, code: int = 128 + signal.SIGINT) -> None:
        super().__init__(message)
        self.code = code


def say(message: object) -> None:
    """Write one line to standard error."""
    typer.echo(f"modernbert: {printable(' '.join(str(message).split()), limit=_LONGEST)}", err=True)


def counted(number: int, noun: str) -> str:
    """ "1 answer", "2,000 answers"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def in_flags(message: str, flags: Mapping[str, str] | None = None) -> str:
    """A message of the library with its options as they are given on the command line.

    Args:
        message: such as "top_k is 0; it must be ...", "truncation=True cuts it", or "give held_out=0".
        flags: the flag of each option; by default those of the command that runs.
    """
    known = _flags.get() if flags is None else flags

    def spelled(found: re.Match[str]) -> str:
        flag, value = known.get(found["name"] or ""), found["value"] or ""
        if flag is None:
            return found[0]
        if value.startswith('="'):
            return f"{flag} {value[2:-1]}"
        return f"{flag} " if value == "=" and re.match(r"['\w]", message[found.end() :]) else flag

    return _OPTION.sub(spelled, message)


@contextlib.contextmanager
def errors_in_flags(flags: Mapping[str, str]) -> Iterator[None]:
    """While a command with these flags runs, errors of the library that name options name flags instead."""
    token = _flags.set(flags)
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if len(error.args) == 1 and type(error).__module__ in ("builtins", "modernbert.errors"):
            error.args = (in_flags(str(error)),)
        raise
    finally:
        _flags.reset(token)


@contextlib.contextmanager
def warnings_shown() -> Iterator[None]:
    """Show warnings of the library as commands show their messages."""
    handler = _Handler(logging.WARNING)
    logger = logging.getLogger("modernbert")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(in_flags(record.getMessage()))
