"""What commands say on standard error: one line a message, escaped and bounded, options in the spelling of flags."""

from __future__ import annotations

import contextlib
import logging
import re
import signal
from collections.abc import Iterable, Iterator, Mapping

import typer

from modernbert.errors import printable

_LONGEST = 600  # characters of a message
# A quoted value, which stays as it is; or a word that may name an option, with what makes a keyword argument of it.
_WORDS = re.compile(
    r"""(?<!\w)'(?:[^'\\]|\\.)*'|(?<!\w)"(?:[^"\\]|\\.)*"|"""
    r"""(?<![\w./-])([a-z][a-z_]*)(?![\w/-]|\.\w)(=True\b|="[^"]*"|=)?"""
)
# Where a word that is an ordinary one too stands for an option: what is before it, and what follows.
_BEFORE = ("; ", ": ", ", ", "give ", "and ", "(")
_AFTER = re.compile(r" (?:is|are|was|holds|and) |, such")


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
    """ "1 answer", "2 answers"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def flags_of(names: Iterable[str]) -> dict[str, str]:
    """The flag of each option that is called like it."""
    return {name: f"--{name.replace('_', '-')}" for name in names}


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """A message of the library with its options as they are given on the command line.

    Args:
        message: such as "top_k is 0; it must be ...", "truncation=True cuts it", or "give held_out=0".
        flags: how an option is given here, by its name in Python: "--top-k", or "--option NAME".
    """

    def spelled(found: re.Match[str]) -> str:
        name, keyword = found[1], found[2]
        before, after = message[: found.start()], message[found.end() :]
        is_option = keyword or "_" in (name or "") or ((not before or before.endswith(_BEFORE)) and _AFTER.match(after))
        if name not in flags or not is_option:
            return found[0]
        flag = flags[name]
        if keyword and keyword.startswith('="'):
            return f"{flag} {keyword[2:-1]}"
        if keyword == "=" and re.match(r"['\w]", after):
            return f"{flag} "
        return f"{flag}=true" if keyword == "=True" and flag.startswith("--option") else flag

    return _WORDS.sub(spelled, message)


@contextlib.contextmanager
def errors_in_flags(flags: Mapping[str, str]) -> Iterator[None]:
    """Errors of the library that name options name flags instead; `flags` as in `in_flags`, and may still grow."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if len(error.args) == 1 and type(error).__module__ in ("builtins", "modernbert.errors"):
            error.args = (in_flags(str(error), flags),)
        raise


@contextlib.contextmanager
def warnings_shown() -> Iterator[None]:
    """What the library warns of is said like everything else."""
    handler = _Handler(logging.WARNING)
    logger = logging.getLogger("modernbert")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())
