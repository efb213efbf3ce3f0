"""Late interaction: the vectors and scores of sentence-transformers, its folders and those of PyLate and Stanford."""

import json
import random
import re
import string

import numpy as np
import pytest
import torch

from modernbert import ModernBertModel, MultiVectorEncoder, MultiVectorSettings, Tokenizer, maxsim, pipeline
from modernbert.errors import CheckpointError, ConfigError, InputError
from modernbert.models.sentence_encoder import Dense, Normalize
from modernbert.nn.packing import PackedInputs
from modernbert.pipelines import small_model
from modernbert.retrieval.multi_vector import Expansion
from tests.commands import called
from tests.conftest import model_of

st = pytest.importorskip("sentence_transformers")
if not hasattr(st, "MultiVectorEncoder"):
    pytest.skip("sentence-transformers 6 has MultiVectorEncoder", allow_module_level=True)

_WORDS = "the dog ran, across a road! while seven old friends of hers were singing songs (and others). Paris is"
_LONG = " ".join(random.Random(0).choices(_WORDS.split(), k=120))
TEXTS = [_LONG, "a cat.", "Paris is the capital of France."]
# What each folder says; all are saved by sentence-transformers.
KINDS = {
    "plain": {},
    "expanded": {
        "query_expansion": {"strategy": "fixed", "attend": False, "length": 32},
        "document_length": 64,
        "skiplist_words": list(string.punctuation),
    },
    "attended": {"query_expansion": {"strategy": "fixed", "attend": True, "length": 16}, "pool_factor": 2},
    "far beyond": {"query_expansion": {"strategy": "fixed", "attend": False, "length": 100}},
    "at least": {"query_expansion": {"strategy": "min", "attend": False, "length": 12}, "query_length": 40},
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """An encoder of sentence-transformers of each kind, by name, and its folder."""
    from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling

    body = tmp_path_factory.mktemp("body")
    ModernBertModel.from_pretrained(small_model(), dtype="float32").save_pretrained(body)
    Tokenizer.from_pretrained(small_model()).save_pretrained(body)
    made = {}
    for kind, says in KINDS.items():
        torch.manual_seed(0)
        encoder = st.MultiVectorEncoder(str(body), device="cpu", prompts={"query": "[Q] ", "document": "[D] "})
        for name in ("query_length", "document_length", "query_expansion"):
            if name in says:
                setattr(encoder[0], name, says[name])
        encoder[2].skiplist_words = says.get("skiplist_words", [])
        encoder[2].resolve_with_tokenizer(encoder.tokenizer)
        if "pool_factor" in says:
            encoder.append(HierarchicalTokenPooling(says["pool_factor"]))
        folder = tmp_path_factory.mktemp("theirs")
        encoder.save_pretrained(str(folder), create_model_card=False)
        made[kind] = encoder, folder
    return made


def encoded(encoder, texts, is_query):
    """What sentence-transformers gives."""
    return (encoder.encode_query if is_query else encoder.encode_document)(texts, convert_to_numpy=True)


@pytest.mark.parametrize("kind", KINDS)
def test_has_the_numbers_of_sentence_transformers(theirs, kind):
    encoder, folder = theirs[kind]
    ours = pipeline(None, folder)
    assert ours.task == "late-interaction"
    found = [ours(TEXTS, is_query=is_query) for is_query in (True, False)]
    for is_query, vectors in zip((True, False), found, strict=True):
        expected = encoded(encoder, TEXTS, is_query)
        assert [x.shape for x in vectors] == [x.shape for x in expected]
        for x, y in zip(vectors, expected, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5)
        for text, vector in zip(TEXTS, vectors, strict=True):
            assert (ours(text, is_query=is_query) == vector).all(), "alone it has other bits"
    queries, documents = found
    scores = encoder.similarity(*([torch.from_numpy(x) for x in side] for side in found)).numpy()
    np.testing.assert_allclose(ours.similarity(queries, documents), scores, rtol=1e-5)
    ranked = pipeline("text-ranking", folder)(TEXTS[2], TEXTS)
    expected = encoder.similarity(encoder.encode_query(TEXTS[2:]), encoder.encode_document(TEXTS))[0]
    np.testing.assert_allclose([r["score"] for r in ranked], sorted(expected.tolist(), reverse=True), rtol=1e-5)
    assert ranked[0]["index"] == int(expected.argmax())


@pytest.mark.parametrize("layout", ["sentence-transformers", "pylate", "stanford"])
@pytest.mark.parametrize("kind", KINDS)
def test_folders_of_every_layout_are_read_as_they_were_meant(theirs, tmp_path, kind, layout):
    ours = pipeline("late-interaction", theirs[kind][1])
    if layout == "stanford" or (layout == "pylate" and kind in ("attended", "at least")):
        with pytest.raises(InputError, match=f"the layout of {layout}"):
            ours.model.save_pretrained(tmp_path, layout)
        assert not any(tmp_path.iterdir())
        return
    ours.model.save_pretrained(tmp_path, layout)
    ours.tokenizer.save_pretrained(tmp_path)
    again, read = pipeline(None, tmp_path), st.MultiVectorEncoder(str(tmp_path), device="cpu")
    for is_query in (True, False):
        vectors = ours(TEXTS, is_query=is_query)
        theirs_now = encoded(read, TEXTS, is_query)
        for x, y, z in zip(vectors, again(TEXTS, is_query=is_query), theirs_now, strict=True):
            assert (x == y).all()
            np.testing.assert_allclose(x, z, atol=1e-5)


@pytest.mark.parametrize("layout", ["sentence-transformers", "pylate", "stanford"])
@pytest.mark.parametrize("says_so", ["the settings", "the tokenizer"])
def test_a_single_token_before_texts_is_one_where_the_folder_means_one(tmp_path, layout, says_so):
    prompts = {"query": "[Q] ", "document": "[D] "}
    tokenizer = Tokenizer.from_pretrained(small_model())
    tokenizer.add_tokens(list(prompts.values()))
    tokenizer.pad_token = tokenizer.mask_token  # as PyLate leaves it
    model = ModernBertModel.from_pretrained(small_model(), dtype="float32")
    model.resize_token_embeddings(len(tokenizer))
    prefixes = tuple(prompts.values()) if says_so == "the settings" else ()
    encoder = MultiVectorEncoder(model, MultiVectorSettings(prompts=prompts, prefixes=prefixes, expansion=Expansion(8)))
    encoder.save_pretrained(tmp_path, layout, tokenizer)
    made, ours = pipeline("late-interaction", encoder.eval(), tokenizer), pipeline("late-interaction", tmp_path)
    assert ours.tokenizer("[Q] a cat").input_ids[1] == tokenizer.convert_tokens_to_ids("[Q] ")
    assert ours.tokenizer.pad_token == ("[PAD]" if layout == "stanford" else "[MASK]")
    about = json.loads((tmp_path / ("artifact.metadata" if layout == "stanford" else "config.json")).read_text())
    assert layout != "stanford" or about["query_token_id"] == "[Q] "
    read = None if layout == "stanford" else st.MultiVectorEncoder(str(tmp_path), device="cpu")
    for is_query in (True, False):
        # sentence-transformers puts a space after the token of Stanford's folders, which this tokenizer counts.
        for library in (made, read):
            if library is not None:
                expected = made(TEXTS, is_query=is_query) if library is made else encoded(read, TEXTS, is_query)
                for x, y in zip(ours(TEXTS, is_query=is_query), expected, strict=True):
                    np.testing.assert_allclose(x, y, atol=1e-5)


def test_settings_that_another_library_has_no_word_for_are_refused(tmp_path):
    model = ModernBertModel.from_pretrained(small_model(), dtype="float32")
    tokens = {"prompts": {"query": "[unused0]", "document": "[unused1]"}, "prefixes": ("[unused0]", "[unused1]")}
    expanded = tokens | {"expansion": Expansion(8), "skipped_words": tuple(string.punctuation)}
    for layout, says, what in (
        ("pylate", {"similarity": "meanmaxsim"}, "similarity meanmaxsim"),
        ("pylate", {"skipped_words": ("the",), "skipped_in": ("query",)}, "words that are skipped in query"),
        ("pylate", {"expansion": Expansion(8, False)}, "query expansion that is not to a fixed length"),
        ("stanford", {"pool_factor": 2}, "pool_factor"),
        ("stanford", {"expansion": None}, "queries that are not made longer"),
        ("stanford", {"skipped_words": ("the",)}, "skipped words but punctuation"),
        ("stanford", {"prompts": {"query": "[unused0]"}}, "prompt '' of a document, which must be one token"),
        ("stanford", {"prompts": {"query": "a ", "document": "[unused1]"}}, "prompt 'a ' of a query, which must be"),
    ):
        encoder = MultiVectorEncoder(model, MultiVectorSettings(**expanded | says))
        with pytest.raises(InputError, match=f"the layout of {layout} has no {re.escape(what)}"):
            encoder.save_pretrained(tmp_path, layout)
    assert not any(tmp_path.iterdir())
    MultiVectorEncoder(model, MultiVectorSettings(**expanded)).save_pretrained(tmp_path, "stanford")


@pytest.mark.parametrize("optimized", [False, True], ids=["plain", "optimized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_that_nobody_sees_change_nothing_for_the_others(dtype, optimized):
    encoder = MultiVectorEncoder(model_of("ModernBertModel").to(dtype)).eval()
    if optimized:
        encoder.optimize_for_inference()
    rows = [[3, 4, 5], [6, 7, 8, 9, 10, 11, 12], list(range(3, 43))]
    longer = [row + [80] * (48 - len(row)) for row in rows]
    with torch.no_grad():
        together = encoder.token_vectors(PackedInputs.of_rows(longer), list(map(len, rows))).split(48)
        alone = encoder.token_vectors(PackedInputs.of_rows(rows), list(map(len, rows))).split(list(map(len, rows)))
        usual = encoder.token_vectors(PackedInputs.of_rows(rows)).split(list(map(len, rows)))
        for row, x, y, z in zip(longer, together, alone, usual, strict=True):
            single = encoder.token_vectors(PackedInputs.of_rows([row]), [len(y)])
            assert torch.equal(x, single)
            tolerance = 1e-5 if dtype == torch.float32 else 0.05
            torch.testing.assert_close(x[: len(y)], y, atol=tolerance, rtol=0)
            torch.testing.assert_close(y, z, atol=tolerance, rtol=0)
            assert torch.isfinite(x.float()).all()


def test_under_autocast_a_projection_and_lengths_are_computed_in_float32():
    """MaxSim adds up 32 cosines, and vectors rounded to bfloat16 are longer or shorter than one by up to 0.3 %."""
    encoder = MultiVectorEncoder(model_of("ModernBertModel")).eval()
    packed = PackedInputs.of_rows([list(range(3, 43)), [3, 4, 5]])
    with torch.no_grad():
        plain = encoder.token_vectors(packed)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            vectors = encoder.token_vectors(packed)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)), atol=1e-6, rtol=0)
    assert 0 < (vectors - plain).abs().max() < 0.05


def test_projections_with_a_residual(tmp_path):
    torch.manual_seed(0)
    identity = "torch.nn.modules.linear.Identity"
    layers = [Dense(48, 24, False, identity, use_residual=True), Dense(24, 24, True, identity, use_residual=True)]
    encoder = MultiVectorEncoder(model_of("ModernBertModel", vocab_size=2048), None, [*layers, Normalize()]).eval()
    encoder.save_pretrained(tmp_path)
    Tokenizer.from_pretrained(small_model()).save_pretrained(tmp_path)
    read = st.MultiVectorEncoder(str(tmp_path), device="cpu")
    for x, y in zip(pipeline(None, tmp_path)(TEXTS), encoded(read, TEXTS, False), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_pooling_keeps_fewer_vectors_of_documents(theirs):
    ours = pipeline("late-interaction", theirs["plain"][1])
    whole, pooled = ours(TEXTS[0]), ours(TEXTS[0], pool_factor=4)
    assert len(pooled) == 1 + (len(whole) - 1) // 4
    np.testing.assert_allclose(np.linalg.norm(pooled, axis=1), 1, atol=1e-5)
    assert len(ours(TEXTS[0], pool_factor=4, is_query=True)) == len(whole)
    query = ours("the road", is_query=True)
    assert maxsim(query, pooled) == pytest.approx(maxsim(query, whole), rel=0.2)


def test_bad_folders_and_options_are_one_line(theirs, tmp_path):
    ours = pipeline("late-interaction", theirs["expanded"][1])
    with pytest.raises(InputError, match=r"layout is 'x'; choose one of sentence-transformers, pylate, stanford"):
        ours.model.save_pretrained(tmp_path, "x")
    with pytest.raises(InputError, match=r"prompt_name is 'x'; the checkpoint has"):
        ours("a", prompt_name="x")
    with pytest.raises(InputError, match="pool_factor is 0"):
        ours("a", pool_factor=0)
    with pytest.raises(ConfigError, match="similarity is 'cosine'; choose one of maxsim, meanmaxsim"):
        MultiVectorSettings(similarity="cosine")
    with pytest.raises(CheckpointError, match=r"is a late-interaction encoder; load it by MultiVectorEncoder"):
        pipeline("sentence-embedding", theirs["plain"][1])
    ours.model.save_pretrained(tmp_path)
    ours.tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "sentence_bert_config.json"
    path.write_text(json.dumps({"query_expansion": {"strategy": "soft", "length": 3}}))
    with pytest.raises(CheckpointError, match=r"query_expansion is .*soft.*; it must have a length"):
        MultiVectorEncoder.from_pretrained(tmp_path)


def test_the_command_line_ranks_and_writes_vectors(theirs, tmp_path, capsys):
    folder, output = theirs["expanded"][1], tmp_path / "vectors.jsonl"
    assert called(capsys, "run", "--model", folder, "--output", output, *TEXTS[1:])[0] == 0
    expected = pipeline("late-interaction", folder)(TEXTS[1:])
    for line, vectors in zip(output.read_text().splitlines(), expected, strict=True):
        np.testing.assert_allclose(json.loads(line)["output"], vectors, atol=1e-6)
    code, out, _ = called(
        capsys, "run", "--task", "text-ranking", "--model", folder, "--json", "--query", "a cat", *TEXTS
    )
    assert code == 0
    assert json.loads(out)["output"][0]["text"] == "a cat."


def test_a_token_that_makes_queries_longer_must_be_known():
    model = ModernBertModel.from_pretrained(small_model())
    tokenizer = Tokenizer.from_pretrained(small_model())
    settings = MultiVectorSettings(expansion=Expansion(8, token="no such token"))
    asked = pipeline("late-interaction", MultiVectorEncoder(model, settings).eval(), tokenizer)
    with pytest.raises(InputError, match="queries are made longer by no such token, which the tokenizer has not"):
        asked("a city", is_query=True)
