"""sentence-embedding and text-ranking: sentence-transformers' numbers on its own folders; chunks, tokens, prompts."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer import modules as models

import modernbert
from modernbert import SentenceEncoder, maxsim, pipeline
from modernbert.errors import CheckpointError, InputError
from modernbert.pipelines import small_model
from modernbert.text.tokenizer import Tokenizer
from tests.hub_server import write_cache

pytestmark = pytest.mark.filterwarnings("ignore")  # sentence-transformers deprecates its own older names

TEXTS = [
    "How do I top up my card?",
    "The dog ran across the road, and then it came back again to look for its master.",
    "Yes.",
    "A text with “quotes”, Ångström and 42 numbers.",
    "It was a long winter. " * 30,
]
# Modes of the library and ours.
MODES = {name: name for name in ("cls", "mean", "max")}
MODES |= {"lasttoken": "last", "weightedmean": "weighted_mean", "mean_sqrt_len_tokens": "mean_sqrt_len"}


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    """A bare encoder in float32, with large enough weights, and the small model's tokenizer."""
    folder = tmp_path_factory.mktemp("body")
    config = modernbert.AutoConfig.from_pretrained(small_model()).replace(
        hidden_size=48, intermediate_size=64, num_attention_heads=3, initializer_range=0.2
    )
    torch.manual_seed(0)
    modernbert.ModernBertModel(config).save_pretrained(folder)
    Tokenizer.from_pretrained(small_model()).save_pretrained(folder)
    return folder


def library(body, mode="mean", dense=None, normalize=False, include_prompt=True, **options):
    """A model of sentence-transformers on this body."""
    transformer = models.Transformer(str(body), max_seq_length=64)
    parts = [transformer, models.Pooling(48, mode, include_prompt=include_prompt)]
    torch.manual_seed(2)
    if dense is not None:
        parts.append(models.Dense(48 * (1 if isinstance(mode, str) else len(mode)), 16, activation_function=dense))
    if normalize:
        parts.append(models.Normalize())
    return SentenceTransformer(modules=parts, device="cpu", **options)


@pytest.mark.parametrize("mode", [*MODES, ("cls", "mean")], ids=str)
@pytest.mark.parametrize(
    ("dense", "normalize"), [(None, False), (None, True), (torch.nn.Tanh(), False), (torch.nn.Identity(), True)]
)
def test_folders_of_sentence_transformers_give_its_numbers(body, tmp_path, mode, dense, normalize):
    theirs = library(body, mode, dense, normalize)
    theirs.save(str(tmp_path))
    ours = pipeline("sentence-embedding", tmp_path)
    assert ours.context == 64  # the last text is longer, and cut
    np.testing.assert_allclose(ours(TEXTS), theirs.encode(TEXTS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("mode", ["cls", "mean", "weightedmean"])
def test_prompts(body, tmp_path, include_prompt, mode):
    prompts = {"query": "find this: ", "document": "text "}
    theirs = library(body, mode, include_prompt=include_prompt, prompts=prompts, default_prompt_name="document")
    theirs.save(str(tmp_path))
    ours = pipeline("sentence-embedding", tmp_path)
    for options in ({}, {"prompt_name": "query"}, {"prompt": "Represent: "}):
        np.testing.assert_allclose(ours(TEXTS, **options), theirs.encode(TEXTS, **options), rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="prompt_name is 'title'; the checkpoint has document, query"):
        ours("x", prompt_name="title")


@pytest.mark.parametrize("normalize", [True, False])
def test_truncated_dimensions(body, tmp_path, normalize):
    theirs = library(body, "mean", torch.nn.Identity(), normalize=True)
    theirs.save(str(tmp_path))
    ours = pipeline("sentence-embedding", tmp_path)(TEXTS, truncate_dim=7, normalize=normalize)
    assert ours.shape == (5, 7)
    theirs.truncate_dim = 7
    np.testing.assert_allclose(ours, theirs.encode(TEXTS, normalize_embeddings=normalize), rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="truncate_dim is 17; vectors have 16 dimensions"):
        pipeline("sentence-embedding", tmp_path)("x", truncate_dim=17)


def test_folders_of_older_releases(body, tmp_path):
    """Older spellings: one key a pooling, the longest text in a file of its own, other module paths."""
    theirs = library(body, ("cls", "mean"), torch.nn.Tanh(), normalize=True)
    theirs.save(str(tmp_path))
    expected = pipeline("sentence-embedding", tmp_path)(TEXTS)
    pooling = {"word_embedding_dimension": 48, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    names = ["Transformer", "Pooling", "Dense", "Normalize"]
    paths = ["", "1_Pooling", "2_Dense", "3_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (name, path) in enumerate(zip(names, paths, strict=True))
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64, "do_lower_case": False}))
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"__version__": {}}))
    (tmp_path / "3_Normalize" / "config.json").unlink()
    assert np.array_equal(pipeline("sentence-embedding", tmp_path)(TEXTS), expected)
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 16}))
    assert pipeline("sentence-embedding", tmp_path).context == 16


@pytest.mark.parametrize("mode", ["mean", ("cls", "mean"), ("mean", "cls")], ids=str)
def test_what_we_save_loads_here_and_there(body, tmp_path, mode):
    theirs = library(body, mode, torch.nn.Tanh(), normalize=True, prompts={"query": "q: "})
    theirs.save(str(tmp_path / "theirs"))
    encoder = SentenceEncoder.from_pretrained(tmp_path / "theirs")
    encoder.save_pretrained(tmp_path / "ours")
    Tokenizer.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    expected = theirs.encode(TEXTS, prompt_name="query")
    again = SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    np.testing.assert_allclose(again.encode(TEXTS, prompt_name="query"), expected, rtol=0, atol=1e-6)
    ours = pipeline("sentence-embedding", tmp_path / "ours")(TEXTS, prompt_name="query")
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_unknown_parts_are_named(body, tmp_path):
    library(body).save(str(tmp_path))
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules.append({"idx": 2, "name": "2", "path": "2_LSTM", "type": "sentence_transformers.models.LSTM"})
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match=r"2_LSTM is a LSTM; known are Transformer, Pooling, Dense"):
        pipeline("sentence-embedding", tmp_path)


def test_an_activation_outside_of_the_list_is_refused_and_never_imported(body, tmp_path):
    library(body, dense=torch.nn.Tanh()).save(str(tmp_path))
    path = tmp_path / "2_Dense" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "activation_function": "os.system"}))
    with pytest.raises(CheckpointError, match=r"names the activation 'os\.system'"):
        SentenceEncoder.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def ours(body):
    return pipeline("sentence-embedding", body)


def test_a_bare_body_is_pooled_by_the_mean_as_there(body, ours):
    theirs = SentenceTransformer(str(body), device="cpu")
    np.testing.assert_allclose(ours(TEXTS), theirs.encode(TEXTS), rtol=0, atol=1e-5)
    for there, here in MODES.items():
        expected = library(body, there).encode(TEXTS[:4])
        np.testing.assert_allclose(ours(TEXTS[:4], pooling=here), expected, rtol=0, atol=1e-5)
    unit = ours(TEXTS, normalize=True)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-6)


def test_late_chunking_pools_states_of_the_whole_text(ours, body):
    text = TEXTS[1]
    cut = text.index(",") + 1
    spans = [(0, cut), (cut, len(text)), (4, 7), (0, len(text))]
    vectors = ours({"text": text, "spans": spans})
    assert vectors.shape == (4, 48)
    tokenizer, model = ours.tokenizer, modernbert.AutoModel.from_pretrained(body)
    batch = tokenizer(text, return_offsets_mapping=True, return_tensors="pt")
    states = model(batch.input_ids).last_hidden_state[0].detach().numpy()
    for (start, end), vector in zip(spans, vectors, strict=True):
        inside = [i for i, (a, b) in enumerate(batch.offset_mapping[0].tolist()) if a < end and b > start]
        np.testing.assert_allclose(vector, states[inside].mean(0), rtol=0, atol=1e-5)
    assert np.array_equal(ours({"text": text, "spans": spans}, pooling="cls"), vectors)
    mixed = ours([{"text": text, "spans": spans}, "Another text."], pooling="cls")
    assert np.array_equal(mixed[0], vectors)
    assert np.array_equal(mixed[1], ours("Another text.", pooling="cls"))
    np.testing.assert_allclose(ours({"text": text, "spans": [(4, 7)]}, prompt="query: ")[0].shape, vectors[2].shape)
    for spans in ([], [(3, 3)], [(0, 500)], [(-1, 4)], "all", [(1.0, 2.0)]):
        with pytest.raises(InputError, match="spans"):
            ours({"text": text, "spans": spans})


def test_vectors_of_tokens_and_maxsim(ours):
    query, document = ours(["a red dog", TEXTS[1]], multi_vector=True)
    assert query.shape == (len(ours.tokenizer("a red dog").input_ids), 48)
    np.testing.assert_allclose(np.linalg.norm(document, axis=1), 1, rtol=1e-6)
    expected = sum(max(float(np.dot(q, d)) for d in document) for q in query)
    assert maxsim(query, document) == pytest.approx(expected, rel=1e-5)
    raw = ours("a red dog", multi_vector=True, normalize=False)
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), query, rtol=0, atol=1e-6)


def test_a_layout_without_pooling_keeps_vectors_of_tokens(body, tmp_path):
    library(body).save(str(tmp_path))
    dense = {"in_features": 48, "out_features": 8, "bias": False}
    dense["activation_function"] = "torch.nn.modules.linear.Identity"
    (tmp_path / "1_Dense").mkdir()
    (tmp_path / "1_Dense" / "config.json").write_text(json.dumps(dense))
    save_file({"linear.weight": torch.randn(8, 48)}, tmp_path / "1_Dense" / "model.safetensors")
    modules = json.loads((tmp_path / "modules.json").read_text())[:1]
    modules.append({"idx": 1, "name": "1", "path": "1_Dense", "type": "pylate.models.Dense.Dense"})
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    embed = pipeline("sentence-embedding", tmp_path)
    query, *documents = embed(["a red dog", *TEXTS[:3]])
    assert query.shape[1] == 8
    ranked = pipeline("text-ranking", tmp_path)(query="a red dog", documents=TEXTS[:3])
    assert {r["index"]: r["score"] for r in ranked} == {i: maxsim(query, d) for i, d in enumerate(documents)}


# Ranking


@pytest.fixture(scope="module")
def cross(body, tmp_path_factory):
    """A cross-encoder of the library's, saved by it."""
    folder = tmp_path_factory.mktemp("cross")
    torch.manual_seed(5)
    config = modernbert.AutoConfig.from_pretrained(body).replace(num_labels=1)
    model = modernbert.ModernBertForSequenceClassification(config)
    model.model.load_state_dict(modernbert.AutoModel.from_pretrained(body).state_dict())
    model.save_pretrained(folder / "plain")
    Tokenizer.from_pretrained(body).save_pretrained(folder / "plain")
    CrossEncoder(str(folder / "plain"), device="cpu", max_length=64).save_pretrained(str(folder / "there"))
    return folder / "there"


@pytest.mark.parametrize("activation", [None, "torch.nn.modules.linear.Identity"])
@pytest.mark.parametrize("where", ["today", "config", "oldest"])
def test_cross_encoders_give_the_librarys_scores(cross, tmp_path, activation, where):
    shutil.copytree(cross, tmp_path / "cross")
    folder = tmp_path / "cross"
    path, key = (folder / "config_sentence_transformers.json"), "activation_fn"
    about = json.loads(path.read_text())
    config = json.loads((folder / "config.json").read_text())
    named = activation or "torch.nn.modules.activation.Sigmoid"
    if where == "today":
        about[key] = named
    else:
        del about[key]
        older = {"sentence_transformers": {"activation_fn": named, "version": "4.1.0"}}
        config |= older if where == "config" else {"sbert_ce_default_activation_function": named}
    path.write_text(json.dumps(about))
    (folder / "config.json").write_text(json.dumps(config))
    theirs = CrossEncoder(str(folder), device="cpu")
    query = "Where is my card?"
    expected = theirs.predict([(query, text) for text in TEXTS])
    ours = pipeline("text-ranking", folder)(query=query, documents=TEXTS)
    assert [r["index"] for r in ours] == list(np.argsort(-expected))
    np.testing.assert_allclose([r["score"] for r in ours], sorted(expected, reverse=True), rtol=0, atol=1e-5)
    rank = theirs.rank(query, TEXTS, top_k=2)
    best = pipeline("text-ranking", folder, top_k=2)({"query": query, "documents": TEXTS})
    assert [r["index"] for r in best] == [r["corpus_id"] for r in rank]
    assert best[0]["text"] == TEXTS[best[0]["index"]]


def test_cross_encoders_put_their_prompt_before_the_query(cross, tmp_path):
    theirs = CrossEncoder(str(cross), device="cpu", prompts={"web": "query: "}, default_prompt_name="web")
    theirs.save_pretrained(str(tmp_path))
    expected = theirs.predict([("Where is it?", text) for text in TEXTS])
    ranked = pipeline("text-ranking", tmp_path)(query="Where is it?", documents=TEXTS)
    np.testing.assert_allclose([r["score"] for r in ranked], sorted(expected, reverse=True), rtol=0, atol=1e-5)
    plain = theirs.predict([("Where is it?", text) for text in TEXTS], prompt="")
    ranked = pipeline("text-ranking", tmp_path)(query="Where is it?", documents=TEXTS, prompt="")
    np.testing.assert_allclose([r["score"] for r in ranked], sorted(plain, reverse=True), rtol=0, atol=1e-5)


def test_equal_documents_have_equal_scores_and_keep_their_order(body):
    rank = pipeline("text-ranking", body)
    ranked = rank(query="a", documents=["b", "c", "b", "b"])
    scores = {r["index"]: r["score"] for r in ranked}
    assert scores[0] == scores[2] == scores[3]
    assert [r["index"] for r in ranked if r["text"] == "b"] == [0, 2, 3]
    assert rank(query="a", documents=["b"])[0]["score"] == scores[0]


def test_a_layout_does_not_lead_out_of_its_folder(body, tmp_path):
    library(body).save(str(tmp_path / "inside"))
    modules = json.loads((tmp_path / "inside" / "modules.json").read_text())
    modules[0]["path"] = "../outside"
    (tmp_path / "inside" / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match=r"names the folder '../outside', which lies outside"):
        pipeline("sentence-embedding", tmp_path / "inside")


def test_ranking_many_queries_keeps_their_order(cross):
    rank = pipeline("text-ranking", cross)
    items = [{"query": f"question {i}", "documents": random.Random(i).sample(TEXTS, 1 + i % 4)} for i in range(9)]
    assert rank(items) == [rank(item) for item in items]
    raw = rank(items[3], activation="none")
    assert [r["index"] for r in raw] == [r["index"] for r in rank(items[3])]
    sigmoid = 1 / (1 + np.exp(-np.array([r["score"] for r in raw])))
    np.testing.assert_allclose(sigmoid, [r["score"] for r in rank(items[3])], atol=1e-6)


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean", "manhattan"])
def test_ranking_by_vectors(body, tmp_path, similarity):
    prompts = {"query": "query: ", "document": "passage: "}
    theirs = library(body, prompts=prompts, similarity_fn_name=similarity)
    theirs.save(str(tmp_path))
    expected = theirs.similarity(
        theirs.encode("red dog", prompt_name="query"), theirs.encode(TEXTS, prompt_name="document")
    )[0]
    ranked = pipeline("text-ranking", tmp_path)(query="red dog", documents=TEXTS)
    assert [r["index"] for r in ranked] == expected.argsort(descending=True).tolist()
    np.testing.assert_allclose(
        [r["score"] for r in ranked], expected.sort(descending=True).values, rtol=1e-5, atol=1e-5
    )


def test_models_of_the_wrong_kind_are_refused(body, cross, ours):
    config = modernbert.AutoConfig.from_pretrained(body).replace(num_labels=3)
    classifier = modernbert.ModernBertForSequenceClassification(config)
    for task, message in (
        ("text-ranking", "text-ranking needs a classifier with one label; this one has 3"),
        ("sentence-embedding", "sentence-embedding needs an encoder without a head"),
    ):
        with pytest.raises(InputError, match=message):
            pipeline(task, classifier, ours.tokenizer)
    with pytest.raises(InputError, match="documents is \\[\\]"):
        pipeline("text-ranking", cross)(query="a", documents=[])
    with pytest.raises(InputError, match="a document is an int"):
        pipeline("text-ranking", cross)(query="a", documents=[3])


@pytest.mark.parametrize("inner", ["", "0_Transformer"])
def test_a_layout_loads_from_the_hubs_cache(body, tmp_path, inner):
    theirs = library(body, "cls", torch.nn.Tanh(), normalize=True, prompts={"query": "q: "})
    theirs.save(str(tmp_path / "there"))
    files = {
        str(path.relative_to(tmp_path / "there")): path.read_bytes()
        for path in (tmp_path / "there").rglob("*")
        if path.is_file()
    }
    if inner:  # how folders of the first releases look
        of_encoder = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
        moved = {name: f"{inner}/{name}" for name in (*of_encoder, "sentence_bert_config.json")}
        files = {moved.get(name, name): content for name, content in files.items()}
        modules = json.loads(files["modules.json"])
        modules[0]["path"] = inner
        files["modules.json"] = json.dumps(modules).encode()
    write_cache(tmp_path / "cache", "someone/embedder", files)
    where = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    ours = pipeline("sentence-embedding", "someone/embedder", **where)
    expected = theirs.encode(TEXTS, prompt_name="query")
    np.testing.assert_allclose(ours(TEXTS, prompt_name="query"), expected, rtol=0, atol=1e-5)


def test_encode_gives_the_vectors_of_a_call_under_sentence_transformers_name(body):
    theirs = library(body)
    theirs.save(str(folder := body.parent / "encode-layout"))
    ours = pipeline("sentence-embedding", folder)
    np.testing.assert_array_equal(ours.encode("red dog"), ours("red dog"))
    np.testing.assert_allclose(ours.encode(TEXTS), theirs.encode(TEXTS), rtol=0, atol=1e-5)
    expected = theirs.encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(
        ours.encode(TEXTS, normalize_embeddings=True, show_progress_bar=False), expected, rtol=0, atol=1e-5
    )
    with pytest.raises(InputError, match=r"takes ids, not texts.*pipeline\('sentence-embedding', folder\)"):
        ours.model.encode("red dog")


def test_encode_takes_what_the_library_takes_and_gives_its_shapes(body):
    theirs, ours = library(body), pipeline("sentence-embedding", body)
    few = ["A dog.", "Two cats ran."]
    arguments = [
        {"batch_size": 32, "convert_to_numpy": True},
        {"convert_to_numpy": False},
        {"convert_to_tensor": True},
        {"convert_to_tensor": True, "convert_to_numpy": True},
        {"show_progress_bar": False, "device": "cpu", "precision": "float32"},
    ]
    column = pytest.importorskip("pandas").Series(few, index=[7, 3])
    for given in arguments:
        for texts in (few, few[0], np.array(few), tuple(few), column, iter(few)):
            got, wanted = ours.encode(texts, **given), theirs.encode(few[0] if texts is few[0] else few, **given)
            assert type(got) is type(wanted), given
            assert [type(v) for v in got] == [type(v) for v in wanted]
            for one, other in zip(got, wanted, strict=True):
                np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=1e-5)
    assert np.array_equal(ours.encode(few, batch_size=1), ours(few))


def test_encode_of_no_texts(body):
    embed = pipeline("sentence-embedding", body)
    assert embed.encode([]).shape == (0, 48)
    assert embed.encode(np.array([]), truncate_dim=8).shape == (0, 8)
    assert embed.encode([], convert_to_tensor=True).shape == (0, 48)
    assert embed.encode([], convert_to_numpy=False) == []
    assert embed.encode([], multi_vector=True) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool_size": 3}, "encode has no option pool_size; there are .*prompt_name, .*convert_to_tensor, "),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"device": "meta"}, "device is 'meta', and the model is on cpu"),
        ({"device": ["cpu", "cpu"]}, "and the model is on cpu"),
        ({"precision": "int8"}, "precision is 'int8'; choose float32"),
        ({"output_value": "token_embeddings"}, "multi_vector=True for tokens"),
        ({"convert_to_tensor": "yes"}, "convert_to_tensor is 'yes'"),
    ],
)
def test_what_encode_does_not_serve_is_refused_by_name(body, options, message):
    with pytest.raises(InputError, match=message):
        pipeline("sentence-embedding", body).encode(["a"], **options)


def test_encode_refuses_a_table(ours):
    with pytest.raises(InputError, match="a table with the columns text"):
        ours.encode(pytest.importorskip("pandas").DataFrame({"text": ["a"]}))
