"""How much of the offline pipeline's speed a server keeps, how long single requests take under load, and whether every
reply has the offline bits. Needs a quiet machine; clients run on the same cores.

    python benchmarks/serving.py                 # a base-size encoder with random weights, minutes
    python benchmarks/serving.py --smoke         # the package's small encoder, seconds
    python benchmarks/serving.py --start 5       # seconds to the first answer of the small models, five times
    python benchmarks/serving.py --peer          # beside sentence-transformers behind the plainest FastAPI route
    python benchmarks/serving.py --peer --infinity FOLDER/bin/python     # and beside infinity

Three loads, of texts of 8 to 512 tokens: offline, all texts in one call; saturated, 64 clients that each ask for their
next text when they have the last; and arrivals at random times at 70 % of the saturated rate, of `--arrivals` texts,
because a 99th percentile needs many. The least of two rounds counts for times, the most for speeds.

infinity needs an environment of its own, with old versions: `python -m venv FOLDER`, then
`FOLDER/bin/pip install torch==2.13.0`, then
`FOLDER/bin/pip install 'infinity-emb[server,torch]==0.0.78' 'transformers==4.48.3' 'optimum<2'`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np

import modernbert
from modernbert.pipelines import pipeline, small_model
from modernbert.serving.vectors import base64_reply
from modernbert.text.tokenizer import Tokenizer
from modernbert.tools.bench import lengths_of

BASE = {"hidden_size": 768, "intermediate_size": 1152, "num_hidden_layers": 22, "num_attention_heads": 12}
CLIENTS, _PORT = 64, "8765"
_PEER = """
import sys, uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer
model, app = SentenceTransformer(sys.argv[1], model_kwargs={"dtype": sys.argv[3]}), FastAPI()
class Body(BaseModel):
    inputs: list[str]
@app.post("/embed")
def embed(body: Body):
    return model.encode(body.inputs).tolist()
uvicorn.run(app, port=int(sys.argv[2]), log_level="warning")
"""


def checkpoint(folder: Path, smoke: bool, dtype: str) -> Path:
    """The folder of the model that is served."""
    if smoke:
        return small_model()
    tokenizer = Tokenizer.from_pretrained(small_model())
    small = modernbert.AutoConfig.from_pretrained(small_model())
    config = small.replace(**BASE, max_position_embeddings=8192)
    modernbert.ModernBertModel(config).to(getattr(__import__("torch"), dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def texts_of(count: int, seed: int) -> list[str]:
    """Texts of the lengths of `varN`, of common words, about a token each."""
    words = ["the", "of", "and", "to", "in", "is", "for", "on", "as", "with", "by", "at", "from", "that", "it", "he"]
    chosen = random.Random(seed)
    return [" ".join(chosen.choices(words, k=max(1, n - 3))) for n in lengths_of(f"var{count}:{seed}")]


async def ask(client: httpx.AsyncClient, text: str) -> tuple[float, np.ndarray[Any, Any]]:
    """Seconds that a text took, and its vector."""
    begun = time.perf_counter()
    reply = await client.post("/v1/embeddings", json={"input": text, "encoding_format": "base64"})
    reply.raise_for_status()
    took = time.perf_counter() - begun
    return took, np.frombuffer(base64.b64decode(reply.json()["data"][0]["embedding"]), "<f4")


async def ask_peer(client: httpx.AsyncClient, text: str) -> tuple[float, np.ndarray[Any, Any]]:
    begun = time.perf_counter()
    reply = await client.post("/embed", json={"inputs": [text]})
    reply.raise_for_status()
    return time.perf_counter() - begun, np.array(reply.json()[0], np.float32)


async def ask_infinity(client: httpx.AsyncClient, text: str) -> tuple[float, np.ndarray[Any, Any]]:
    begun = time.perf_counter()
    reply = await client.post("/embeddings", json={"model": "peer", "input": [text], "encoding_format": "base64"})
    reply.raise_for_status()
    took = time.perf_counter() - begun
    return took, np.frombuffer(base64.b64decode(reply.json()["data"][0]["embedding"]), "<f4")


async def saturate(url: str, texts: list[str], one: Any) -> tuple[float, list[np.ndarray[Any, Any]]]:
    """Seconds that all texts take, with 64 clients, and their vectors."""
    limits = httpx.Limits(max_connections=CLIENTS)
    found: list[Any] = [None] * len(texts)
    numbers = iter(range(len(texts)))
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def work() -> None:
            for i in numbers:
                found[i] = (await one(client, texts[i]))[1]

        begun = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(CLIENTS)))
        return time.perf_counter() - begun, found


async def arrive(url: str, texts: list[str], rate: float, one: Any) -> list[float]:
    """Seconds that texts take which come at random times, so many a second."""
    chosen = random.Random(0)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=512)) as client:

        async def later(text: str, at: float) -> float:
            await asyncio.sleep(at)
            return (await one(client, text))[0]

        at, tasks = 0.0, []
        for text in texts:
            at += chosen.expovariate(rate)
            tasks.append(asyncio.create_task(later(text, at)))
        return list(await asyncio.gather(*tasks))


class Process:
    """A server in a process of its own."""

    def __init__(self, command: list[str], url: str | None) -> None:
        self.begun = time.perf_counter()
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
        if url is not None:  # a peer has libraries of its own
            environment.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        assert self.process.stderr is not None
        while url is None:
            line = self.process.stderr.readline()
            url = line.split()[-1] if " at http" in line else None
        self.url = url
        threading.Thread(target=self.process.stderr.read, daemon=True).start()
        while True:
            try:
                httpx.get(f"{url}/openapi.json", timeout=5)
                break
            except httpx.TransportError:
                time.sleep(0.05)
        self.started = time.perf_counter() - self.begun

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait(60)


def encoding() -> float:
    """Seconds that the base64 of 1,000 vectors takes in a reply of OpenAI's shape, the least of ten times."""
    vectors, took = np.random.default_rng(0).random((1000, 768), np.float32), []
    for _ in range(10):
        begun = time.perf_counter()
        base64_reply(vectors, b'"model":"embed"}')
        took.append(time.perf_counter() - begun)
    return min(took)


def first_answers(times: int) -> list[float]:
    """Seconds from a process's start to its first vector."""
    took = []
    for _ in range(times):
        begun = time.perf_counter()
        command = [sys.executable, "-m", "modernbert", "serve", "--port", "0", "--no-access-log"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
            assert server.stderr is not None
            url = server.stderr.readline().split()[-1]
            httpx.post(f"{url}/v1/embeddings", json={"input": "A cat sat."}).raise_for_status()
            took.append(time.perf_counter() - begun)
            server.terminate()
    return took


def measured(url: str, texts: list[str], tokens: int, one: Any, given: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of a saturated server, and times of single texts at 70 % of that."""
    rounds, many = given.rounds, texts_of(given.arrivals, 1)
    asyncio.run(saturate(url, texts[:CLIENTS], one))
    seconds, vectors = min((asyncio.run(saturate(url, texts, one)) for _ in range(rounds)), key=lambda pair: pair[0])
    rate = 0.7 * len(texts) / seconds
    times = min((sorted(asyncio.run(arrive(url, many, rate, one))) for _ in range(rounds)), key=sum)
    return {
        "tokens a second": tokens / seconds,
        "texts a second": len(texts) / seconds,
        "p50, ms": 1e3 * times[len(times) // 2],
        "p99, ms": 1e3 * times[int(len(times) * 0.99)],
        "p99 / p50": times[int(len(times) * 0.99)] / times[len(times) // 2],
        "vectors": vectors,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="the small encoder, fewer texts")
    parser.add_argument("--peer", action="store_true", help="measure sentence-transformers behind FastAPI as well")
    parser.add_argument("--start", type=int, metavar="TIMES", help="measure the first answer alone, so many times")
    parser.add_argument("--infinity", metavar="PYTHON", help="measure infinity as well, with this environment's Python")
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--arrivals", type=int, default=1024)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-tokens", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    if given.start:
        print(
            json.dumps({"seconds to the first answer": [round(seconds, 2) for seconds in first_answers(given.start)]})
        )
        return
    if given.smoke:
        given.texts, given.arrivals = 64, 128
    texts = texts_of(given.texts, 0)
    with tempfile.TemporaryDirectory() as name:
        folder = checkpoint(Path(name), given.smoke, given.dtype)
        offline = pipeline("sentence-embedding", folder, dtype=given.dtype)
        tokens = sum(len(ids) for ids in offline.tokenizer(texts, truncation=False).input_ids)
        offline(texts[:32])
        took = []
        for _ in range(given.rounds):
            begun = time.perf_counter()
            wanted = offline(texts)
            took.append(time.perf_counter() - begun)
        found: dict[str, Any] = {
            "texts": len(texts),
            "tokens": tokens,
            "offline": {"tokens a second": tokens / min(took)},
        }
        command = [sys.executable, "-m", "modernbert", "serve", "--port", "0", "--no-access-log"]
        command += ["--model", f"embed={folder}:sentence-embedding", "--dtype", given.dtype]
        command += [] if given.batch_tokens is None else ["--batch-tokens", str(given.batch_tokens)]
        with Process(command, None) as server:
            ours = measured(server.url, texts, tokens, ask, given)
            ours["seconds to start"] = server.started
            vectors = np.stack(ours.pop("vectors"))
            ours["share of offline"] = ours["tokens a second"] * min(took) / tokens
            ours["same bits as offline"] = bool(np.array_equal(vectors, wanted))
            found["served"] = ours
        peers: list[tuple[str, list[str], Any]] = []
        if given.peer:
            command = [sys.executable, "-c", _PEER, str(folder), _PORT, given.dtype]
            peers.append(("sentence-transformers behind FastAPI", command, ask_peer))
        if given.infinity:
            command = [str(Path(given.infinity).absolute().with_name("infinity_emb")), "v2", "--model-id", str(folder)]
            command += ["--served-model-name", "peer", "--engine", "torch", "--device", "cpu", "--port", _PORT]
            command += ["--no-bettertransformer", "--dtype", given.dtype, "--log-level", "error"]
            peers.append(("infinity", command, ask_infinity))
        for title, command, one in peers:
            with Process(command, f"http://127.0.0.1:{_PORT}") as peer:
                theirs = measured(peer.url, texts, tokens, one, given)
            closest = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(
                theirs.pop("vectors"), wanted, strict=True)]  # fmt: skip
            found[title] = {**theirs, "least cosine with ours": min(closest)}
    found["ms to encode 1,000 vectors of 768 floats in base64"] = 1e3 * encoding()
    found["cores"] = os.cpu_count()
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
