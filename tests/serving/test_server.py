"""A server in a process of its own: its start, its key, its end, and the clients that people use."""

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import pytest

from modernbert.cli import main
from modernbert.pipelines import TASKS, pipeline

pytestmark = pytest.mark.network


class Running:
    """`modernbert serve` with these flags, until the end of the block."""

    def __init__(self, *flags, says=" at http", **environment):
        self.says = says
        command = [sys.executable, "-m", "modernbert", "serve", "--port", "0", *map(str, flags)]
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
        )
        self.lines, self.listening = [], threading.Event()
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()
        assert self.listening.wait(60), self.lines
        self.url = self.lines[-1].split()[-1]

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line.strip())
            if self.says in line:
                self.listening.set()
        self.listening.set()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        self.thread.join()
        self.process.stderr.close()


@pytest.fixture(scope="module")
def server():
    with Running("--timeout", "30") as running:
        yield running


def test_it_serves_the_small_models_and_says_where(server):
    assert "small-encoder (fill-mask" in server.lines[0]
    reply = httpx.post(f"{server.url}/v1/embeddings", json={"input": "A cat sat."})
    wanted = pipeline("sentence-embedding", dtype="float32")("A cat sat.")
    got = np.array(reply.json()["data"][0]["embedding"], np.float32)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)  # this process may use other kernels or threads
    assert httpx.get(f"{server.url}/health/ready").json()["status"] == "ready"
    assert "paths" in httpx.get(f"{server.url}/openapi.json").json()


def test_a_request_is_a_line_of_json_in_the_log(server):
    httpx.post(f"{server.url}/embed", json={"inputs": "A cat sat."}, headers={"x-request-id": "mine"})
    time.sleep(0.2)
    line = next(json.loads(line) for line in server.lines if '"mine"' in line)
    assert (line["path"], line["status"], line["model"]) == ("/embed", 200, "small-sentence-encoder")
    assert line["tokens"] == 7


def test_a_client_that_leaves_is_noticed(server):
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/embed", json={"inputs": ["a cat sat on the mat and slept " * 20] * 2000}, timeout=0.5)
    time.sleep(0.5)
    assert httpx.get(f"{server.url}/health/ready").json()["waiting_tokens"] == 0
    assert any('"status": 499' in line for line in server.lines)


def test_the_openai_client(server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    found = client.embeddings.create(model="small-sentence-encoder", input=["A cat sat.", "Rain fell."])
    assert len(found.data[1].embedding) == len(found.data[0].embedding) > 8
    names = {f"small-{name}" for _, name in TASKS.values() if name is not None}
    assert {model.id for model in client.models.list()} == names
    with pytest.raises(openai.NotFoundError, match="small-encoder"):
        client.embeddings.create(model="none", input="a")


def test_the_cohere_client(server):
    cohere = pytest.importorskip("cohere")
    client = cohere.ClientV2(api_key="none", base_url=server.url)
    found = client.rerank(
        model="small-sentence-encoder", query="What sat?", documents=["A cat sat.", "Rain fell."], top_n=1
    )
    assert len(found.results) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves its socket open
def test_the_client_of_huggingface(server):
    from huggingface_hub import InferenceClient

    for url in (server.url, f"{server.url}/embed"):
        assert InferenceClient(url).feature_extraction(["A cat sat.", "Rain fell."]).shape[0] == 2


def test_no_path_without_the_key(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("first\nsecond\n")
    with Running("--api-key-file", keys) as server:
        paths = httpx.get(f"{server.url}/openapi.json", headers={"authorization": "Bearer second"}).json()["paths"]
        assert len(paths) > 20
        paths |= {path: ["get"] for path in ("/docs", "/redoc", "/nothing")}
        paths |= {path: ["post"] for path in ("/embeddings", "/v1/classify", "/v1/score")}
        with httpx.Client(base_url=server.url) as client:
            for path, methods in paths.items():
                for method in methods:
                    for headers in ({}, {"authorization": "Bearer third"}, {"x-api-key": ""}):
                        reply = client.request(method, path.replace("{name}", "small-encoder"), headers=headers)
                        is_open = path.startswith("/health") or (path, method) == ("/", "get")
                        assert reply.status_code == (200 if is_open else 401), path
            assert client.get("/v1/models", headers={"x-api-key": "first"}).status_code == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_it_when_accepted_work_is_done(number):
    with Running() as server:

        async def ask():
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                long = asyncio.create_task(client.post("/embed", json={"inputs": ["a cat sat on the mat " * 5] * 300}))
                await asyncio.sleep(0.1)
                server.process.send_signal(number)
                await asyncio.sleep(0.1)
                ready = await client.get("/health/ready")
                new = await client.post("/embed", json={"inputs": "a"})
                return (await long).status_code, ready.status_code, new.status_code

        assert asyncio.run(ask()) == (200, 503, 503)
        assert server.process.wait(10) == 0


def test_a_second_signal_ends_it_at_once():
    with Running() as server:

        async def ask():
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                long = asyncio.create_task(
                    client.post("/embed", json={"inputs": ["a cat sat on the mat " * 50] * 2000})
                )
                await asyncio.sleep(1)
                server.process.send_signal(signal.SIGTERM)
                await asyncio.sleep(0.3)
                assert server.process.poll() is None
                server.process.send_signal(signal.SIGTERM)
                with pytest.raises(httpx.HTTPError):
                    (await long).raise_for_status()

        asyncio.run(ask())
        server.process.wait(10)


def test_flags_and_the_file_say_the_same(tmp_path, heads):
    (tmp_path / "serve.yaml").write_text(f"models: [tagger={heads / 'TokenClassification'}]\nmost-texts: 2\n")
    with Running("--config", tmp_path / "serve.yaml", "--model", f"b={heads / 'MaskedLM'}:fill-mask") as server:
        assert {m["id"] for m in httpx.get(f"{server.url}/v1/models").json()["data"]} == {"b"}
        assert httpx.post(f"{server.url}/v1/tasks/fill-mask", json={"inputs": ["[MASK]"] * 3}).status_code == 413


def test_it_listens_on_a_unix_socket(tmp_path):
    path = tmp_path / "socket"
    with Running("--unix-socket", path, says=f"at {path}") as server:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://server") as client:
            assert client.post("/embed", json={"inputs": "A cat sat."}).status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 0
    assert not path.exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "x:unknown-task"], "unknown-task"),
        (["--model", "nowhere"], "nowhere"),
        (["--api-key-file", "/nowhere"], "cannot be read"),
        (["--most-texts", "0"], "at least 1"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(flags, said, capfd):
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--port", "0", *flags])
    assert ended.value.code == 2
    told = capfd.readouterr().err
    assert said in told
    assert len(told.strip().splitlines()) == 1
    assert gc.isenabled()


def test_two_workers_serve_at_one_address_and_a_lost_one_is_replaced():
    with Running("--workers", "2", "--no-access-log") as server:

        def ask():
            return httpx.post(f"{server.url}/embed", json={"inputs": "A cat sat."}).status_code

        assert [ask() for _ in range(6)] == [200] * 6
        found = subprocess.run(
            ["pgrep", "-P", str(server.process.pid), "-f", "spawn_main"], capture_output=True, text=True, check=True
        )
        workers = [int(number) for number in found.stdout.split()]
        assert len(workers) == 2
        assert "/embed" in httpx.get(f"{server.url}/metrics").text
        os.kill(workers[0], signal.SIGKILL)
        assert [ask() for _ in range(3)] == [200] * 3  # the other one serves
        while not any("another one starts" in line for line in server.lines):
            time.sleep(0.05)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
