"""Documents from files, what is held out of them, and how they are cut."""

import io
import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modernbert.errors import InputError
from modernbert.text.tokenizer import Tokenizer
from modernbert.training.pretraining.documents import Collection
from modernbert.training.pretraining.texts import Corpus, Cutter, split


def texts_of(collection, held_out=None):
    return [d.text for d in collection if held_out is None or d.held_out is held_out]


def test_documents_of_folders_and_what_is_held_out(tmp_path, documents):
    (tmp_path / "sub").mkdir()
    for i in range(20):
        (tmp_path / "sub" / f"{i:02}.txt").write_text(documents[i], encoding="utf-8-sig" if i % 2 else "utf-8")
    lines = [json.dumps({"text": d, "other": 1}) for d in documents[20:70]]
    (tmp_path / "more.jsonl").write_text("\n".join(lines) + "\n\n")
    (tmp_path / "ignored.csv").write_text("a,b")
    assert sorted(texts_of(Collection([tmp_path]))) == sorted(documents[:70])
    collection = Collection([tmp_path], 0.1)
    train, kept = texts_of(collection, False), texts_of(collection, True)
    assert (len(train), len(kept), collection.documents) == (63, 7, 70)
    assert set(train) | set(kept) == set(documents[:70])
    assert sum(d in documents[:20] for d in kept) == 2  # the same share of each group
    again = Collection([tmp_path / "more.jsonl", f"books={tmp_path / 'sub'}"], 0.1)
    assert set(texts_of(again, True)) == set(kept)  # whatever the order and the names
    assert {d.source for d in again} == {"more", "books"}
    assert {d.source for d in collection} == {tmp_path.name}
    assert not texts_of(Collection([tmp_path]), True)
    assert not texts_of(Collection([tmp_path], 1), False)


def test_rows_of_parquet_datasets_and_standard_input(tmp_path, documents, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"body": documents[:6]})
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    datasets.DatasetDict({"train": rows, "test": rows.select(range(2))}).save_to_disk(str(tmp_path / "saved"))
    assert texts_of(Collection([tmp_path / "rows.parquet"], column="body")) == documents[:6]
    assert texts_of(Collection([tmp_path / "saved"], column="body")) == documents[:6] + documents[:2]
    assert sorted(texts_of(Collection([tmp_path], column="body"))) == sorted(documents[:6] * 2 + documents[:2])

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(documents[:4]).encode())))
    collection = Collection(["web=-"], 0.25)
    assert texts_of(collection) == documents[:4]
    assert {d.source for d in collection} == {"web"}
    assert len(texts_of(collection, True)) == 1


def test_bad_paths_and_rows_are_named(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no file or folder"):
        Collection([tmp_path / "missing"])
    with pytest.raises(InputError, match=r"holds no \.txt, \.jsonl, \.parquet file and no dataset"):
        Collection([tmp_path])
    for name, content, message in [
        ("a.csv", "x", r"none of \.txt, \.jsonl"),
        ("a.jsonl", '{"text": "fine"}\n{"txt": "not"}\n', r"a\.jsonl, row 2, has no column 'text'"),
        ("b.jsonl", '{"text": 3}\n', r"has an int in 'text'"),
        ("c.jsonl", '{"text": "bad \\ud83d"}\n', r"c\.jsonl, row 1, is no Unicode text"),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=message):
            Collection([tmp_path / name])
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.jsonl").write_text('{"text": "fine"}\n')
    with pytest.raises(InputError, match=r"would both be called a; write NAME=PATH"):
        Collection([tmp_path / "d" / "a.jsonl", tmp_path / "a.jsonl"])
    for twice in (["a.jsonl", "a.jsonl"], ["d", "a=d/a.jsonl"], ["x=a.jsonl", "y=./d/../a.jsonl"]):
        named = [str(tmp_path / path) if "=" not in path else path.replace("=", f"={tmp_path}/") for path in twice]
        with pytest.raises(InputError, match=r"a\.jsonl is given twice, by .* and by .*; give it once"):
            Collection(named)
    with pytest.raises(InputError, match="lie in"):
        Collection([tmp_path / "b.jsonl"], 1.5)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a line")))
    with pytest.raises(InputError, match="named twice"):
        Collection(["-", "-"])


@given(st.text(alphabet="ab c.!?\n\"' 。", max_size=300), st.integers(1, 60))
def test_pieces_are_the_text(text, least):
    pieces = split(text, least)
    assert "".join(pieces) == text
    assert all(len(piece) >= least for piece in pieces[:-1])
    assert all(piece.strip() for piece in pieces[:-1])


@given(st.integers(7, 60), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 3))
def test_texts_hold_every_word_and_fit(max_length, short, seed):
    cutter, documents = CUT
    texts = Cutter(cutter, max_length, short, seed).texts(documents)
    cls, sep = cutter.token_to_id("[CLS]"), cutter.token_to_id("[SEP]")
    for document, some in zip(documents, texts, strict=True):
        assert all(text[0] == cls and text[-1] == sep and len(text) <= max_length for text in some)
        said = "".join(cutter.decode(text[1:-1].tolist()) for text in some)
        assert "".join(said.split()) == "".join(document.split())


def test_texts_are_long_unless_they_are_to_be_short(documents, tokenizer):
    long = Cutter(tokenizer, 128).corpus(documents).lengths
    mixed = Cutter(tokenizer, 128, 0.5).corpus(documents).lengths
    assert np.median(long) > 100
    assert np.quantile(mixed, 0.2) < 20
    assert mixed.max() > 100
    assert len(Cutter(tokenizer, 24).corpus([])) == 0
    many = [" ".join(documents) * 30, "", "x", *documents]  # more than is encoded at once
    apart = [text for document in many for text in Cutter(tokenizer, 64).cut([document])[0]]
    together = Cutter(tokenizer, 64).corpus(many)
    assert np.array_equal(together.tokens, Corpus.of(apart).tokens)


def test_tokens_are_those_of_the_whole_document(data):
    backend = Tokenizer.from_pretrained(data / "tokenizer").backend
    text = (data / "text" / "wikitext2-valid.txt").read_text("utf-8")[:60_000].strip()
    for max_length in (64, 8192):
        texts = Cutter(backend, max_length).cut([text])[0]
        whole = backend.encode(text, add_special_tokens=False).ids
        parts = [i for some in texts for i in some[1:-1].tolist()]
        if max_length == 8192:
            assert abs(len(parts) - len(whole)) <= len(texts)
        decoded = "".join(backend.decode(some[1:-1].tolist()) for some in texts)
        assert "".join(decoded.split()) == "".join(text.split())
        assert len(parts) <= len(whole) + 2 * len(texts)  # only a text's first word may be other tokens


def test_impossible_cuts_are_named(tokenizer):
    with pytest.raises(InputError, match="max_length is 4"):
        Cutter(tokenizer, 4)
    with pytest.raises(InputError, match=r"short is 1\.5"):
        Cutter(tokenizer, 32, 1.5)


@pytest.fixture(autouse=True, scope="module")
def _cut(documents, tokenizer):
    global CUT  # what hypothesis may not be given by a fixture of a function
    CUT = (tokenizer, [*documents[:5], "A word. " * random.Random(0).randint(40, 60), "no end " * 90])
