"""Requests that ask too much, clients that are slow or lie, and what stands in the way of listening."""

import asyncio
import json
import os
import re
import socket
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
import uvicorn

from modernbert.errors import InputError
from modernbert.serving import create_app
from modernbert.serving.app import _PROBLEMS
from modernbert.serving.log import AccessLog
from modernbert.serving.metrics import Metrics
from modernbert.serving.options import ServeOptions
from modernbert.serving.problems import (
    DrainingError,
    EngineError,
    KeyRefusedError,
    LateError,
    OverloadedError,
    RequestError,
    SlowClientError,
    TooLargeError,
    UnknownModelError,
)
from modernbert.serving.replies import Json, _written, pieces
from modernbert.serving.routes import operations
from modernbert.serving.server import Protocol
from modernbert.serving.sockets import listening
from modernbert.serving.state import State, _count, check_options


def message_of(reply):
    return reply.json()["error"]["message"]


def call(app, path, headers=(), body=b"", send=None, receive=None):
    """One request by ASGI alone: the messages of its reply, what it took until now."""
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1",
        "method": "POST" if body else "GET", "scheme": "http", "path": path, "raw_path": path.encode(),
        "query_string": b"", "root_path": "",
        "headers": [(b"content-type", b"application/json"), *headers], "client": ("a", 1), "server": ("a", 80),
    }  # fmt: skip
    sent, given = [], False

    async def read():
        nonlocal given
        if given:
            await asyncio.sleep(30)
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def keep(message):
        sent.append(message)

    asyncio.run(asyncio.wait_for(app(scope, receive or read, send or keep), 10))
    return sent


@pytest.mark.parametrize(
    ("task", "options", "status", "said"),
    [
        ("text-generation", {"num_return_sequences": 10**6}, 413, "1000000 texts"),
        ("text-generation", {"num_beams": 10**6}, 413, "1000000 texts"),
        ("text-generation", {"num_beams": 2, "max_new_tokens": 10**6}, 422, "context"),
        ("text-generation", {"max_new_tokens": 10**6}, 422, "context"),
        ("text-generation", {"stop_strings": ["\ud800"]}, 422, "stop_strings"),
        ("text-generation", {"logits_processor": [1]}, 422, "logits_processor"),
        ("text-generation", {"generation_config": "/etc/passwd"}, 422, "generation_config"),
        ("text-generation", {"streamer": "x"}, 422, "streamer"),
        ("sentence-embedding", {"prompt": "a" * 2000}, 422, "prompt"),
        ("sentence-embedding", {"padding": "x"}, 422, "padding"),
        ("fill-mask", {"top_k": 10**7}, 413, "top_k"),
        ("token-classification", {"is_split_into_words": True, "delimiter": "a" * 2000}, 422, "delimiter"),
        ("token-classification", {"tokenizer_kwargs": {}}, 422, "tokenizer_kwargs"),
    ],
)
def test_options_that_ask_too_much_or_mean_something_in_python_alone(ask, task, options, status, said):
    body = json.dumps({"inputs": "Anna lives in [MASK].", "options": options}).encode()
    reply = ask(f"/v1/tasks/{task}", body, headers={"content-type": "application/json"})
    assert reply.status_code == status, reply.text
    assert said in message_of(reply)


@pytest.mark.parametrize("path", ["/embed_all", "/v1/tasks/feature-extraction"])
def test_vectors_of_every_token_are_given_for_so_many_tokens(ask, path):
    reply = ask(path, {"inputs": ["word " * 400] * 500})
    assert reply.status_code == 413
    assert "vectors of about" in reply.text


def test_surrogates_are_named(ask):
    reply = ask("/tokenize", b'{"inputs": "a\\ud800"}', headers={"content-type": "application/json"})
    assert (reply.status_code, reply.json()["error"]) == (
        422,
        "inputs holds a lone surrogate, which is no valid Unicode",
    )


def test_texts_are_counted_with_what_is_read_beside_them():
    assert _count(["a", "b"], {"candidate_labels": "x, y, z"}) == 6
    assert _count([{"query": "a", "documents": ["b"] * 5}], {}) == 5
    assert _count([{"prompt": "a", "choices": ["b", "c"]}, {"prompt": "a", "choices": ["b"] * 3}], {}) == 5
    assert _count([[1, 2, 3]], {"num_beams": 2}) == 2


@pytest.mark.parametrize("template", ["{.__class__}", "{:>999999999}", "{0}", "{} {}", "none"])
def test_templates_take_a_label_and_format_nothing(template):
    with pytest.raises(RequestError, match="hypothesis_template"):
        check_options({"hypothesis_template": template})


def test_long_texts_are_tagged_in_windows(ask, pipelines):
    text = "Anna lives in Paris. " * 1500  # far more characters than a context has tokens
    reply = ask("/v1/tasks/token-classification", {"inputs": text, "options": {"aggregation_strategy": "simple"}})
    assert reply.status_code == 200, reply.text
    wanted = pipelines["tag"](text, aggregation_strategy="simple")
    assert [one["start"] for one in reply.json()["answers"][0]] == [one["start"] for one in wanted]


@pytest.mark.parametrize(
    ("task", "inputs", "options"),
    [
        ("question-answering", {"question": "where " * 250, "context": "Paris " * 10_000}, {}),
        ("token-classification", "Paris " * 10_000, {"stride": 500}),
    ],
)
def test_windows_are_not_made_without_end(ask, task, inputs, options):
    reply = ask(f"/v1/tasks/{task}", {"inputs": inputs, "options": options})
    assert reply.status_code == 422
    assert "windows" in message_of(reply)


@pytest.mark.parametrize("task", ["fill-mask", "question-answering"])
def test_lists_in_lists_without_end(ask, task):
    for depth in (20, 900):
        body = b'{"inputs":' + b"[" * depth + b"]" * depth + b"}"
        assert ask(f"/v1/tasks/{task}", body).status_code == 422


def test_too_much_to_tokenize(pipelines):
    app = create_app({"fill": pipelines["fill"]}, access_log=False, most_waiting=10, most_texts=3)
    try:
        for text in ("a" * 1000, ["a"] * 4):
            (start, _) = call(app, "/tokenize", body=json.dumps({"inputs": text}).encode())
            assert start["status"] == 413
    finally:
        app.state.serving.models.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_for_the_log_ends_no_request(pipelines, capsys):
    app = create_app({"fill": pipelines["fill"]}, log_file="/dev/full")
    try:
        for _ in range(3):
            assert call(app, "/v1/models")[0]["status"] == 200
        app.state.serving.log.close()
        assert b"modernbert_lost_log_lines_total 3.0" in app.state.serving.metrics.text()
        assert capsys.readouterr().err.count("lines of the log are lost: No space left on device") == 1
    finally:
        app.state.serving.close()


def test_the_log_never_waits_and_its_lines_stay_whole(tmp_path, monkeypatch, capsys):
    metrics = Metrics()
    with pytest.raises(InputError, match="log_file"):
        AccessLog(str(tmp_path), metrics)
    held, write, log = threading.Event(), os.write, AccessLog(str(tmp_path / "log"), metrics)

    def slow(file, line):
        if file != log._file:
            return write(file, line)
        held.wait(5)
        if line.endswith(b'orn": 0}\n') and not line.startswith(b"{"):
            raise OSError(28, "No space left on device")
        return write(file, line[:3])  # as a nearly full disk takes it

    monkeypatch.setattr(os, "write", slow)
    log.put({"torn": 0})
    while log._lines.qsize():
        time.sleep(0.01)
    for number in range(10_003):
        log.put({"number": number})
    held.set()
    log._thread.join(0.1)
    while log._lines.qsize():
        time.sleep(0.01)
    log.close()
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[0] == '{"t'
    assert [json.loads(line)["number"] for line in lines[1:]] == list(range(10_000))
    assert "modernbert_lost_log_lines_total 4.0" in metrics.text().decode()
    assert "faster than" in capsys.readouterr().err


@pytest.mark.parametrize(
    "value",
    [
        {"answers": [np.arange(12, dtype=np.float32).reshape(3, 4)], "of": {"a": []}},
        [{"index": i, "data": torch.arange(6.0).reshape(2, 3)} for i in range(3)],
        np.random.default_rng(0).random((300, 768), np.float32),
        [{"number": i} for i in range(1000)],
        np.arange(24).reshape(4, 6).T,
        [[np.zeros(3)], []],
        {1: [float("nan")]},
        [],
        None,
    ],
)
def test_replies_written_in_pieces_are_those_written_at_once(value):
    whole = b"".join(pieces(value))
    assert whole == _written(value)


def test_a_large_reply_lets_others_have_their_turn():
    turns, sent = [], []

    async def others():
        while not sent:
            turns.append(1)
            await asyncio.sleep(0)

    async def keep(message):
        sent.append(message)

    async def run():
        rows = list(np.random.default_rng(0).random((64, 128, 768), np.float32))
        other = asyncio.create_task(others())
        await Json(rows)({"type": "http"}, None, keep)
        await other

    asyncio.run(run())
    assert len(turns) > 10
    assert int(dict(sent[0]["headers"])[b"content-length"]) == len(sent[1]["body"])


@pytest.fixture
def guarded(pipelines, tmp_path):
    (tmp_path / "keys").write_text("secret\n")
    options = {"api_key_file": str(tmp_path / "keys"), "timeout": 0.3, "access_log": False}
    app = create_app({"fill": pipelines["fill"]}, **options)
    yield app
    app.state.serving.models.close()


PROBLEMS = {
    401: KeyRefusedError("said"), 404: UnknownModelError("said"), 408: SlowClientError("said"),
    413: TooLargeError("said"), 422: RequestError("said"), 429: OverloadedError("said", 7), 500: EngineError("said"),
    503: DrainingError("said"), 504: LateError("said"),
}  # fmt: skip
BODIES = {
    "/v1/embeddings": {"input": "a"}, "/v1/completions": {"prompt": "a"}, "/classify": {"input": "a"},
    "/v1/tasks/fill-mask": {"inputs": "[MASK]"}, "/v2/rerank": {"query": "a", "documents": ["b"]},
    "/embed": {"inputs": "a"}, "/predict": {"inputs": "a"},
}  # fmt: skip


@pytest.mark.parametrize("status", PROBLEMS)
@pytest.mark.parametrize("path", BODIES)
def test_every_problem_has_the_shape_of_the_api_that_was_called(ask, monkeypatch, path, status):
    async def wrong(*args, **options):
        raise PROBLEMS[status]

    for name in ("answer", "generate"):
        monkeypatch.setattr(State, name, wrong)
    reply = ask(path, BODIES[path])
    assert reply.status_code == status
    found = reply.json()
    if path in ("/embed", "/predict"):
        assert set(found) == {"error", "error_type"}
        assert found["error"] == "said"
    elif path == "/v2/rerank":
        assert found["message"] == "said"
    else:
        assert set(found["error"]) == {"message", "type", "param", "code"}
        assert found["error"]["message"] == "said"
    assert reply.headers.get("retry-after") == {429: "7", 503: "5"}.get(status)
    assert ("www-authenticate" in reply.headers) == (status == 401)
    assert status in _PROBLEMS


def test_every_problem_is_promised_by_the_schema(ask):
    assert set(PROBLEMS) == set(_PROBLEMS)
    for path, methods in ask("/openapi.json").json()["paths"].items():
        for method, told in methods.items():
            assert {str(status) for status in _PROBLEMS} <= set(told["responses"]), path
            if method == "post":
                body = told["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
                assert ask("/openapi.json").json()["components"]["schemas"][body]["examples"], path


def test_methods_that_a_path_has_not(ask):
    for path, allowed in (("/embed", "POST"), ("/", "GET, POST"), ("/metrics", "GET")):
        reply = ask(path, method="PUT")
        assert (reply.status_code, reply.headers["allow"]) == (405, allowed)
        assert f"PUT {path}" in reply.text


def test_an_error_of_the_server_itself_tells_nothing(ask, monkeypatch, caplog):
    async def wrong(*args, **options):
        raise KeyError("insides")

    monkeypatch.setattr(State, "answer", wrong)
    reply = ask("/embed", {"inputs": "a"})
    assert reply.status_code == 500
    assert reply.json()["error"] == "the server failed; its log says how"
    assert "insides" in caplog.text


def test_too_much_that_waits_is_429_over_http(pipelines):
    app = create_app({"embed": pipelines["embed"]}, access_log=False, most_waiting=100)
    engine = app.state.serving.models.engine(pipelines["embed"])
    engine._waiting = 101
    try:
        sent = call(app, "/embed", body=b'{"inputs": "a"}')
        assert sent[0]["status"] == 429
        assert int(dict(sent[0]["headers"])[b"retry-after"]) >= 1
        assert b"modernbert_refused_requests_total 1.0" in app.state.serving.metrics.text()
        engine._waiting = 0
        assert call(app, "/embed", body=b'{"inputs": "a"}')[0]["status"] == 200
    finally:
        app.state.serving.close()


@pytest.mark.parametrize("path", ["/v1/models", "//v1/models", "/health/../v1/models", "/docs", "/openapi.json", "/"])
@pytest.mark.parametrize("host", [b"a", b"a/health?", b"a/health#", b"a@b/health/live?"])
def test_the_key_does_not_depend_on_what_the_host_is_called(guarded, path, host):
    start = call(guarded, path, headers=[(b"host", host)])[0]
    assert start["status"] == (200 if path == "/" else 401)
    assert call(guarded, path, headers=[(b"host", host)], body=b'{"inputs": "a"}')[0]["status"] == 401


def test_a_body_that_never_ends_is_given_up(guarded):
    async def drip():
        await asyncio.sleep(0.05)
        return {"type": "http.request", "body": b"[", "more_body": True}

    start = call(guarded, "/embed", headers=[(b"x-api-key", b"secret")], receive=drip)[0]
    assert start["status"] == 408
    assert guarded.state.serving.running == 0


def test_a_client_that_does_not_read_is_given_up(guarded):
    async def never(message):
        await asyncio.sleep(30)

    call(guarded, "/v1/models", headers=[(b"x-api-key", b"secret")], send=never)
    assert guarded.state.serving.running == 0


def test_a_host_that_ends_a_request_ends_its_work(app):
    async def run():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            body = {"input": ["a cat sat on the mat " * 20] * 500}
            asked = asyncio.create_task(client.post("/v1/embeddings", json=body))
            await asyncio.sleep(0.2)
            asked.cancel()
            await asyncio.wait({asked})
            await asyncio.sleep(0.1)
            others = asyncio.all_tasks() - {asyncio.current_task()}
            return len(others), app.state.serving.models.waiting, app.state.serving.running

    assert asyncio.run(run()) == (0, 0, 0)


def test_a_connection_without_a_whole_request_is_closed(app, monkeypatch):
    monkeypatch.setattr(Protocol, "patience", 0.1)
    config = uvicorn.Config(app, port=0, log_level="warning", http=Protocol, lifespan="off")
    server = uvicorn.Server(config)

    async def run():
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        for begun in (b"", b"GET /health HTTP/1.1\r\nHost: a\r\n", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET /"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(begun)
            reply = await asyncio.wait_for(reader.read(), 5)
            assert (b'{"status":"live"}' in reply) == begun.endswith(b"GET /")
            writer.close()
        server.should_exit = True
        await serving

    asyncio.run(run())


def test_ids_of_requests_are_written_back_only_if_they_are_plain(ask):
    assert ask("/health", headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"
    for number in (b"a\x01b", b"a\x7f", b"a\tb"):
        assert re.fullmatch("[0-9a-f]{32}", ask("/health", headers={"x-request-id": number}).headers["x-request-id"])


def test_names_that_nobody_has_make_no_new_counters(ask):
    def counters():
        return {line.split("}")[0] for line in ask("/metrics").text.splitlines() if "{" in line}

    found = []
    for turn in range(3):
        for path in (f"/nothing/{turn}", f"/v1/models/none-{turn}", "/metrics"):
            ask(path)
        ask("/v1/embeddings", {"input": "a", "model": f"none-{turn}"})
        found.append(counters())
    assert found[0] == found[1] == found[2]


def test_readiness_shares_one_text_and_is_red_where_none_is_computed(pipelines, monkeypatch):
    app = create_app({"decode": pipelines["decode"]}, access_log=False, most_waiting=1)
    monkeypatch.setattr(operations, "_LIMIT", 0.3)
    state = app.state.serving
    engine = state.models.engine(pipelines["decode"])
    asked, run = [], engine.run

    def counted(*args, **options):
        asked.append(1)
        return run(*args, **options)

    engine.run = counted

    async def ready(times):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return [r.status_code for r in await asyncio.gather(*(client.get("/health/ready") for _ in range(times)))]

    try:
        assert asyncio.run(ready(5)) == [200] * 5
        assert len(asked) == 1
        monkeypatch.setattr(engine, "go_on", lambda *args, **options: asyncio.Event().wait())
        with monkeypatch.context() as patched:
            patched.setattr("modernbert.serving.engine.Engine._generated", lambda self, work: asyncio.sleep(5))
            assert asyncio.run(ready(1)) == [503]
    finally:
        state.models.close()


def test_where_it_listens(tmp_path):
    path = tmp_path / "socket"
    options = ServeOptions(unix_socket=str(path))
    with listening(options) as (one,):
        one.listen()
        with pytest.raises(InputError, match="in use"), listening(options):
            pass
        assert path.is_socket()
    assert not path.exists()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with listening(options):  # nobody listens there any more
        pass
    path.write_text("mine")
    with pytest.raises(InputError, match="cannot listen"), listening(options):
        pass
    assert path.read_text() == "mine"
    with listening(ServeOptions(port=0)) as (one,):
        one.listen()
        with pytest.raises(InputError, match="in use"), listening(ServeOptions(port=one.getsockname()[1])):
            pass
