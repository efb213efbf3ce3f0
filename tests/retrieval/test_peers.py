"""Late interaction beside PyLate and Stanford's library: folders that they make and read, the same numbers."""

import json
import shutil

import numpy as np
import pytest
import torch

from modernbert import ModernBertConfig, ModernBertModel, Tokenizer, pipeline
from modernbert.pipelines import small_model
from tests.conftest import DATA
from tests.interop.environments import run_in
from tests.retrieval import peers

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
# Their folders whose settings Stanford's layout can hold. Its reader needs transformers 4, where [MASK] that is too far
# from a query's own tokens sees everything; only PyLate of transformers 5 shows those queries.
FOR_STANFORD = ("as it comes", "short queries", "prefixes", "attended", "far beyond", "saved after use")
NEAR = ("short queries", "attended")
HERE = "import sys; from tests.retrieval import peers; "


@pytest.fixture(scope="module")
def texts():
    path = DATA / "question_answering" / "squad-v1-dev.json"
    if not path.is_file():
        pytest.skip("needs ../shared/data")
    tokenizer = Tokenizer.from_pretrained(small_model())
    articles = json.loads(path.read_text())["data"][:6]
    found = [paragraph for article in articles for paragraph in article["paragraphs"][:5]]
    # PyLate's reader strips texts, and skips unknown tokens wherever a skipped word is unknown.
    documents = [x["context"].strip() for x in found]
    documents = [x for x in documents if tokenizer.unk_token_id not in tokenizer(x, truncation=True).input_ids]
    return {"documents": documents[:24], "queries": [x["qas"][0]["question"].strip() for x in found[:12]]}


@pytest.fixture(scope="module")
def root(tmp_path_factory, texts):
    """Folders of PyLate of every kind with random weights, and what it gives for them."""
    root = tmp_path_factory.mktemp("peers")
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_pretrained(small_model())
    named = {name: getattr(tokenizer, name) for name in ("pad_token_id", "cls_token_id", "sep_token_id")}
    config = ModernBertConfig(
        vocab_size=2048, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        local_attention=32, bos_token_id=named["cls_token_id"], eos_token_id=named["sep_token_id"],
        initializer_range=0.15, **named,
    )  # fmt: skip
    ModernBertModel(config).save_pretrained(root / "body")
    tokenizer.save_pretrained(root / "body")
    (root / "texts.json").write_text(json.dumps(texts))
    code = HERE + "peers.made_by_pylate(*sys.argv[1:3]); peers.answers(peers.by_pylate, *sys.argv[2:])"
    run_in("pylate", code, root / "body", root / "pylate", root / "texts.json", root / "answers")
    assert json.loads((root / "answers" / "refused.json").read_text()) == {}
    return root


def by_ours(folder, texts):
    ours = pipeline(None, folder)
    queries, documents = ours(texts["queries"], is_query=True), ours(texts["documents"])
    scores = ours.similarity(queries, documents)
    return queries, documents, scores, (-scores).argsort(1, kind="stable").tolist()


def assert_same(found, expected):
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert [x.shape for x in one] == [x.shape for x in other]
        for x, y in zip(one, other, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found[2], expected[2], rtol=0, atol=1e-4)
    assert found[3] == expected[3]
    assert np.ptp(found[2], axis=1).min() > 0.1  # scores that a ranking can be wrong about


@pytest.mark.parametrize("kind", peers.KINDS)
def test_a_folder_of_pylate_gives_its_vectors_scores_and_rankings(root, texts, kind):
    expected = peers.read(root / "answers" / f"{kind}.npz")
    assert_same(by_ours(root / "pylate" / kind, texts), expected)
    assert_same(peers.by_sentence_transformers(root / "pylate" / kind, texts), expected)


def test_folders_that_we_write_for_pylate_are_read_by_it_and_by_sentence_transformers(root, texts):
    for kind in peers.KINDS:
        ours = pipeline(None, root / "pylate" / kind)
        ours.model.save_pretrained(root / "ours" / kind, "pylate", ours.tokenizer)
    code = HERE + "peers.answers(peers.by_pylate, *sys.argv[1:])"
    run_in("pylate", code, root / "ours", root / "texts.json", root / "of ours")
    assert json.loads((root / "of ours" / "refused.json").read_text()) == {}
    for kind in peers.KINDS:
        expected = by_ours(root / "pylate" / kind, texts)
        assert_same(by_ours(root / "ours" / kind, texts), expected)
        assert_same(peers.read(root / "of ours" / f"{kind}.npz"), expected)
        assert_same(peers.by_sentence_transformers(root / "ours" / kind, texts), expected)


def test_folders_that_we_write_for_stanford_are_read_by_its_library_and_by_pylate(root, texts):
    for kind in FOR_STANFORD:
        ours = pipeline(None, root / "pylate" / kind)
        ours.model.save_pretrained(root / "stanford" / kind, "stanford", ours.tokenizer)
    for name, by in (("pylate", "by_pylate"), ("colbert", "by_stanford")):
        code = HERE + f"peers.answers(peers.{by}, *sys.argv[1:])"
        run_in(name, code, root / "stanford", root / "texts.json", root / f"stanford {name}")
        assert json.loads((root / f"stanford {name}" / "refused.json").read_text()) == {}
    for kind in FOR_STANFORD:
        expected = by_ours(root / "pylate" / kind, texts)
        assert_same(by_ours(root / "stanford" / kind, texts), expected)
        assert_same(peers.read(root / "stanford pylate" / f"{kind}.npz"), expected)
        if kind in NEAR:
            assert_same(peers.read(root / "stanford colbert" / f"{kind}.npz"), expected)


def test_from_sentence_transformers_to_ours_to_pylate_and_back_nothing_changes(root, texts, tmp_path):
    from sentence_transformers import MultiVectorEncoder

    kinds, expected = ("as it comes", "attended", "not expanded", "two projections", "prompts"), {}
    for kind in kinds:
        first = MultiVectorEncoder(str(root / "pylate" / kind), device="cpu")
        first.save_pretrained(str(tmp_path / "first" / kind), create_model_card=False)
        expected[kind] = by_ours(tmp_path / "first" / kind, texts)
        ours = pipeline(None, tmp_path / "first" / kind)
        ours.model.save_pretrained(tmp_path / "second" / kind, "pylate", ours.tokenizer)
    run_in("pylate", HERE + "peers.saved_again(*sys.argv[1:])", tmp_path / "second", tmp_path / "third")
    shutil.rmtree(tmp_path / "second")
    for kind in kinds:
        for one, other in zip(by_ours(tmp_path / "third" / kind, texts)[:3], expected[kind][:3], strict=True):
            assert all((x == y).all() for x, y in zip(one, other, strict=True))
        last = pipeline(None, tmp_path / "third" / kind)
        last.model.save_pretrained(tmp_path / "fourth" / kind, tokenizer=last.tokenizer)
        assert_same(peers.by_sentence_transformers(tmp_path / "fourth" / kind, texts), expected[kind])
