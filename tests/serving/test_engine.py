"""The engine under load: the same bits, fairness, limits, clients that leave, models that fail."""

import asyncio
import base64
import random
import threading
import time

import httpx
import numpy as np
import pytest
import torch

from modernbert.errors import InputError
from modernbert.pipelines import pipeline
from modernbert.serving import create_app
from modernbert.serving.engine import Engine
from modernbert.serving.metrics import Metrics
from modernbert.serving.problems import EngineError, LateError, OverloadedError

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "runs",
    "quickly",
    "under",
    "green",
    "hills",
    "while",
    "rain",
    "falls",
    "near",
    "water",
]


def text(random_, most=60):
    return " ".join(random_.choices(WORDS, k=random_.randint(1, most)))


@pytest.fixture
def embed(heads):
    return pipeline("sentence-embedding", heads / "Model", dtype="float32")


@pytest.fixture
def engine():
    made = Engine(torch.device("cpu"), 256, 100_000, 2, Metrics())
    yield made
    made.close()


class Gate:
    """Holds a pipeline's passes until it is opened, and says in which order rows came."""

    def __init__(self, pipeline):
        self.open, self.seen, self.run = threading.Event(), [], pipeline.run
        pipeline.run = self

    def __call__(self, rows, options):
        self.open.wait(10)
        self.seen.append([len(row.ids) for row in rows])
        return self.run(rows, options)


def soon(seconds=20.0):
    return asyncio.get_running_loop().time() + seconds


def test_64_clients_at_once_get_the_bits_of_the_pipelines(pipelines):
    """Mixed routes, models and lengths: what comes back never depends on who else asked."""
    app = create_app(pipelines, access_log=False, batch_tokens=300)
    chosen = random.Random(0)
    texts = [[text(chosen) for _ in range(chosen.randint(1, 6))] for _ in range(64)]

    async def one(client, number):
        given, kind = texts[number], number % 4
        if kind == 0:
            body = {"model": "embed", "input": given, "encoding_format": "base64"}
            found = (await client.post("/v1/embeddings", json=body)).json()["data"]
            got = np.stack([np.frombuffer(base64.b64decode(x["embedding"]), "<f4") for x in found])
            return np.array_equal(got, pipelines["embed"](given))
        if kind == 1:
            body = {"model": "rank", "query": given[0], "texts": given}
            found = (await client.post("/rerank", json=body)).json()
            return [x["score"] for x in found] == [x["score"] for x in pipelines["rank"](given[0], given)]
        if kind == 2:
            found = (await client.post("/predict", json={"model": "classify", "inputs": [[x] for x in given]})).json()
            return found == pipelines["classify"](given, top_k=None)
        body = {"inputs": given, "options": {"aggregation_strategy": "simple"}}
        found = (await client.post("/v1/tasks/token-classification", json=body)).json()["answers"]
        wanted = pipelines["tag"](given, aggregation_strategy="simple")
        return [[e["word"] for e in x] for x in found] == [[e["word"] for e in x] for x in wanted]

    async def everyone():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=120) as client:
            return await asyncio.gather(*(one(client, number) for number in range(64)))

    try:
        assert all(asyncio.run(everyone()))
    finally:
        app.state.serving.models.close()


def test_a_question_does_not_wait_for_ten_thousand_texts(embed, engine):
    """It is in the next batch, and so is the other's: rows are taken in turns."""
    gate = Gate(embed)

    async def run():
        many = asyncio.create_task(engine.run(embed, ["a cat sat on the mat"] * 2000, {}, soon(60)))
        while not engine.waiting or len(engine._works) < 1:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        question = asyncio.create_task(engine.run(embed, ["why"], {}, soon()))
        await asyncio.sleep(0.2)
        gate.open.set()
        await question
        passed = len(gate.seen)
        assert not many.done()
        assert len((await many).answers) == 2000
        return passed

    assert asyncio.run(run()) <= 8  # of more than fifty
    assert max(sum(batch) for batch in gate.seen) <= 256


def test_short_texts_pass_a_long_one_only_where_it_does_not_fit(embed, engine):
    """It is in the batch after the first, whatever short ones come before and after it."""
    gate = Gate(embed)

    async def run():
        asked = [asyncio.create_task(engine.run(embed, ["a cat sat"], {}, soon()))]
        await asyncio.sleep(0.1)  # the engine is inside a pass
        for text in (["why"] * 20, ["the dog ran " * 50], ["why"] * 20, ["a cat"] * 20):
            asked.append(asyncio.create_task(engine.run(embed, text, {}, soon())))
            await asyncio.sleep(0.1)
        gate.open.set()
        await asyncio.gather(*asked)

    asyncio.run(run())
    first = next(i for i, batch in enumerate(gate.seen) if max(batch) > 150)
    assert first <= 2
    assert len(gate.seen[first]) > 1


def test_too_much_is_refused_with_the_time_to_come_back(embed):
    engine, gate = Engine(torch.device("cpu"), 256, 500, 2, Metrics()), Gate(embed)

    async def run():
        first = asyncio.create_task(engine.run(embed, ["a cat"] * 200, {}, soon()))  # more than the limit, but alone
        await asyncio.sleep(0.2)
        with pytest.raises(OverloadedError, match="at most 500") as refused:
            await engine.run(embed, ["why"], {}, soon())
        assert refused.value.headers["Retry-After"].isdecimal()
        gate.open.set()
        await first
        await engine.run(embed, ["why"], {}, soon())

    try:
        asyncio.run(run())
        assert engine.waiting == 0
    finally:
        engine.close()


def test_what_cannot_have_its_turns_in_time_is_refused(embed, engine):
    """Turns count and not all that waits: a short question is answered before the rest of a long request."""

    async def run():
        for _ in range(20):
            await engine.run(embed, ["a cat"], {}, soon())  # the speed is known
        gate = Gate(embed)
        many = asyncio.create_task(engine.run(embed, ["a cat sat on the mat"] * 4000, {}, soon(60)))
        while engine.waiting < 30_000:
            await asyncio.sleep(0.01)
        engine._speed = 1000.0
        question = asyncio.create_task(engine.run(embed, ["why"], {}, soon(5)))
        with pytest.raises(OverloadedError, match=r"takes over 2.5 of the request's 5 seconds") as refused:
            await engine.run(embed, ["why"] * 1000, {}, soon(5))
        assert int(refused.value.headers["Retry-After"]) > 20
        gate.open.set()
        await question
        many.cancel()
        await asyncio.wait({many})

    asyncio.run(run())
    assert engine.waiting == 0


def test_rows_of_clients_that_left_are_not_computed(embed, engine):
    gate = Gate(embed)

    async def run():
        keeps = asyncio.create_task(engine.run(embed, ["a b c"], {}, soon()))
        await asyncio.sleep(0.1)  # the engine is inside a pass
        leaves = asyncio.create_task(engine.run(embed, ["a cat sat on the mat and slept"] * 50, {}, soon()))
        late = asyncio.create_task(engine.run(embed, ["a dog ran over the old green hills"] * 50, {}, soon(0.3)))
        await asyncio.sleep(0.2)
        leaves.cancel()
        await asyncio.sleep(0.3)
        with pytest.raises(LateError):
            await late
        gate.open.set()
        await keeps
        await engine.run(embed, ["a b c"], {}, soon())

    asyncio.run(run())
    assert engine.waiting == 0
    assert sum(len(batch) for batch in gate.seen) == 2


def test_a_client_that_leaves_while_its_texts_are_tokenized(embed, engine):
    begun, go_on = threading.Event(), threading.Event()

    def slow(pipeline, items, options):
        begun.set()
        go_on.wait(5)
        return pipeline.prepare(items, options)

    async def run():
        leaves = asyncio.create_task(engine.run(embed, ["a cat"] * 200, {}, soon(), slow))
        while not begun.is_set():
            await asyncio.sleep(0.01)
        leaves.cancel()
        await asyncio.wait({leaves})
        go_on.set()
        await engine.run(embed, ["a b c"], {}, soon())

    asyncio.run(run())
    assert engine.waiting == 0
    assert not engine._works


def test_an_error_of_the_engine_itself_is_told_and_it_goes_on(embed, engine, monkeypatch):
    def broken(self):
        monkeypatch.undo()
        raise KeyError("insides")

    async def run():
        monkeypatch.setattr(Engine, "_next_batch", broken)
        with pytest.raises(EngineError, match="KeyError"):
            await engine.run(embed, ["a b c"], {}, soon())
        assert len((await engine.run(embed, ["a b c"], {}, soon())).answers) == 1

    asyncio.run(run())
    assert engine.waiting == 0


def test_a_request_that_breaks_the_model_fails_alone(embed, engine):
    run = embed.run

    def broken(rows, options):
        if any(len(row.ids) > 20 for row in rows):
            raise RuntimeError("broken")
        time.sleep(0.05)
        return run(rows, options)

    embed.run = broken

    async def ask():
        texts = ["a cat", "the dog " * 20, "rain fell", "an old house"]
        return await asyncio.gather(*(engine.run(embed, [t], {}, soon()) for t in texts), return_exceptions=True)

    got = asyncio.run(ask())
    assert [isinstance(x, EngineError) for x in got] == [False, True, False, False]
    assert np.array_equal(got[2].answers[0], asyncio.run(engine.run(embed, ["rain fell"], {}, 1e18)).answers[0])


def test_a_wrong_text_fails_its_request_and_no_other(embed, engine):
    async def ask():
        ok = engine.run(embed, ["a cat"] * 3, {}, soon())
        wrong = engine.run(embed, ["fine"] * 100 + [""], {}, soon())
        return await asyncio.gather(ok, wrong, return_exceptions=True)

    ok, wrong = asyncio.run(ask())
    assert len(ok.answers) == 3
    assert isinstance(wrong, InputError)
    assert engine.waiting == 0
