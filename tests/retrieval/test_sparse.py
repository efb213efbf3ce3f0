"""Sparse vectors: sentence-transformers' numbers and folders, any batch the same bits, never all logits at once."""

import json
import math

import numpy as np
import pytest
import torch

from modernbert import SparseEncoder, SparseVector, Tokenizer, pipeline
from modernbert.errors import CheckpointError, InputError
from modernbert.pipelines import small_model
from modernbert.retrieval.sparse import SparseSettings
from tests.commands import called
from tests.conftest import DATA, model_of, padded_batch

TEXTS = ["Paris is the capital of France. " * 40, "a cat", "The dog ran across the road."]


@pytest.fixture(scope="module")
def masked_lm(tmp_path_factory, small_model_folder):
    """The small encoder, in a folder that transformers reads."""
    from modernbert import ModernBertForMaskedLM

    folder = tmp_path_factory.mktemp("masked-lm")
    ModernBertForMaskedLM.from_pretrained(small_model_folder, dtype="float32").save_pretrained(folder)
    Tokenizer.from_pretrained(small_model_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small_model_folder():
    return small_model()


@pytest.fixture(scope="module", params=["splade", "routed"])
def theirs(request, masked_lm, tmp_path_factory):
    """An encoder of sentence-transformers and its folder; "routed" has static weights for queries."""
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.base.modules import Router
    from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding, SpladePooling

    encoder = st.SparseEncoder(str(masked_lm), device="cpu", prompts={"query": "", "document": "passage: "})
    if request.param == "routed":
        weights = torch.rand(len(encoder.tokenizer.get_vocab()), generator=torch.Generator().manual_seed(0))
        static = SparseStaticEmbedding(encoder.tokenizer, weights)
        router = Router.for_query_document([static], [encoder[0], SpladePooling("max")])
        encoder = st.SparseEncoder(modules=[router], device="cpu", similarity_fn_name="dot")
    folder = tmp_path_factory.mktemp("theirs")
    encoder.save_pretrained(str(folder), create_model_card=False)
    return encoder, folder


def dense(encoder, ids, lengths):
    """The definition, from the logits of all tokens."""
    logits = encoder.model(input_ids=ids, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0)).logits
    weights = logits.relu().log1p()
    if encoder.settings.activation == "log1p_relu":
        weights = weights.log1p()
    pieces = weights.split(lengths)
    return torch.stack([p.amax(0) if encoder.settings.pooling == "max" else p.sum(0) for p in pieces])


def test_has_the_numbers_of_sentence_transformers(theirs):
    encoder, folder = theirs
    ours = pipeline(None, folder)
    assert ours.task == "sparse-embedding"
    for is_query, encode in ((False, encoder.encode_document), (True, encoder.encode_query)):
        expected = encode(TEXTS).to_dense().numpy()
        np.testing.assert_allclose(ours.csr(TEXTS, is_query=is_query).toarray(), expected, atol=1e-5)
        cut = encode(TEXTS, max_active_dims=7).to_dense().numpy()
        np.testing.assert_allclose(ours.csr(TEXTS, is_query=is_query, top_k=7).toarray(), cut, atol=1e-5)


def test_what_we_save_sentence_transformers_reads_and_we_read_again(theirs, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    ours = pipeline("sparse-embedding", theirs[1])
    ours.model.save_pretrained(tmp_path, ours.tokenizer)
    again, read = pipeline("sparse-embedding", tmp_path), st.SparseEncoder(str(tmp_path), device="cpu")
    assert again.model.settings == ours.model.settings
    for is_query, encode in ((False, read.encode_document), (True, read.encode_query)):
        expected = ours.csr(TEXTS, is_query=is_query).toarray()
        assert (again.csr(TEXTS, is_query=is_query).toarray() == expected).all()
        np.testing.assert_allclose(encode(TEXTS).to_dense().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("pooling", ["max", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimized", [False, True], ids=["plain", "optimized"])
def test_a_text_has_the_same_bits_in_any_batch(pooling, dtype, optimized):
    encoder = SparseEncoder(model_of("ModernBertForMaskedLM").to(dtype), SparseSettings(pooling=pooling)).eval()
    if optimized:
        encoder.optimize_for_inference()
    lengths = [300, 1, 128, 129, 7]
    ids, mask = padded_batch(lengths)
    with torch.no_grad():
        together = encoder(ids, mask)
        left, left_mask = padded_batch(lengths, side="left", more=3)
        assert torch.equal(encoder(left, left_mask), together)
        for row, length, weights in zip(ids, lengths, together, strict=True):
            assert torch.equal(encoder(row[None, :length])[0], weights)


@pytest.mark.parametrize("pooling", ["max", "sum"])
@pytest.mark.parametrize("activation", ["relu", "log1p_relu"])
def test_weights_and_gradients_are_those_of_the_definition(pooling, activation):
    encoder = SparseEncoder(model_of("ModernBertForMaskedLM"), SparseSettings(pooling=pooling, activation=activation))
    lengths = [150, 3]
    ids, mask = padded_batch(lengths)
    pull = torch.randn(2, encoder.dimensions)
    found = encoder(ids[mask == 1], cu_seqlens=torch.tensor([0, *lengths]).cumsum(0))
    (found * pull).sum().backward()
    gradients = [p.grad.clone() for p in encoder.parameters()]
    encoder.zero_grad()
    expected = dense(encoder, ids[mask == 1], lengths)
    (expected * pull).sum().backward()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for gradient, parameter in zip(gradients, encoder.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-5, rtol=1e-4)


def test_logits_of_all_tokens_are_never_held_together(monkeypatch):
    encoder = SparseEncoder(model_of("ModernBertForMaskedLM")).eval()
    rows = []
    score = encoder.model.score
    monkeypatch.setattr(encoder.model, "score", lambda x: rows.append(len(x)) or score(x))
    ids, mask = padded_batch([400, 60, 60, 2])
    with torch.no_grad():
        encoder(ids, mask)
    assert sum(rows) == 522
    assert max(rows) <= 128


def test_a_row_of_padding_alone_weighs_nothing():
    encoder = SparseEncoder(model_of("ModernBertForMaskedLM")).eval()
    ids, mask = padded_batch([3, 5, 2])
    mask[1] = 0
    with torch.no_grad():
        weights = encoder(ids, mask)
    assert (weights[1] == 0).all()
    assert (weights[[0, 2]] > 0).any(1).all()


def test_a_vector_holds_its_largest_weights_and_compares():
    row = torch.tensor([0.0, 3, 0, 1, 3, 2])
    whole, cut = SparseVector.of(row), SparseVector.of(row, top_k=2)
    assert whole.indices.tolist() == [1, 3, 4, 5]
    assert (cut.indices.tolist(), cut.values.tolist(), cut.dimensions, len(cut)) == ([1, 4], [3, 3], 6, 2)
    assert whole.dot(cut) == 18
    assert SparseVector.of(torch.zeros(6)).dot(whole) == 0


def test_answers_are_arrays_tokens_or_a_matrix(theirs):
    ours = pipeline("sparse-embedding", theirs[1], top_k=5)
    answer = ours(TEXTS[2])
    assert answer["indices"].dtype == np.int32
    assert (np.diff(answer["indices"]) > 0).all()
    tokens = ours(TEXTS[2], form="tokens")
    assert list(tokens.values()) == sorted(answer["values"].tolist(), reverse=True)
    assert set(tokens) == set(ours.tokenizer.convert_ids_to_tokens(answer["indices"].tolist()))
    assert ours.csr(TEXTS).shape == (3, ours.model.dimensions)


def test_static_weights_may_stand_token_by_token_in_a_file(theirs, tmp_path):
    ours = pipeline("sparse-embedding", theirs[1])
    if ours.model.static_V is None:
        ours.model.static_V = torch.nn.Parameter(torch.zeros(ours.model.dimensions))
    ours.model.save_pretrained(tmp_path, ours.tokenizer)
    part = next(tmp_path.glob("query_*"))
    (part / "model.safetensors").unlink()
    (part / "config.json").write_text(json.dumps({"path": "idf.json"}))
    (part / "idf.json").write_text(json.dumps({"Ġthe": 2.5}))
    assert pipeline("sparse-embedding", tmp_path)("in the city", is_query=True, form="tokens") == {"Ġthe": 2.5}
    (part / "idf.json").write_text(json.dumps({"no such token": 1}))
    with pytest.raises(CheckpointError, match="no such token"):
        SparseEncoder.from_pretrained(tmp_path)


def test_no_texts_and_tokens_without_a_static_weight(small_model_folder):
    from modernbert import AutoModelForMaskedLM, AutoTokenizer

    model = AutoModelForMaskedLM.from_pretrained(small_model_folder)
    encoder = SparseEncoder(model, None, torch.ones(10)).eval()
    assert encoder(torch.zeros(0, 3, dtype=torch.long)).shape == (0, encoder.dimensions)
    asked = pipeline("sparse-embedding", encoder, AutoTokenizer.from_pretrained(small_model_folder))
    with pytest.raises(InputError, match=r"a query has the token [0-9]+; there are static weights of 10"):
        asked("in the city", is_query=True)


def test_texts_get_as_many_entries_as_are_asked_for_and_probabilities_stay(small_model_folder):
    from modernbert import AutoModelForMaskedLM, AutoTokenizer

    model = AutoModelForMaskedLM.from_pretrained(small_model_folder, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(small_model_folder)
    encoder = SparseEncoder(model).eval()
    rows = tokenizer(TEXTS)["input_ids"]
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = model(ids).logits
        assert (encoder(ids) > 0).float().mean() > 0.5  # logits of a masked language model have no natural zero
        constant = encoder.thin_out(rows, 100)
        after = model(ids).logits
        entries = [int((encoder(torch.tensor([row])) > 0).sum()) for row in rows]
        assert encoder.thin_out(rows, 1000) == 0  # they have fewer already
    assert constant > 0
    assert sum(entries) == 100 * len(rows)
    torch.testing.assert_close(after.softmax(-1), before.softmax(-1), rtol=0, atol=1e-6)
    torch.testing.assert_close(after, before - constant)


def test_other_folders_are_refused_in_a_line(theirs, tmp_path, small_model_folder):
    ours = pipeline("sparse-embedding", theirs[1])
    for task in ("sentence-embedding", "text-ranking"):
        with pytest.raises(CheckpointError, match=r"is a sparse encoder; load it by SparseEncoder"):
            pipeline(task, theirs[1])
    from modernbert import AutoModel, SentenceEncoder

    SentenceEncoder(AutoModel.from_pretrained(small_model_folder)).save_pretrained(tmp_path / "dense")
    with pytest.raises(CheckpointError, match="is a sentence encoder, and has no sparse vectors"):
        SparseEncoder.from_pretrained(tmp_path / "dense")
    with pytest.raises(InputError, match=r"prompt_name is 'x'; the checkpoint has"):
        ours("a", prompt_name="x")
    with pytest.raises(InputError, match="prompt and prompt_name are given"):
        ours("a", prompt_name="x", prompt="y")
    with pytest.raises(InputError, match=r"form is 'csr'; choose"):
        ours("a", form="csr")
    ours.model.save_pretrained(tmp_path / "sparse", ours.tokenizer)
    pooling = next((tmp_path / "sparse").glob("*SpladePooling")) / "config.json"
    pooling.write_text(json.dumps({"pooling_strategy": "mean"}))
    with pytest.raises(CheckpointError, match=r"pooling is 'mean'; choose"):
        SparseEncoder.from_pretrained(tmp_path / "sparse")


def test_the_command_line_writes_entries_and_weights(theirs, tmp_path, capsys):
    output = tmp_path / "sparse.jsonl"
    arguments = ["--task", "sparse-embedding", "--model", str(theirs[1]), "--top-k", "3"]
    assert called(capsys, "run", *arguments, "--output", output, *TEXTS[1:])[0] == 0
    expected = pipeline("sparse-embedding", theirs[1])(TEXTS[1:], top_k=3)
    for line, answer in zip(output.read_text().splitlines(), expected, strict=True):
        written = json.loads(line)["output"]
        assert written["indices"] == answer["indices"].tolist()
        assert all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(written["values"], answer["values"], strict=True))


def test_real_questions_rank_real_paragraphs_as_by_sentence_transformers():
    peers = pytest.importorskip("sentence_transformers")
    path = DATA / "question_answering" / "squad-v1-dev.json"
    if not path.is_file():
        pytest.skip("needs ../shared/data")
    articles = json.loads(path.read_text(encoding="utf-8"))["data"]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]][::5]
    documents, questions = [p["context"] for p in paragraphs], [p["qas"][0]["question"] for p in paragraphs]
    ours = pipeline("sparse-embedding")  # the package's trained one
    theirs = peers.SparseEncoder(str(small_model("sparse-encoder")), device="cpu").float()
    mine = [ours.csr(texts, is_query=query).toarray() for texts, query in ((questions, True), (documents, False))]
    other = [theirs.encode_query(questions).to_dense().numpy(), theirs.encode_document(documents).to_dense().numpy()]
    for one, two in zip(mine, other, strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-5 * two.max())
    scores, wanted = (queries @ texts.T for queries, texts in (mine, other))
    np.testing.assert_allclose(scores, wanted, rtol=0, atol=1e-4)
    for own, right in zip(scores, wanted, strict=True):
        order = np.argsort(-own, kind="stable")
        assert (np.diff(right[order]) <= 1e-4).all()  # but for ties
