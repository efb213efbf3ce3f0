"""The app on a Ray cluster: options, the policy, and replicas on this machine of which one is killed."""

import asyncio
import base64
import contextlib
import os
import random
import signal
import socket
import time
import types

import httpx
import numpy as np
import pytest

pytest.importorskip("fastapi")

from starlette.requests import Request

from modernbert.errors import InputError
from modernbert.pipelines import pipeline
from modernbert.serving import ray_app
from modernbert.serving.replicas import Front, Part, WaitingTokens
from tests.clusters import children, ray_here

pytestmark = [pytest.mark.network, pytest.mark.filterwarnings("ignore")]  # Ray's, which are not ours to mend
WORDS = ["the", "cat", "sat", "on", "green", "hills", "while", "rain", "falls", "near", "water"]
REPLICA = "ServeReplica:default:replica"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"port": 80}, "port is 80; on a cluster it is the proxy's of Ray Serve"),
        ({"workers": 2}, "give min_replicas and max_replicas"),
        ({"min_replicas": 5}, "max_replicas is 4; it must be at least min_replicas, 5"),
        ({"target_waiting": 0}, "target_waiting is 0; it must be a whole number of at least 1"),
        ({"cpus": 0}, "cpus is 0; it must be a number above 0"),
        ({"most_text": 3}, "ray_app has no option most_text"),
    ],
)
def test_options_that_mean_nothing_on_a_cluster_are_refused(options, said):
    with pytest.raises(InputError) as error:
        ray_app(**options)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("waiting", "wanted"),
    [({}, 3), ({"waiting_tokens": {}}, 3), ({"waiting_tokens": {"a": 0.0, "b": 0.0}}, 0),
     ({"waiting_tokens": {"a": 900.0, "b": 100.0}}, 1), ({"waiting_tokens": {"a": 2500.0, "b": 1.0}}, 3)],
)  # fmt: skip
def test_there_are_as_many_replicas_as_leave_each_so_many_waiting_tokens(waiting, wanted):
    context = types.SimpleNamespace(aggregated_metrics=waiting, target_num_replicas=3)
    assert WaitingTokens(1000)(context)[0] == wanted


@contextlib.contextmanager
def served(**options):
    """The address of an app on a Ray instance of this machine."""
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ray_here():
        try:
            serve.start(http_options={"port": port}, logging_config={"log_level": "ERROR"})
            serve.run(ray_app(cpus=0.5, access_log=False, dtype="float32", **options), route_prefix="/")
            yield f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()


@pytest.fixture(scope="module")
def url():
    pytest.importorskip("ray.serve", reason="needs ray: pip install 'ray[serve]'")
    with served(min_replicas=2, max_replicas=2) as found:
        yield found


@pytest.fixture(scope="module")
def requests():
    chosen = random.Random(3)
    return [[" ".join(chosen.choices(WORDS, k=chosen.randint(3, 60))) for _ in range(4)] for _ in range(24)]


@pytest.fixture(scope="module")
def offline(requests):
    embed = pipeline("sentence-embedding", dtype="float32")
    return [embed(texts) for texts in requests]


def vectors(reply):
    return np.stack([np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in reply.json()["data"]])


def test_a_replica_killed_under_load_takes_no_request_with_it_and_changes_no_bit(url, requests, offline):
    victims = children(title=REPLICA)
    assert len(victims) == 2
    replies, killed = {}, []

    async def client(http, numbers):
        for number in numbers:
            replies[number] = await http.post("/v1/embeddings", json=asked(number % len(requests)))
            if len(replies) == 30:
                os.kill(victims[0], signal.SIGKILL)
                killed.append(number)

    def asked(number):
        return {"input": requests[number], "encoding_format": "base64"}

    async def load():
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:
            numbers = iter(range(96))  # shared by all clients
            await asyncio.gather(*(client(http, numbers) for _ in range(12)))

    asyncio.run(load())
    assert killed
    assert len(replies) == 96
    assert [reply.status_code for reply in replies.values()] == [200] * 96
    assert all(np.array_equal(vectors(reply), offline[i % len(requests)]) for i, reply in replies.items())
    assert sum("x-replicas-lost" in reply.headers for reply in replies.values()) > 0
    until = time.monotonic() + 60
    while len(now := children(title=REPLICA)) < 2 or victims[0] in now:  # another one has started
        assert time.monotonic() < until
        time.sleep(0.1)


class Handle:
    """Ray Serve's, to replicas of which each gives these parts of an answer, and is lost unless they are all."""

    def __init__(self, *replicas):
        self.left, self.answer, self.cancelled = list(replicas), self, 0

    def options(self, stream):
        return self

    def remote(self, asked):
        handle, parts = self, self.left.pop(0)

        class Reply:
            async def __aiter__(self):
                from ray.exceptions import ActorDiedError

                for part in parts:
                    yield part
                if not parts or parts[-1].more:
                    raise ActorDiedError

            def cancel(self):
                handle.cancelled += 1

        return Reply()


def asked_front(handle, retries=2):
    """Status, headers and bytes that a front of these replicas answers."""
    pytest.importorskip("ray.exceptions", reason="needs ray: pip install 'ray[serve]'")
    scope = {"type": "http", "method": "GET", "path": "/v1/models", "query_string": b"", "headers": [], "server": None}

    async def run():
        sent, read = [], []

        async def receive():
            if read:
                await asyncio.Event().wait()  # the client stays
            read.append(True)
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message):
            sent.append(message)

        reply = await Front(handle, 5.0, retries)(Request(scope, receive))
        await reply(scope, receive, send)
        return sent[0]["status"], dict(sent[0]["headers"]), b"".join(part.get("body", b"") for part in sent)

    return asyncio.run(run())


WHOLE = Part(200, [(b"a", b"b")], b"whole", more=False)
BEGUN = Part(200, [(b"content-type", b"text/event-stream")], b"data: 1\n\n", more=True)


def test_the_front_asks_again_until_a_replica_answers():
    assert asked_front(Handle([WHOLE])) == (200, {b"a": b"b"}, b"whole")
    handle = Handle([], [], [WHOLE])
    assert asked_front(handle) == (200, {b"a": b"b", b"x-replicas-lost": b"2"}, b"whole")
    assert handle.cancelled == 2


def test_a_request_that_takes_every_replica_with_it_is_given_up():
    status, headers, body = asked_front(Handle([], [], [], [WHOLE]))
    assert (status, headers[b"retry-after"]) == (503, b"5")
    assert b"3 replicas were lost while they answered this request" in body


def test_a_stream_that_had_begun_ends_with_an_error():
    status, _, body = asked_front(Handle([BEGUN, BEGUN], [WHOLE]))
    first, second, error = body.split(b"\n\n")[:-1]
    assert (status, first, second) == (200, b"data: 1", b"data: 1")
    assert b"lost before the end of its answer" in error


def test_streams_pages_and_errors_are_those_of_one_server(url):
    asked = {"prompt": "Once upon a time", "max_tokens": 12, "seed": 5}
    whole = httpx.post(f"{url}/v1/completions", json=asked, timeout=60).json()["choices"][0]["text"]
    with httpx.stream("POST", f"{url}/v1/completions", json=asked | {"stream": True}, timeout=60) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    pieces = [httpx.Response(200, text=line).json()["choices"][0]["text"] for line in lines[:-1]]
    assert len(pieces) > 3
    assert "".join(pieces) == whole
    assert httpx.get(f"{url}/health/ready").json()["status"] == "ready"
    refused = httpx.post(f"{url}/v1/embeddings", json={"input": ""})
    assert refused.status_code == 422
    assert "empty" in refused.json()["error"]["message"]
    assert httpx.get(f"{url}/metrics").status_code == 404
    ids = httpx.get(f"{url}/health", headers={"x-request-id": "mine"}).headers.get_list("x-request-id")
    assert ids == ["mine"]
