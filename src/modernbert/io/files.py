"""Files and folders written whole or not at all, by one process at a time; JSON that is read within bounds."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modernbert.errors import InputError

_DEEPEST = 64  # levels of lists and objects in JSON


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give errors of the system that name no file, such as one of a full disk, the name of `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _make_folder(folder: Path) -> None:
    file = next((place for place in (folder, *folder.parents) if place.is_file()), None)
    if file is not None:
        raise NotADirectoryError(f"{folder} cannot be a folder: {file} is a file; name another folder")
    folder.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def locked(path: Path, refusal: str) -> Iterator[None]:
    """Keep a path for this process alone, by a file `.NAME.lock` beside it.

    Raises:
        InputError: another process keeps it; `refusal` is the message.
    """
    from filelock import FileLock, Timeout

    _make_folder(path.parent)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(refusal) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows refuses this, and removes the file on release
            Path(lock.lock_file).unlink()  # before it is released: later it could be another process's
        lock.release()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to, which replaces `path` once it is written whole."""
    _make_folder(path.parent)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with naming(path):
            yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # what an ordinary new file would have
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def making(folder: Path) -> Iterator[Path]:
    """Give a temporary folder beside `folder`, which must not hold anything; it gets that name once filled."""
    _make_folder(folder.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    temporary.chmod(0o755)
    try:
        with naming(folder):
            yield temporary
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def replace_folder(new: Path, folder: Path) -> None:
    """Let a finished folder `new` take the name of `folder`, which may exist; on Linux that is one step.

    Elsewhere the old folder is renamed to `.NAME.previous` first, where a process that is killed then leaves it whole.
    """
    if not folder.exists():
        new.rename(folder)
    elif _exchanged(new, folder):
        shutil.rmtree(new, ignore_errors=True)
    else:
        previous = folder.with_name(f".{folder.name}.previous")
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
        new.rename(folder)
        shutil.rmtree(previous, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two names in one step, if the system can: Linux's renameat2 with RENAME_EXCHANGE, from here."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return int(rename(-100, os.fsencode(one), -100, os.fsencode(other), 2)) == 0


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: it is no JSON, is not UTF-8, or is nested deeper than anything that is read here.
    """
    with contextlib.suppress(RecursionError):
        level = [value := json.loads(text)]
        if isinstance(text, str) and text.count("[") + text.count("{") <= _DEEPEST:
            return value  # almost all rows of tables, and sooner
        for _ in range(_DEEPEST + 1):
            level = [v for v in level if isinstance(v, dict | list)]
            if not level:
                return value
            level = [inner for v in level for inner in (v.values() if isinstance(v, dict) else v)]
    raise ValueError(f"it is nested more than {_DEEPEST} levels deep")
