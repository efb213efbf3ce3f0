"""Running the app by uvicorn: sockets, signals and the order in which a server ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from modernbert.serving.app import create_app
from modernbert.serving.options import ServeOptions
from modernbert.serving.sockets import BACKLOG, explained
from modernbert.serving.state import State

logger = logging.getLogger(__name__)

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
        says: whether it says where it serves.
        told: called once it serves.
    """

    def __init__(self, config: uvicorn.Config, state: State, says: bool, told: Callable[[], None] | None) -> None:
        super().__init__(config)
        self.state, self.says, self.told = state, says, told

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
        if self.started and self.told is not None:
            self.told()
        if self.started and self.says:
            options = self.state.options
            names = ", ".join(f"{one.name} ({', '.join(one.pipelines)})" for one in self.state.models.served.values())
            names += "".join(f"; {', '.join(some)} share one encoder" for some in self.state.models.sharing)
            where = options.unix_socket
            if where is None:
                port = self.servers[0].sockets[0].getsockname()[1]
                host = f"[{options.host}]" if ":" in options.host else options.host
                where = f"http://{host}:{port}"
            with contextlib.suppress(OSError):  # a full disk is no reason not to serve
                sys.stderr.write(f"modernbert serves {names} at {where}\n")
                sys.stderr.flush()


def serve(
    options: ServeOptions, sockets: list[socket.socket], says: bool = True, started: Callable[[], None] | None = None
) -> int:
    """Serve at sockets that are bound until a signal comes; the exit code of the process.

    Args:
        options: of the server.
        sockets: bound, and not listening yet, so that nobody is accepted before the models are loaded.
        says: whether it says where it serves.
        started: called once it serves.

    Raises:
        InputError: an option is not allowed, or the server cannot listen there.
        NotFoundError, CheckpointError: a model cannot be loaded.
    """
    app = create_app(**vars(options))
    gc.freeze()  # what is loaded stays: the collector need not look at it again
    gc.enable()
    config = uvicorn.Config(
        app,
        log_level="error",  # what clients do wrong is no line of the log
        access_log=False,
        server_header=False,
        http=Protocol,
        ws="none",
        timeout_graceful_shutdown=1,
        backlog=BACKLOG,
    )
    server = Server(config, app.state.serving, says, started)
    with explained(options):
        for one in sockets:
            one.listen(BACKLOG)
    server.run(sockets=sockets)
    return 0 if server.started else 1
