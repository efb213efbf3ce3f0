"""Each route gives what the offline pipeline gives, in the shape of its API."""

import base64
import json
import re
import time

import numpy as np
import pytest

from modernbert.pipelines.options import OPTIONS
from modernbert.serving.routes.tasks import EXAMPLES

TEXTS = ["A cat sat on the mat.", "Rain fell.", "A much longer text follows here, " * 8]


def narrow(value):
    """With float32 numbers, as models give them: their JSON has no more digits than it takes to tell them apart."""
    if isinstance(value, list):
        return [narrow(item) for item in value]
    if isinstance(value, dict):
        return {key: narrow(item) for key, item in value.items()}
    return np.float32(value) if isinstance(value, float) else value


def vectors_of(reply):
    return np.array([one["embedding"] for one in reply.json()["data"]], dtype=np.float32)


def test_openai_embeddings_have_the_bits_of_the_pipeline(ask, pipelines):
    wanted = pipelines["embed"](TEXTS)
    plain = ask("/v1/embeddings", {"model": "embed", "input": TEXTS})
    assert plain.status_code == 200
    assert np.array_equal(vectors_of(plain), wanted)
    coded = ask("/v1/embeddings", {"model": "embed", "input": TEXTS, "encoding_format": "base64"}).json()
    got = [np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in coded["data"]]
    assert np.array_equal(np.stack(got), wanted)
    tokens = sum(len(pipelines["embed"].tokenizer(text).input_ids) for text in TEXTS)
    assert coded["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert [one["index"] for one in coded["data"]] == [0, 1, 2]
    raw = ask("/v1/embeddings", {"model": "embed", "input": TEXTS}, headers={"accept": "application/octet-stream"})
    assert raw.headers["x-shape"] == "3,48"
    assert np.array_equal(np.frombuffer(raw.content, "<f4").reshape(3, 48), wanted)
    ids = [pipelines["embed"].tokenizer(text).input_ids for text in TEXTS]
    assert np.array_equal(vectors_of(ask("/v1/embeddings", {"model": "embed", "input": ids})), wanted)
    assert np.array_equal(vectors_of(ask("/v1/embeddings", {"model": "embed", "input": ids[0]})), wanted[:1])
    assert np.array_equal(vectors_of(ask("/v1/embeddings", {"model": "embed", "input": TEXTS[0]})), wanted[:1])
    few = ask("/v1/embeddings", {"input": TEXTS, "dimensions": 8, "normalize": True})
    assert np.array_equal(vectors_of(few), pipelines["embed"](TEXTS, truncate_dim=8, normalize=True))


@pytest.mark.parametrize("dtype", ["float16", "int8", "binary", "ubinary"])
def test_vectors_in_fewer_bits(ask, pipelines, dtype):
    wanted = pipelines["embed"](TEXTS)
    got = vectors_of(ask("/v1/embeddings", {"input": TEXTS, "output_dtype": dtype}))
    if dtype == "float16":
        assert np.array_equal(got, wanted.astype(np.float16).astype(np.float32))
    elif dtype == "int8":
        unit = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
        assert np.abs(got / 127 - unit).max() < 0.5 / 127 + 1e-6
    else:
        offset = 128 if dtype == "binary" else 0
        bits = np.unpackbits((got + offset).astype(np.uint8), axis=1)
        assert np.array_equal(bits.astype(bool), wanted > 0)


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_reranking_in_both_shapes(ask, pipelines, path):
    wanted = pipelines["rank"]("What sat?", TEXTS)
    body = {"query": "What sat?", "model": "rank"}
    reply = ask(path, {**body, "documents": [TEXTS[0], {"text": TEXTS[1]}, TEXTS[2]], "return_documents": True}).json()
    assert [(r["index"], r["relevance_score"], r["document"]["text"]) for r in reply["results"]] == [
        (a["index"], a["score"], a["text"]) for a in wanted
    ]
    assert reply["meta"]["api_version"]["version"] == ("2" if path.startswith("/v2") else "1")
    assert len(ask(path, {**body, "documents": TEXTS, "top_n": 1}).json()["results"]) == 1
    listed = ask(path, {**body, "texts": TEXTS, "return_text": True}).json()
    assert listed == [{"index": a["index"], "score": a["score"], "text": a["text"]} for a in wanted]
    raw = ask(path, {**body, "texts": TEXTS, "raw_scores": True}).json()
    assert [r["score"] for r in raw] == [a["score"] for a in pipelines["rank"]("What sat?", TEXTS, activation="none")]


def test_text_embeddings_inference(ask, pipelines):
    embed, classify = pipelines["embed"], pipelines["classify"]
    got = ask("/embed", {"inputs": TEXTS, "model": "embed"}).json()
    assert np.array_equal(np.array(got, np.float32), embed(TEXTS, normalize=True))
    raw = ask("/embed", {"inputs": TEXTS, "model": "embed"}, headers={"accept": "application/octet-stream"})
    assert np.array_equal(np.frombuffer(raw.content, "<f4").reshape(3, 48), embed(TEXTS, normalize=True))
    tokens = ask("/embed_all", {"inputs": TEXTS}).json()
    wanted = embed(TEXTS, multi_vector=True, normalize=False)
    assert all(np.array_equal(np.array(a, np.float32), b) for a, b in zip(tokens, wanted, strict=True))
    assert ask("/predict", {"inputs": TEXTS[0], "model": "classify"}).json() == classify([TEXTS[0]], top_k=None)[0]
    pair = {"text": TEXTS[0], "text_pair": TEXTS[1]}
    several = ask("/predict", {"inputs": [[TEXTS[0]], TEXTS[:2]], "model": "classify"}).json()
    assert several == classify([TEXTS[0], pair], top_k=None)
    alike = ask("/similarity", {"inputs": {"source_sentence": TEXTS[0], "sentences": TEXTS[:2]}}).json()
    assert alike[0] == pytest.approx(1, abs=1e-6)
    assert len(alike) == 2
    (pieces,) = ask("/tokenize", {"inputs": TEXTS[1]}).json()
    ids = embed.tokenizer(TEXTS[1]).input_ids
    assert [piece["id"] for piece in pieces] == ids
    assert "".join(piece["text"] for piece in pieces if not piece["special"]) == TEXTS[1]
    assert ask("/decode", {"ids": ids}).json() == [TEXTS[1]]
    assert ask("/info").json()["max_input_length"] == 512


def test_sparse_vectors_and_vectors_of_tokens(ask, pipelines):
    wanted = pipelines["sparse"](TEXTS)
    got = ask("/embed_sparse", {"inputs": TEXTS}).json()
    for pairs, answer in zip(got, wanted, strict=True):
        assert [pair["index"] for pair in pairs] == answer["indices"].tolist()
        assert np.array_equal(np.array([pair["value"] for pair in pairs], np.float32), answer["values"])
    reply = ask("/pooling", {"input": TEXTS, "model": "late", "task": "token_embed"}).json()
    pooled = reply["data"]
    for one, vectors in zip(pooled, pipelines["late"](TEXTS), strict=True):
        assert np.array_equal(np.array(one["data"], np.float32), vectors)
    ranked = ask("/v1/rerank", {"query": TEXTS[0], "documents": TEXTS, "model": "late"}).json()["results"]
    assert ranked[0]["index"] == 0


def test_an_endpoint_does_what_its_model_was_made_for(ask, pipelines):
    pair = {"text": TEXTS[0], "text_pair": TEXTS[1]}
    classify = pipelines["classify"]
    assert ask("/", {"inputs": TEXTS, "model": "classify"}).json() == classify(TEXTS, top_k=None)
    assert ask("/", {"inputs": TEXTS[0], "model": "classify"}).json() == classify([TEXTS[0]], top_k=None)[0]
    assert ask("/", {"inputs": [TEXTS[:2]], "model": "classify"}).json() == classify([pair], top_k=None)
    got = ask("/", {"inputs": TEXTS, "model": "embed"}).json()
    assert np.array_equal(np.array(got, np.float32), pipelines["embed"](TEXTS, normalize=True))
    assert "pairs" in ask("/", {"inputs": [TEXTS[:2]], "model": "embed"}).json()["error"]


def test_vllm(ask, pipelines):
    reply = ask("/classify", {"input": TEXTS, "model": "classify"}).json()
    for one, wanted in zip(reply["data"], pipelines["classify"](TEXTS, top_k=None), strict=True):
        assert one["label"] == wanted[0]["label"]
        assert sorted(one["probs"], reverse=True) == [answer["score"] for answer in wanted]
    ranked = {a["index"]: a["score"] for a in pipelines["rank"](TEXTS[0], TEXTS)}
    scores = ask("/score", {"text_1": TEXTS[0], "text_2": TEXTS, "model": "rank"}).json()["data"]
    assert [one["score"] for one in scores] == [ranked[i] for i in range(3)]
    paired = ask("/score", {"queries": TEXTS, "documents": TEXTS, "model": "rank"}).json()["data"]
    assert paired[0]["score"] == ranked[0]
    assert len(ask("/pooling", {"input": TEXTS}).json()["data"][1]["data"]) == len(
        pipelines["embed"].tokenizer(TEXTS[1]).input_ids
    )


@pytest.mark.parametrize("task", OPTIONS)
def test_every_task_has_a_route_with_its_options(ask, pipelines, task):
    item, options = EXAMPLES[task]
    name = {"sentence-embedding": "embed", "feature-extraction": "embed", "text-generation": "decode"}.get(task)
    name = name or next((n for n, p in pipelines.items() if p.task == task), None)
    reply = ask(f"/v1/tasks/{task}", {"inputs": item, "options": options})
    schema = ask("/openapi.json").json()
    known = schema["components"]["schemas"]["".join(map(str.capitalize, task.split("-"))) + "Options"]["properties"]
    assert set(options) <= set(known)
    if reply.status_code == 404:
        assert task == "zero-shot-classification"  # no model of these tests can do it
        return
    assert reply.status_code == 200, reply.text
    offline = next((p for p in pipelines.values() if p.task == task), None)
    if offline is not None:
        wanted = offline([item], **options)
        assert narrow(reply.json()["answers"]) == narrow(json.loads(json.dumps(wanted, default=lambda x: x.tolist())))


def test_models_and_tasks_are_listed(ask, pipelines):
    listed = ask("/v1/models").json()["data"]
    assert {one["id"] for one in listed} == set(pipelines)
    assert ask("/v1/models/rank").json()["max_model_len"] == 512
    found = ask("/v1/tasks").json()["tasks"]
    assert found["token-classification"]["models"] == ["tag"]
    assert "aggregation_strategy" in found["token-classification"]["options"]


@pytest.mark.parametrize("text", ["a" * 10_000_000, "<b>\x00é" * 1_000_000])
def test_ten_megabytes_are_refused_or_cut_at_once(ask, text):
    begun = time.monotonic()
    assert ask("/embed", {"inputs": text}).status_code == 422
    assert ask("/embed", {"inputs": text, "truncate": True}).status_code == 200
    assert time.monotonic() - begun < 15


def test_truncation_is_asked_for_and_said(ask):
    long = "word " * 2000
    refused = ask("/v1/embeddings", {"input": [long, "short"]})
    assert refused.status_code == 422
    assert "512" in refused.json()["error"]["message"]
    reply = ask("/v1/embeddings", {"input": [long, "short"], "truncate": True})
    assert reply.json()["truncated"] == 1
    assert reply.headers["x-truncated-texts"] == "1"
    assert float(re.search(r'truncated_texts_total{model="embed"} (\S+)', ask("/metrics").text)[1]) >= 1


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/v1/embeddings", {"input": []}, 422, "at least one"),
        ("/v1/embeddings", {"input": ""}, 422, "empty"),
        ("/v1/embeddings", {"input": [1, -1]}, 422, "-1"),
        ("/v1/embeddings", {"input": [[1] * 600]}, 422, "600"),
        ("/v1/embeddings", {"input": "a", "dimensions": 10**6}, 422, "48"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, 422, "encoding_format"),
        ("/v1/embeddings", {"input": ["a"] * 3000}, 413, "2048"),
        ("/v1/embeddings", {"input": "a", "model": "none"}, 404, "embed"),
        ("/v1/embeddings", {"input": "a", "model": "tag"}, 404, "embed"),
        ("/v1/embeddings", b"{", 422, "JSON"),
        ("/v1/embeddings", b'{"input": "a\\ud800"}', 422, ""),
        ("/v1/embeddings", b"x" * 17_000_000, 413, "16,000,000"),
        ("/rerank", {"query": "a"}, 422, "documents"),
        ("/rerank", {"query": "a", "documents": [{"title": "b"}]}, 422, "title"),
        ("/predict", {"inputs": [["a", "b", "c"]]}, 422, "pair"),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": []}}, 422, "sentences"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, 422, "text_2 3"),
        ("/decode", {"ids": [10**7]}, 422, "10000000"),
        ("/v1/tasks/fill-mask", {"inputs": "no mask"}, 422, "mask"),
        ("/v1/tasks/fill-mask", {"inputs": "[MASK]", "options": {"top": 1}}, 422, "top"),
        ("/v1/tasks/fill-mask", {"inputs": "[MASK]", "options": {"top_k": 0}}, 422, "at least 1"),
        ("/nothing", {}, 404, "/nothing"),
    ],
)
def test_wrong_requests_are_refused_in_the_words_of_their_api(ask, path, body, status, said):
    reply = ask(path, body)
    assert reply.status_code == status, reply.text
    found = reply.json()
    message = found["error"] if isinstance(found.get("error"), str) else found.get("error", found)["message"]
    assert said in message
    assert "Traceback" not in reply.text
    assert ask("/v1/models").status_code == 200
