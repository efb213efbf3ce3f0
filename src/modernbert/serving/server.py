"""Running the app by uvicorn: sockets, signals and the order in which a server ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from modernbert.errors import InputError
from modernbert.serving.app import create_app
from modernbert.serving.options import ServeOptions
from modernbert.serving.state import State

logger = logging.getLogger(__name__)

_BACKLOG = 2048  # connections that wait to be accepted
_NOTICE = 0.2  # seconds in which those who watch the readiness may see that it is over


class Protocol(H11Protocol):
    """uvicorn's, which closes connections that bring no whole head of a request."""

    patience = 10.0  # seconds, at least; twice that at the most
    _idle: Any = ()  # the request after which nothing whole came, at the last look

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._next_look = self.loop.call_later(self.patience, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self._next_look.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and self._idle is self.cycle:
            self.transport.close()
            return
        self._idle = self.cycle if is_idle else ()
        self._next_look = self.loop.call_later(self.patience, self._look)


class Server(uvicorn.Server):
    """uvicorn's server, which on the first signal refuses new work, finishes what it accepted, and ends with 0.

    Args:
        config: of uvicorn.
        state: of the app.
    """

    def __init__(self, config: uvicorn.Config, state: State) -> None:
        super().__init__(config)
        self.state = state

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take SIGTERM and SIGINT for ourselves; uvicorn would raise them again at the end."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; a second signal ends at once."""
        if self.state.draining:
            self.force_exit = self.should_exit = True
            return
        self.state.draining = True
        self._loop.call_soon_threadsafe(lambda: self._loop.create_task(self._drain()))

    async def _serve(self, sockets: Any = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super()._serve(sockets)

    async def _drain(self) -> None:
        until = self._loop.time() + self.state.options.drain
        await asyncio.sleep(_NOTICE)
        while self.state.running and self._loop.time() < until:
            await asyncio.sleep(0.02)
        self.should_exit = True

    async def startup(self, sockets: Any = None) -> None:
        """Listen, and say where."""
        await super().startup(sockets=sockets)
        if self.started:
            options = self.state.options
            names = ", ".join(f"{one.name} ({', '.join(one.pipelines)})" for one in self.state.models.served.values())
            where = options.unix_socket
            if where is None:
                port = self.servers[0].sockets[0].getsockname()[1]
                host = f"[{options.host}]" if ":" in options.host else options.host
                where = f"http://{host}:{port}"
            sys.stderr.write(f"modernbert serves {names} at {where}\n")
            sys.stderr.flush()


def serve(options: dict[str, Any]) -> int:
    """Serve until a signal comes; the exit code of the process.

    Args:
        options: of `ServeOptions`.

    Raises:
        InputError: an option is not allowed, or the server cannot listen there.
        NotFoundError, CheckpointError: a model cannot be loaded.
    """
    with listening(ServeOptions.of(options, "serve")) as sockets:
        app = create_app(**options)
        config = uvicorn.Config(
            app,
            log_level="error",  # what clients do wrong is no line of the log
            access_log=False,
            server_header=False,
            http=Protocol,
            ws="none",
            timeout_graceful_shutdown=1,
            backlog=_BACKLOG,
        )
        server = Server(config, app.state.serving)
        with _explained(server.state.options):
            for one in sockets:
                one.listen(_BACKLOG)
        server.run(sockets=sockets)
    return 0 if server.started else 1


@contextlib.contextmanager
def listening(options: ServeOptions) -> Iterator[list[socket.socket]]:
    """The sockets that the server has, until the end of the block.

    Raises:
        InputError: another program listens there, or it is not allowed.
    """
    path = options.unix_socket
    with contextlib.ExitStack() as opened:
        sockets: list[socket.socket] = []
        with _explained(options):
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
def _explained(options: ServeOptions) -> Iterator[None]:
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
