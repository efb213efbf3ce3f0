"""Ten times more requests than a server can compute, for a minute, and what becomes of them. Clients are killed in
mid-flight or read slowly, a model fails at some texts, the disk for the log is full, and SIGTERM comes under load.

    python benchmarks/overload.py                  # a minute, with the package's small models
    python benchmarks/overload.py --seconds 5

It prints how many requests were answered, once each, how many were refused and why, how many accepted ones were lost
or answered twice (none may be), the resident memory, and whether the server answered afterwards. It ends with 1 if
anything is not as it must be.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from modernbert.pipelines import pipeline

TEXTS, SENT_FIRST = 8, 2.0  # of a request; seconds in which the server's speed is found
MARK = "zebra zebra zebra"  # at which the model fails
# The server, whose encoder fails where a row holds the mark's tokens.
SERVER = f"""
import sys
from modernbert.pipelines import pipeline
from modernbert.pipelines.sentence_embedding import SentenceEmbeddingPipeline as P
mark = pipeline("sentence-embedding", dtype="float32").tokenizer({MARK!r}).input_ids[1:-1]
run = P.run
def fragile(self, rows, options):
    for row in rows:
        if list(row.ids[1 : 1 + len(mark)]) == mark:
            raise RuntimeError("the model cannot read this")
    return run(self, rows, options)
P.run = fragile
from modernbert.serving.workers import run as serve
sys.exit(serve({{"port": 0, "log_file": sys.argv[1], "drain": 60.0, "timeout": 60.0}}))
"""


class Client:
    """Requests, each over a connection of its own, and what became of them."""

    def __init__(self, port: int) -> None:
        self.port, self.chosen = port, random.Random(0)
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.seconds: list[float] = []
        self.wrong: list[str] = []

    async def ask(
        self, path: str, body: dict[str, Any], number: str = "", leaves: float | None = None, pause: float = 0.0
    ) -> tuple[int, bytes]:
        """Status and body of a reply; status 0 where none came whole, -1 where the server took no connection.

        Args:
            path, body: of the request.
            number: its id.
            leaves: seconds after which the client is killed.
            pause: seconds between two small readings.
        """
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**16)
        except OSError:
            return -1, b""
        sent = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX-Request-Id: {number}\r\n"
        try:
            writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(sent)}\r\n\r\n".encode() + sent)
            if leaves is not None:
                await asyncio.sleep(leaves)
                writer.transport.abort()
                return 0, b""
            found = bytearray()
            while part := await reader.read(2**14 if pause else 2**20):
                found += part
                if pause:
                    await asyncio.sleep(pause)
        except OSError:
            return 0, b""
        finally:
            writer.close()
        return self._checked(bytes(found), number)

    def _checked(self, found: bytes, number: str) -> tuple[int, bytes]:
        head, _, body = found.partition(b"\r\n\r\n")
        if not body and not head:
            return 0, b""
        names = dict(re.findall(rb"(?m)^([\w-]+): (.*?)\r?$", head))
        if number and names.get(b"x-request-id") != number.encode():
            self.wrong.append(f"{number} got the reply to {names.get(b'x-request-id')!r}")
        if b"content-length" in names:
            length = int(names[b"content-length"])
            if len(body) > length:
                self.outcomes["answered twice"] += 1
            if len(body) < length:
                return 0, b""
        elif not body.endswith(b"0\r\n\r\n"):
            return 0, b""
        return int(head.split()[1]), body

    async def one(self, i: int, texts: list[str]) -> None:
        """A request of one of the kinds."""
        kind = self.chosen.choices(("plain", "killed", "slow", "failing", "stream"), (80, 10, 4, 3, 3))[0]
        path, body, how = "/v1/embeddings", {"input": texts, "encoding_format": "base64"}, {}
        if kind == "killed":
            how = {"leaves": self.chosen.random()}
        elif kind == "slow":
            path, body, how = "/embed_all", {"inputs": texts[:2]}, {"pause": 0.05}
        elif kind == "failing":
            body = {"input": [*texts[:3], f"{MARK} {texts[0]}"]}
        elif kind == "stream":
            path, body = "/v1/completions", {"prompt": "Once upon a time", "max_tokens": 24, "seed": i, "stream": True}
        begun = time.perf_counter()
        status, reply = await self.ask(path, body, f"{kind}-{i}", **how)
        if kind == "killed":
            self.outcomes["killed by us"] += 1
        elif status == -1:
            self.outcomes["not accepted: no connection"] += 1
        elif status == 0:
            self.outcomes["lost"] += 1
            self.wrong.append(f"{kind}-{i} got no whole reply")
        elif status == 429:
            self.outcomes["refused with 429"] += 1
        elif status == 503:
            self.outcomes["refused with 503, the server ends"] += 1
        elif status == 504:
            self.outcomes["too late, 504"] += 1
        elif status == (500 if kind == "failing" else 200):
            self.outcomes["answered once"] += 1
            self.outcomes["of them with the model's failure, 500"] += status == 500
            self.seconds.append(time.perf_counter() - begun)
            if kind == "stream" and b"[DONE]" not in reply:
                self.wrong.append(f"{kind}-{i} has no end")
        else:
            self.wrong.append(f"{kind}-{i} got {status}: {reply[:200]!r}")

    async def load(self, rate: float, seconds: float, texts: list[list[str]], first: int = 0) -> int:
        """Requests at random times, so many a second; how many there were, once all have ended."""
        begun, at, tasks = time.perf_counter(), 0.0, []
        while (at := at + self.chosen.expovariate(rate)) < seconds:
            await asyncio.sleep(max(0.0, begun + at - time.perf_counter()))
            number = first + len(tasks)
            tasks.append(asyncio.create_task(self.one(number, texts[number % len(texts)])))
        await asyncio.gather(*tasks)
        return len(tasks)

    async def speed(self, texts: list[list[str]]) -> float:
        """Requests a second of a saturated server."""
        until, done = time.perf_counter() + SENT_FIRST, 0

        async def work(i: int) -> None:
            nonlocal done
            while time.perf_counter() < until:
                status, _ = await self.ask("/v1/embeddings", {"input": texts[i], "encoding_format": "base64"})
                assert status == 200, status
                done += 1

        begun = time.perf_counter()
        await asyncio.gather(*map(work, range(8)))
        return done / (time.perf_counter() - begun)


def resident(pid: int) -> float:
    """Megabytes that a process holds."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--times", type=float, default=10.0, help="of what the server can compute")
    given = parser.parse_args()
    chosen = random.Random(1)
    words = ["the", "cat", "sat", "on", "green", "hills", "while", "rain", "falls", "near", "water"]
    texts = [[" ".join(chosen.choices(words, k=chosen.randint(4, 200))) for _ in range(TEXTS)] for _ in range(64)]
    log = "/dev/full" if Path("/dev/full").exists() else "/dev/null"
    server = subprocess.Popen([sys.executable, "-c", SERVER, log], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    lines = [""]
    while " at http" not in lines[-1]:
        lines.append(server.stderr.readline())
        assert lines[-1], lines
    port = int(lines[-1].rsplit(":", 1)[1])
    threading.Thread(target=lambda: lines.extend(server.stderr or ()), daemon=True).start()
    memory: list[float] = []

    async def run() -> dict[str, Any]:
        client = Client(port)
        speed = await client.speed(texts)
        memory.append(resident(server.pid))
        watching = asyncio.create_task(watch())
        sent = await client.load(given.times * speed, given.seconds, texts)
        watching.cancel()
        overload, seconds = dict(client.outcomes), sorted(client.seconds)
        memory.append(resident(server.pid))
        begun = time.perf_counter()
        status, reply = await client.ask("/v1/embeddings", {"input": texts[0], "encoding_format": "base64"})
        afterwards = time.perf_counter() - begun
        rows = json.loads(reply)["data"] if status == 200 else []
        got = [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in rows]
        ready, _ = await client.ask("/v1/tasks/fill-mask", {"inputs": "Rain [MASK]."})
        client.outcomes.clear()
        ending = asyncio.create_task(client.load(given.times * speed, 3.0, texts, first=sent))
        await asyncio.sleep(1.0)
        server.send_signal(signal.SIGTERM)
        also = await ending
        return {
            "requests a second that the server can answer": round(speed, 1),
            "overload": {"seconds": given.seconds, "sent": sent, **overload},
            "p50 and p99 of those answered, s": [round(seconds[int(len(seconds) * q)], 2) for q in (0.5, 0.99)],
            "SIGTERM under load": {"sent": also, **client.outcomes},
            "afterwards": {"status": status, "seconds": round(afterwards, 3), "fill-mask": ready},
            "same bits as offline": bool(got) and np.array_equal(np.stack(got), wanted),
            "wrong": client.wrong[:10],
        }

    async def watch() -> None:
        while True:
            memory.append(resident(server.pid))
            await asyncio.sleep(0.1)

    # Computed before there is load, by as many threads.
    wanted = pipeline("sentence-embedding", dtype="float32")(texts[0])
    try:
        found = asyncio.run(run())
        code = server.wait(90)
    finally:
        server.kill()
    found["exit code"] = code
    found["resident, MB: start, peak, end"] = [round(memory[0]), round(max(memory)), round(memory[-1])]
    found["said of the log"] = [line.strip() for line in lines if "log" in line and "lost" in line]
    print(json.dumps(found, indent=2))
    lost = [part.get(kind, 0) for part in (found["overload"], found["SIGTERM under load"]) for kind in _NEVER]
    fine = not found["wrong"] and not any(lost) and code == 0 and found["same bits as offline"]
    return 0 if fine and (found["afterwards"]["status"], found["afterwards"]["fill-mask"]) == (200, 200) else 1


_NEVER = ("lost", "answered twice")

if __name__ == "__main__":
    sys.exit(main())
