"""Where a server listens. Nothing here imports torch."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

from modernbert.errors import InputError
from modernbert.serving.options import ServeOptions

BACKLOG = 2048  # connections that wait to be accepted


@contextlib.contextmanager
def listening(options: ServeOptions) -> Iterator[list[socket.socket]]:
    """The sockets that the server has, until the end of the block.

    Raises:
        InputError: another program listens there, or it is not allowed.
    """
    path = options.unix_socket
    with contextlib.ExitStack() as opened:
        sockets: list[socket.socket] = []
        with explained(options):
            if path is not None:
                _remove_left(path)
                sockets.append(opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)))
                sockets[0].bind(path)
                opened.callback(Path(path).unlink, missing_ok=True)
                Path(path).chmod(0o666)
            else:
                found = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
                for family, kind, number, _, address in dict.fromkeys(found):
                    made = opened.enter_context(socket.socket(family, kind, number))
                    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    if family == socket.AF_INET6:
                        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    made.bind(address)
                    sockets.append(made)
        yield sockets


@contextlib.contextmanager
def explained(options: ServeOptions) -> Iterator[None]:
    """Say in one line where the server cannot listen, and why; raises `InputError`."""
    try:
        yield
    except OSError as error:
        where = options.unix_socket or f"{options.host}:{options.port}"
        raise InputError(f"the server cannot listen on {where}: {error.strerror}") from None


def _remove_left(path: str) -> None:
    """Remove a socket that a program left which no longer runs; anything else stays, and is in the way."""
    if not Path(path).is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        try:
            other.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink()
