"""Several answers from one pass: models that share an encoder are noticed, and each answer has its own route's bits."""

import asyncio

import httpx
import numpy as np
import pytest
import torch

pytest.importorskip("fastapi")

import modernbert
from modernbert import Tokenizer, pipeline
from modernbert.pipelines import small_model
from modernbert.serving import create_app

TASKS = {
    "dense": "sentence-embedding",
    "sparse": "sparse-embedding",
    "topic": "text-classification",
    "mood": "text-classification",
    "tags": "token-classification",
}
TEXTS = ["A cat sat on the mat.", "Rain fell.", "A longer text follows here, " * 8]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models over one encoder, and one, "other", over another encoder."""
    root, tokenizer = tmp_path_factory.mktemp("answers"), Tokenizer.from_pretrained(small_model())
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 3, "num_hidden_layers": 3}
    config = modernbert.AutoConfig.from_pretrained(small_model()).replace(**sizes, initializer_range=0.3)
    torch.manual_seed(0)
    masked = modernbert.ModernBertForMaskedLM(config)
    made = {"dense": modernbert.SentenceEncoder(masked.model), "sparse": modernbert.SparseEncoder(masked)}
    masked.save_pretrained(root / "masked")
    for name, labels in (("topic", 4), ("mood", 2)):
        cls = modernbert.ModernBertForSequenceClassification
        made[name] = cls.from_pretrained(root / "masked", num_labels=labels)
    made["tags"] = modernbert.ModernBertForTokenClassification.from_pretrained(root / "masked", num_labels=3)
    made["other"] = modernbert.ModernBertForSequenceClassification(config)
    for name, model in made.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def app(folders):
    names = [*TASKS, "other"]
    made = create_app(model=[f"{name}={folders / name}" for name in names], access_log=False)
    yield made
    made.state.serving.models.close()


@pytest.fixture(scope="module")
def alone(folders):
    return {name: pipeline(task, folders / name) for name, task in TASKS.items()}


async def post(client, path, body):
    return await (client.get(path) if body is None else client.post(path, json=body))


def ask_all(app, *requests):
    """Replies to requests, paths with bodies, that are sent at one time."""

    async def run():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=60) as client:
            return await asyncio.gather(*(post(client, *one) for one in requests))

    return asyncio.run(run())


def ask(app, body):
    return ask_all(app, ("/v1/answers", body))[0]


def same(got, wanted):
    if isinstance(wanted, dict):
        return got.keys() == wanted.keys() and all(same(got[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list):
        return len(got) == len(wanted) and all(map(same, got, wanted))
    if isinstance(wanted, np.ndarray):
        return np.array_equal(np.array(got, wanted.dtype), wanted)
    return np.float32(got) == np.float32(wanted) if isinstance(wanted, float) else got == wanted


def test_models_with_the_same_encoder_share_one_in_memory(app):
    models = app.state.serving.models
    assert models.sharing == [list(TASKS)]
    (one, other) = sorted(models.together, key=lambda one: -len(one.pipelines))
    assert {key.partition(":")[0] for key in one.pipelines} == set(TASKS)
    assert {key.partition(":")[0] for key in other.pipelines} == {"other"}
    for name in TASKS:
        inner = models.served[name].first.model
        while inner is not one.model:
            inner = inner.model
    assert one.model.runner is not None
    assert other.model is not one.model
    assert ask_all(app, ("/v1/tasks", None))[0].json()["sharing"] == [list(TASKS)]


WANTED = {
    "vector": {"model": "dense", "options": {"normalize": True}},
    "words": {"task": "sparse-embedding", "options": {"top_k": 9}},
    "topic": {"model": "topic", "task": "text-classification", "options": {"top_k": 3}},
    "mood": {"model": "mood"},
    "tags": {"task": "token-classification", "options": {"aggregation_strategy": "simple"}},
}
OF = {"vector": "dense", "words": "sparse", "topic": "topic", "mood": "mood", "tags": "tags"}


def offline(alone, texts=TEXTS):
    made = {name: alone[OF[name]](texts, **WANTED[name].get("options", {})) for name in WANTED}
    return [{name: made[name][i] for name in WANTED} for i in range(len(texts))]


def test_answers_have_the_bits_of_the_offline_pipelines(app, alone):
    reply = ask(app, {"inputs": TEXTS, "answers": WANTED})
    assert reply.status_code == 200, reply.text
    found = reply.json()
    assert same(found["answers"], offline(alone))
    tokens = sum(len(ids) for ids in alone["dense"].tokenizer(TEXTS).input_ids)
    assert found["usage"] == {"tokens": tokens, "truncated": 0}  # read once
    assert found["sources"] == {name: {"model": OF[name], "task": TASKS[OF[name]]} for name in WANTED}
    single = ask(app, {"inputs": TEXTS[0], "answers": WANTED}).json()
    assert single["answers"] == found["answers"][:1]


def test_without_names_each_model_that_shares_an_encoder_answers(app, alone):
    found = ask(app, {"inputs": TEXTS}).json()
    wanted = {name: serve(TEXTS) for name, serve in alone.items()}
    assert same(found["answers"], [{name: wanted[name][i] for name in TASKS} for i in range(len(TEXTS))])


def test_many_requests_at_one_time_have_the_same_bits(app, alone):
    several = [[TEXTS[i % 3], f"Text number {i}."] for i in range(8)]
    asked = [("/v1/answers", {"inputs": texts, "answers": WANTED}) for texts in several]
    asked += [("/v1/tasks/sentence-embedding", {"inputs": texts}) for texts in several]
    replies = ask_all(app, *asked)
    assert all(reply.status_code == 200 for reply in replies)
    for texts, reply, vectors in zip(several, replies[:8], replies[8:], strict=True):
        assert same(reply.json()["answers"], offline(alone, texts))
        assert same(vectors.json()["answers"], list(alone["dense"](texts)))


def test_long_texts_are_refused_or_cut_and_counted(app):
    long = ["word " * 2000]
    refused = ask(app, {"inputs": long, "answers": {"a": {"model": "topic"}}})
    assert refused.status_code == 422
    assert "512" in refused.json()["error"]["message"]
    options = {"truncation": True}
    reply = ask(
        app, {"inputs": long, "answers": {name: {**WANTED[name], "options": options} for name in ("topic", "mood")}}
    )
    assert reply.json()["usage"] == {"tokens": 512, "truncated": 2}
    assert reply.headers["x-truncated-texts"] == "2"


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"inputs": "a", "answers": {}}, 422, "answers names 0 answers; ask for 1 to 64"),
        ({"inputs": [], "answers": {"a": {"model": "dense"}}}, 422, "at least one"),
        ({"inputs": "", "answers": {"a": {"model": "dense"}}}, 422, "empty"),
        ({"inputs": 4}, 422, "inputs is 4"),
        ({"inputs": "a", "answers": {"a": {}}}, 422, "a names neither a model nor a task"),
        ({"inputs": "a", "answers": {"a": {"model": "none"}}}, 404, "there is no model 'none'; this server has dense"),
        ({"inputs": "a", "answers": {"a": {"task": "none"}}}, 404, "no model of this server can do none"),
        (
            {"inputs": "a", "answers": {"a": {"model": "dense", "task": "fill-mask"}}},
            404,
            "'dense' cannot do fill-mask",
        ),
        ({"inputs": "a", "answers": {"a": {"model": "dense", "option": {}}}}, 422, "answers.a.option"),
        ({"inputs": "a", "answers": {"a": {"model": "dense", "options": {"zz": 1}}}}, 422, "has no option zz"),
        ({"inputs": "a", "answers": {"a": {"model": "dense", "options": {"padding": 1}}}}, 422, "no option padding"),
        ({"inputs": "a", "answers": {"a": {"model": "dense", "options": {"prompt": "x" * 2000}}}}, 422, "2,000"),
        (
            {"inputs": "a", "answers": {"a": {"model": "dense"}, "b": {"model": "other"}}},
            422,
            "dense, other are not answered from one pass; what shares an encoder here is dense:sentence-embedding",
        ),
        (
            {"inputs": "a", "answers": {"a": {"model": "dense"}, "b": {"task": "sentence-embedding"}}},
            422,
            "two answers are dense:sentence-embedding",
        ),
        ({"inputs": ["a"] * 500, "answers": WANTED}, 413, "2500 texts"),
    ],
)
def test_wrong_requests_say_what_is_wrong(app, body, status, said):
    reply = ask(app, body)
    assert reply.status_code == status, reply.text
    assert said in reply.json()["error"]["message"]


def test_a_task_alone_means_a_model_that_shares_the_encoder_of_the_others(folders, alone):
    app = create_app(model=[f"{name}={folders / name}" for name in ("other", "dense", "mood")], access_log=False)
    try:
        body = {"inputs": TEXTS, "answers": {"a": {"task": "text-classification"}, "b": {"model": "dense"}}}
        found = ask(app, body).json()
        assert found["sources"]["a"] == {"model": "mood", "task": "text-classification"}
        assert same([one["a"] for one in found["answers"]], alone["mood"](TEXTS))
    finally:
        app.state.serving.models.close()


def test_pipelines_that_are_handed_over_share_only_what_they_share_already(folders):
    apart = {name: pipeline(TASKS[name], folders / name) for name in ("dense", "mood")}
    joined = modernbert.OnePass({name: folders / name for name in ("topic", "sparse")}).pipelines
    app = create_app({**apart, **joined}, access_log=False)
    try:
        assert app.state.serving.models.sharing == [["topic", "sparse"]]
        assert apart["dense"].model.model is not apart["mood"].model.model
    finally:
        app.state.serving.models.close()
