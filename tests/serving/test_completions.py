"""Generation over HTTP: the tokens of `generate` for everyone, whoever else is in the batch."""

import asyncio
import json
import random

import httpx
import pytest

from modernbert.decoding.ongoing import cache_bytes
from modernbert.serving import create_app
from modernbert.serving.continuations import Continuations, Stream, check_room
from modernbert.serving.problems import RequestError
from modernbert.serving.routes.completions import Text

PROMPTS = ["Once upon a time", "The cat", "In the garden there was a tree, and under the tree", "Rain"]


@pytest.fixture(scope="module")
def decoder():
    from modernbert.pipelines import pipeline

    return pipeline("text-generation", dtype="float32")  # the package's own


@pytest.fixture(scope="module")
def app(decoder):
    made = create_app({"small": decoder}, access_log=False)
    yield made
    made.state.serving.models.close()


def offline(decoder, prompt, new, **options):
    options = {"max_new_tokens": new, "return_full_text": False, "top_k": 0, **options}
    return decoder(prompt, **options)[0]["generated_text"]


def test_a_completion_is_what_the_pipeline_gives(ask, decoder):
    reply = ask("/v1/completions", {"prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0}).json()
    assert reply["choices"][0]["text"] == offline(decoder, PROMPTS[0], 12, do_sample=False)
    assert reply["choices"][0]["finish_reason"] == "length"
    read = len(decoder.tokenizer(PROMPTS[0]).input_ids)
    assert reply["usage"] == {"prompt_tokens": read, "completion_tokens": 12, "total_tokens": read + 12}
    headers = ask("/v1/completions", {"prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0}).headers
    assert headers["x-compute-tokens"] == str(read + 12)
    assert float(headers["x-inference-time"]) > 0
    sampled = ask("/v1/completions", {"prompt": PROMPTS[1], "max_tokens": 12, "temperature": 0.9, "seed": 4}).json()
    assert sampled["choices"][0]["text"] == offline(decoder, PROMPTS[1], 12, temperature=0.9, seed=4)
    ids = decoder.tokenizer(PROMPTS[0]).input_ids
    of_ids = ask("/v1/completions", {"prompt": ids, "max_tokens": 12, "temperature": 0}).json()
    assert of_ids["choices"][0]["text"] == reply["choices"][0]["text"]
    echoed = ask("/v1/completions", {"prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0, "echo": True}).json()
    assert echoed["choices"][0]["text"] == PROMPTS[0] + reply["choices"][0]["text"]


def test_n_texts_of_several_prompts_and_log_probabilities(ask, decoder):
    body = {"prompt": PROMPTS[:2], "n": 3, "max_tokens": 6, "seed": 1, "logprobs": 2}
    choices = ask("/v1/completions", body).json()["choices"]
    wanted = decoder(PROMPTS[:2], num_return_sequences=3, max_new_tokens=6, seed=1, temperature=1.0, top_k=0,
                     return_full_text=False)  # fmt: skip
    assert [c["text"] for c in choices] == [one["generated_text"] for texts in wanted for one in texts]
    told = choices[0]["logprobs"]
    assert len(told["tokens"]) == len(told["token_logprobs"]) == 6
    assert all(p <= 0 for p in told["token_logprobs"])
    assert all(len(top) <= 2 for top in told["top_logprobs"])
    greedy = ask("/v1/completions", {"prompt": PROMPTS[0], "temperature": 0, "max_tokens": 5, "logprobs": 1}).json()
    told = greedy["choices"][0]["logprobs"]
    for token, probability, top in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        assert top == {token: probability}


def test_stop_strings_end_a_text_and_are_left_out(ask, decoder):
    whole = offline(decoder, PROMPTS[0], 30, do_sample=False)
    stop = whole[10:14]
    reply = ask("/v1/completions", {"prompt": PROMPTS[0], "max_tokens": 30, "temperature": 0, "stop": stop}).json()
    assert reply["choices"][0]["text"] == whole[: whole.index(stop)]
    assert reply["choices"][0]["finish_reason"] == "stop"


def events_of(text):
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_stream_has_the_same_text_in_pieces(ask, decoder):
    body = {"prompt": PROMPTS[:2], "max_tokens": 20, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}}  # fmt: skip
    reply = ask("/v1/completions", body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    *events, last = events_of(reply.text)
    texts = ["", ""]
    for event in events:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == [offline(decoder, prompt, 20, do_sample=False) for prompt in PROMPTS[:2]]
    assert last["usage"]["completion_tokens"] == 40


def test_a_stream_tells_the_same_log_probabilities(ask):
    body = {"prompt": PROMPTS[0], "max_tokens": 12, "n": 2, "seed": 1, "logprobs": 2, "stop": ["e"], "echo": True}
    whole = [choice["logprobs"] for choice in ask("/v1/completions", body).json()["choices"]]
    told = [{name: [] for name in one} for one in whole]
    for event in events_of(ask("/v1/completions", {**body, "stream": True}).text):
        (choice,) = event["choices"]
        for name, values in (choice["logprobs"] or {}).items():
            told[choice["index"]][name] += values
    assert told == whole
    assert whole[0]["text_offset"][0] >= len(PROMPTS[0])


def test_what_takes_too_long(ask):
    body = {"prompt": PROMPTS[0], "max_tokens": 400, "temperature": 0}
    late = ask("/v1/completions", body, headers={"x-timeout": "0.05"})
    assert late.status_code == 504
    assert "longer than" in late.json()["error"]["message"]
    stream = ask("/v1/completions", {**body, "stream": True}, headers={"x-timeout": "0.05"}).text
    assert json.loads(stream.strip().split("data: ")[-1])["error"]["code"] == "timeout"


def test_options_that_give_no_token_end_their_own_text(app, decoder):
    wrong = {"exponential_decay_length_penalty": [0, 1e300]}

    async def run():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            fine = client.post("/v1/completions", json={"prompt": PROMPTS[0], "max_tokens": 40, "temperature": 0})
            bad = client.post("/v1/tasks/text-generation", json={"inputs": "Rain", "options": wrong})
            return await asyncio.gather(fine, bad)

    for _ in range(2):
        fine, bad = asyncio.run(run())
        assert fine.json()["choices"][0]["text"] == offline(decoder, PROMPTS[0], 40, do_sample=False)
        assert bad.status_code == 422
        assert "OverflowError" in bad.json()["error"]["message"]


def test_a_model_that_fails_ends_its_texts_and_goes_on(app, decoder, monkeypatch):
    async def run(times):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            body = {"prompt": PROMPTS[1], "max_tokens": 5, "temperature": 0}
            return [await client.post("/v1/completions", json=body) for _ in range(times)]

    def broken(*args):
        raise RuntimeError("insides")

    with monkeypatch.context() as patched:
        patched.setattr(decoder.model, "score_next", broken, raising=False)
        (reply,) = asyncio.run(run(1))
    assert reply.status_code == 500
    assert "insides" not in reply.text
    (reply,) = asyncio.run(run(1))
    assert reply.json()["choices"][0]["text"] == offline(decoder, PROMPTS[1], 5, do_sample=False)


def test_a_text_at_which_the_model_fails_ends_alone(app, decoder, monkeypatch):
    score, ids = decoder.model.score_next, decoder.tokenizer(PROMPTS[3]).input_ids

    def broken(inputs, cache):
        if inputs.ids_T[-len(ids) :].tolist() == ids:
            raise RuntimeError("insides")
        return score(inputs, cache)

    async def run():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            bodies = [{"prompt": prompt, "max_tokens": 40, "temperature": 0} for prompt in PROMPTS]
            return await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))

    monkeypatch.setattr(decoder.model, "score_next", broken, raising=False)
    replies = asyncio.run(run())
    monkeypatch.undo()
    assert [reply.status_code for reply in replies] == [200, 200, 200, 500]
    for prompt, reply in zip(PROMPTS[:3], replies, strict=False):
        assert reply.json()["choices"][0]["text"] == offline(decoder, prompt, 40, do_sample=False)


def test_a_beam_search_lets_others_in_and_is_that_of_the_pipeline(app, decoder):
    options = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 60, "seed": 3, "do_sample": False}
    ends = []

    async def run():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:

            async def ask(name, path, body):
                reply = await client.post(path, json=body)
                ends.append(name)
                return reply.json()

            beams = ask("beams", "/v1/tasks/text-generation", {"inputs": PROMPTS[:2], "options": options})
            short = ask("short", "/v1/completions", {"prompt": PROMPTS[3], "max_tokens": 5, "temperature": 0})
            return await asyncio.gather(beams, short)

    beams, short = asyncio.run(run())
    assert ends == ["short", "beams"]
    assert beams["answers"] == decoder(PROMPTS[:2], **options)
    assert beams["usage"]["tokens"] > 4 * 50
    assert short["choices"][0]["text"] == offline(decoder, PROMPTS[3], 5, do_sample=False)
    engine = next(iter(app.state.serving.models.engines.values()))
    assert not any(len(one) for one in engine._continuations.values())


def test_a_beam_search_ends_with_its_deadline(ask):
    options = {"num_beams": 4, "max_new_tokens": 400, "do_sample": False}
    late = ask("/v1/tasks/text-generation", {"inputs": PROMPTS[0], "options": options}, headers={"x-timeout": "0.05"})
    assert late.status_code == 504


def test_many_at_once_get_what_each_gets_alone(app, decoder):
    chosen = random.Random(1)
    bodies = [
        {
            "prompt": chosen.choice(PROMPTS),
            "max_tokens": chosen.randint(1, 30),
            "temperature": chosen.choice([0, 0.7, 1.0]),
            "seed": chosen.randint(0, 99),
        }
        for _ in range(16)
    ]

    async def run():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:

            async def one(body):
                await asyncio.sleep(chosen.random() * 0.3)
                return (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"]

            return await asyncio.gather(*map(one, bodies))

    got = asyncio.run(run())
    for body, text in zip(bodies, got, strict=True):
        options = {"do_sample": False} if not body["temperature"] else {"temperature": float(body["temperature"])}
        assert text == offline(decoder, body["prompt"], body["max_tokens"], seed=body["seed"], **options)


def test_a_client_that_leaves_a_stream_frees_its_place(app):
    engine = next(iter(app.state.serving.models.engines.values()))

    async def run():
        state = app.state.serving
        request = type("Request", (), {"headers": {}, "state": type("Told", (), {})()})()
        _, _, streams, _ = await state.generate(
            request, None, "Once", {"max_new_tokens": 400, "do_sample": False}, None
        )
        async for _ in streams[0]:
            break
        for _ in range(200):
            if not any(len(one) for one in engine._continuations.values()):
                return True
            await asyncio.sleep(0.05)
        return False

    assert asyncio.run(run())


def test_what_can_never_fit_is_refused(decoder):
    continuations = Continuations(decoder.model, 1000)
    options = decoder.resolve(decoder.given({"max_new_tokens": 100, "seed": 0}))
    ((row,),) = decoder.prepare(["Once"], options)
    with pytest.raises(RequestError, match="bytes of cache"):
        continuations.check(decoder.ongoing(row, options))
    with pytest.raises(RequestError, match="3 beams"):
        check_room(decoder.model, 10, 10, 2 * cache_bytes(decoder.model, 20), texts=3)


def test_requests_take_turns_to_join_and_those_that_left_do_not_wait(decoder):
    options = decoder.resolve(decoder.given({"max_new_tokens": 1, "seed": 0}))
    ((row,),) = decoder.prepare(["Once"], options)

    async def run():
        def streams(count, urgent=False):
            loop = asyncio.get_running_loop()
            return [Stream(decoder.ongoing(row, options), loop, 1e18, None, urgent) for _ in range(count)]

        continuations = Continuations(decoder.model, cache_bytes(decoder.model, len(row.ids) + 1))  # of one text
        many, one, left, first = streams(4), streams(1), streams(3), streams(1, urgent=True)
        for request in (many, one, left, first):
            continuations.add(request)
        for stream in left:
            stream.text.cancelled = True
        assert continuations.pending == 6 * many[0].tokens
        order = []
        while len(continuations):
            assert continuations.step() == 1
            order += [s for s in (*many, *one, *left, *first) if s.text.history.length and s not in order]
        return [{many[0]: "many", one[0]: "one", first[0]: "first"}.get(stream, "rest") for stream in order]

    assert asyncio.run(run()) == ["first", "many", "one", "rest", "rest", "rest"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prompt": "a", "logit_bias": {"5": 1}}, "logit_bias"),
        ({"prompt": "a", "frequency_penalty": 0.5}, "frequency_penalty"),
        ({"prompt": "a", "stop": [""]}, "stop"),
        ({"prompt": []}, "at least one"),
        ({"prompt": [-1]}, "-1"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "unknown": 1}, "unknown"),
    ],
)
def test_wrong_requests(ask, body, said):
    reply = ask("/v1/completions", body)
    assert reply.status_code == 422
    assert said in reply.json()["error"]["message"]


def test_a_stop_string_over_several_tokens_is_never_shown():
    class Letters:
        def decode(self, ids, **options):
            return "".join(map(chr, ids))

    text, shown = Text(Letters(), ["END", "stop"]), ""
    for letter in "a E EN b ENst sto END more":
        shown += text.push(ord(letter), [])
    shown += text.finish((), None)
    assert shown == "a E EN b ENst sto "
    assert text.reason == "stop"
