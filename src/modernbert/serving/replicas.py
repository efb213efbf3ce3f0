"""The app on a Ray cluster, by Ray Serve: replicas that scale by the tokens that wait, behind a front that asks again.

A request is answered by one replica, whose engine packs it with others as in a server of one process. Where a replica
is lost, the front gives its requests to another one: a text's numbers do not depend on who computes it
(docs/invariance.md), so the answer is the one that would have come.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from modernbert.checks import Options, option
from modernbert.errors import InputError, shown
from modernbert.serving.options import ServeOptions
from modernbert.serving.problems import LateError, LostError, NoMetricsError, ServingError, body_of
from modernbert.serving.replies import Json

if TYPE_CHECKING:
    from ray.serve import Application

_METRIC = "waiting_tokens"
_ONGOING = 10_000  # requests at a replica; the engine counts tokens, and refuses what is too much with 429
_LOOK_BACK = 15.0  # seconds over which waiting tokens are averaged; Ray Serve asks for more than 10
_GRACE = 5.0  # seconds beyond a request's time, in which a replica says itself that it was late
_PAUSE = 0.05  # seconds before a lost request is asked again, doubled each time
# What Ray Serve has instead: options that mean something else, or nothing, on a cluster.
_NOT_HERE = {
    "host": "it is the proxy's of Ray Serve: ray.serve.start(http_options={'host': ...})",
    "port": "it is the proxy's of Ray Serve: ray.serve.start(http_options={'port': ...})",
    "unix_socket": "Ray Serve listens on a port alone",
    "workers": "give min_replicas and max_replicas",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplicaOptions(Options):
    """Options of `ray_app` beside those of the server that each replica is."""

    min_replicas: int = option(1, "Replicas at the least.", least=1)
    max_replicas: int = option(4, "Replicas at the most.", least=1)
    target_waiting: int = option(
        20_000,
        "Waiting tokens of a replica, beyond which another one starts; what it computes in ten seconds.",
        least=1,
    )
    upscale_delay: float = option(10.0, "Seconds that more must wait before a replica starts.", least=0)
    downscale_delay: float = option(300.0, "Seconds that less must wait before a replica ends.", least=0)
    cpus: float = option(1.0, "Cores that Ray reserves for a replica; a whole number of them computes.", above=0)
    gpus: float = option(0.0, "GPUs that Ray reserves for a replica.", least=0)
    fronts: int = option(1, "Processes that hold clients' requests and ask the replicas.", least=1)
    retries: int = option(3, "Times that a request is asked again whose replica was lost.", least=0)


def ray_app(**options: Any) -> Application:
    """An application of Ray Serve: every path of `create_app`, answered by replicas on a Ray cluster.

    A replica that is lost, as with its machine, takes no request with it: the front asks another one, up to `retries`
    times, and then answers 503. Only a stream of generated text that had begun ends with an error. `/metrics` is
    answered with 404, because each replica counts for itself; Ray has metrics of its own.

    Example:
        from ray import serve
        serve.run(ray_app(model=["Alibaba-NLP/gte-modernbert-base"], max_replicas=8, cpus=4), route_prefix="/")

    Args:
        options: those of `ReplicaOptions`, and those of `ServeOptions` but for host, port, unix_socket and workers.
            API keys are read here, and handed to the replicas.

    Raises:
        InputError: an option is not allowed, or Ray is not installed.
    """
    own = {field.name for field in dataclasses.fields(ReplicaOptions)}
    chosen = ReplicaOptions.of({name: value for name, value in options.items() if name in own}, "ray_app")
    given = {name: value for name, value in options.items() if name not in own}
    server = ServeOptions.of(given, "ray_app")
    for name, instead in _NOT_HERE.items():
        if given.get(name) is not None:
            raise InputError(f"{name} is {shown(given[name])}; on a cluster {instead}")
    if chosen.max_replicas < chosen.min_replicas:
        raise InputError(
            f"max_replicas is {chosen.max_replicas}; it must be at least min_replicas, {chosen.min_replicas}"
        )
    try:
        from ray import serve
        from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
    except ImportError as error:
        raise InputError("serving on a cluster needs ray: pip install 'modernbert[ray]'") from error

    policy = AutoscalingPolicy(
        policy_function="modernbert.serving.replicas:WaitingTokens", policy_kwargs={"target": chosen.target_waiting}
    )
    replica = serve.deployment(
        name="replica",
        max_ongoing_requests=_ONGOING,
        graceful_shutdown_timeout_s=server.drain,
        ray_actor_options={"num_cpus": chosen.cpus, "num_gpus": chosen.gpus},
        autoscaling_config=AutoscalingConfig(
            min_replicas=chosen.min_replicas,
            max_replicas=chosen.max_replicas,
            look_back_period_s=_LOOK_BACK,
            upscale_delay_s=chosen.upscale_delay,
            downscale_delay_s=chosen.downscale_delay,
            policy=policy,
        ),
    )(Replica)
    front = serve.deployment(
        name="front",
        max_ongoing_requests=_ONGOING,
        graceful_shutdown_timeout_s=server.drain + _GRACE,
        ray_actor_options={"num_cpus": 0.1},
        num_replicas=chosen.fronts,
    )(Front)
    settings = {**vars(server), "api_key_file": None}
    return front.bind(replica.bind(settings, server.keys()), server.timeout + _GRACE, chosen.retries)


class Asked(NamedTuple):
    """A request, as it travels to a replica."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    client: tuple[str, int] | None
    body: bytes


class Part(NamedTuple):
    """What a replica answers: all of it, or the beginning and then pieces of a stream."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    more: bool
    lost: int = 0  # replicas that were lost before


class WaitingTokens:
    """Ray Serve's policy: as many replicas as leave at most `target` waiting tokens to each, within its bounds."""

    def __init__(self, target: int) -> None:
        self.target = target

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        waiting = (context.aggregated_metrics or {}).get("waiting_tokens", {})
        if not waiting:  # no replica has said anything yet
            return context.target_num_replicas, {}
        return math.ceil(sum(waiting.values()) / self.target), {}


class Replica:
    """A server without a socket.

    Args:
        options: of `create_app`.
        keys: API keys, from the process that deployed it.
    """

    def __init__(self, options: dict[str, Any], keys: list[bytes]) -> None:
        from modernbert.serving.app import create_app

        self.app = create_app(**options)
        self.state = self.app.state.serving
        self.state.keys = keys

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the policy reads."""
        return {_METRIC: float(self.state.models.waiting)}

    async def answer(self, asked: Asked) -> AsyncIterator[Part]:
        """Answer a request; it is given up where nobody reads on."""
        path, query = asked.path, asked.query
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "scheme": "http",
            "method": asked.method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": query,
            "root_path": "",
            "headers": asked.headers,
            "client": asked.client,
            "server": None,
        }
        said: asyncio.Queue[Any] = asyncio.Queue()
        read = False

        async def receive() -> Any:
            nonlocal read
            if read:
                await asyncio.Event().wait()  # a client that leaves ends this task
            read = True
            return {"type": "http.request", "body": asked.body, "more_body": False}

        task = asyncio.create_task(self.app(scope, receive, said.put))
        task.add_done_callback(lambda _: said.put_nowait(None))
        try:
            begin = await said.get()
            if begin is None:
                raise RuntimeError("the app gave no answer")
            status, headers = begin["status"], [tuple(pair) for pair in begin["headers"]]
            streams = any(value.startswith(b"text/event-stream") for name, value in headers if name == b"content-type")
            body, more = b"", True
            while more:
                message = await said.get()
                if message is None:
                    raise RuntimeError("the app broke its answer off")
                more = message.get("more_body", False)
                body += message.get("body", b"")
                if streams or not more:
                    yield Part(status, headers, body, more)
                    body = b""
        finally:
            task.cancel()


class Front:
    """Holds a request until a replica has answered it.

    Args:
        replicas: Ray Serve's handle to them.
        seconds: that an answer may take, lost replicas included.
        retries: times that a request is asked again whose replica was lost.
    """

    def __init__(self, replicas: Any, seconds: float, retries: int) -> None:
        self.replicas, self.seconds, self.retries = replicas.options(stream=True), seconds, retries

    async def __call__(self, request: Request) -> Response:
        """Answer a request of a client."""
        path = request.url.path
        try:
            if path == "/metrics":
                raise NoMetricsError("each replica counts for itself; Ray has metrics of the cluster")
            client = (request.client.host, request.client.port) if request.client else None
            asked = Asked(
                request.method,
                path,
                request.url.query.encode(),
                list(request.headers.raw),
                client,
                await request.body(),
            )
            parts = self._parts(asked)
            try:
                async with asyncio.timeout(self.seconds):
                    first = await anext(parts)
            except TimeoutError:
                raise LateError(f"no replica answered within {self.seconds:g} seconds") from None
        except ServingError as error:
            return Json(body_of(path, error), error.status, error.headers)
        if first.more:
            made: Response = StreamingResponse(_stream(first, parts), first.status)
        else:
            await parts.aclose()
            made = Response(first.body, first.status)
        made.raw_headers = [pair for pair in first.headers if pair[0] != b"x-request-id"]  # Ray Serve adds it
        if first.lost:
            made.headers["x-replicas-lost"] = str(first.lost)
        return made

    async def _parts(self, asked: Asked) -> AsyncGenerator[Part, None]:
        """What a replica answers; of another one where it is lost before it said anything."""
        from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError

        for attempt in range(self.retries + 1):
            reply, is_whole, begun = self.replicas.answer.remote(asked), False, False
            try:
                async for part in reply:
                    is_whole, begun = not part.more, True
                    yield part._replace(lost=attempt)
                return
            except (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError):
                if is_whole:
                    return
                if begun:
                    raise LostError("the replica was lost before the end of its answer; ask again") from None
                await asyncio.sleep(_PAUSE * 2**attempt)
            finally:
                if not is_whole:
                    reply.cancel()
        raise LostError(f"{self.retries + 1} replicas were lost while they answered this request; it is given up")


async def _stream(first: Part, parts: AsyncGenerator[Part, None]) -> AsyncIterator[bytes]:
    """The bytes of a stream; where its replica is lost, an error is its last event."""
    yield first.body
    try:
        async for part in parts:
            yield part.body
    except LostError as error:
        yield b"data: " + orjson.dumps(body_of("/v1/completions", error)) + b"\n\n"
