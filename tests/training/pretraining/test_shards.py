"""Prepared data: what is written, mapped, checked, packed and mixed."""

import itertools
import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modernbert.errors import InputError
from modernbert.training.pretraining.prepare import prepare_data
from modernbert.training.pretraining.run import Data
from modernbert.training.pretraining.shards import Manifest, open_shard
from modernbert.training.pretraining.stream import Cursor, PassStream, best_fit
from modernbert.training.pretraining.texts import Corpus, Cutter
from modernbert.training.pretraining.train_tokenizer import save_tokenizer, train_tokenizer
from tests.commands import called


def test_shards_hold_the_texts_and_the_manifest_says_so(raw, documents, tokenizer, tmp_path):
    manifest = prepare_data(
        [raw / "first.jsonl", raw / "second.jsonl"], raw / "tokenizer", tmp_path / "data",
        max_length=32, held_out=0.1, shard_tokens=500,
    )  # fmt: skip
    assert Manifest.read(tmp_path / "data") == manifest
    first = manifest.sources["first"]
    assert (first.documents, first.held_out_documents) == (45, 5)
    assert first.bytes + first.held_out_bytes == sum(len(text.encode()) for text in documents[:50])
    assert len(first.train) > 2
    assert all(500 <= shard.tokens < 532 for shard in first.train[:-1])
    found = [
        text.tolist()
        for source in manifest.sources.values()
        for shard in [*source.train, *source.held_out]
        for corpus in [open_shard(tmp_path / "data", shard)]
        for text in (corpus[i] for i in range(len(corpus)))
    ]
    expected = Cutter(tokenizer, 32).corpus(documents)
    assert sorted(found) == sorted(expected[i].tolist() for i in range(len(expected)))
    shard = open_shard(tmp_path / "data", first.train[0])
    assert isinstance(shard.tokens, np.memmap)
    assert shard.tokens.dtype == np.uint16
    files = sorted(path.name for path in (tmp_path / "data").iterdir())
    assert {"manifest.json", "tokenizer.json", "tokenizer_config.json"} < set(files)
    again = prepare_data(
        [raw / "first.jsonl", raw / "second.jsonl"], raw / "tokenizer", tmp_path / "again",
        max_length=32, held_out=0.1, shard_tokens=500,
    )  # fmt: skip
    assert again == manifest  # checksums too


def test_bad_data_is_named(raw, prepared, documents, tmp_path):
    def copy(name):
        return shutil.copytree(prepared, tmp_path / name)

    broken = copy("broken")
    shard = next(broken.glob("00-first.train.*.tokens.npy"))
    content = bytearray(shard.read_bytes())
    content[-7] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match=r"tokens\.npy is corrupt: its checksum is not the manifest's"):
        Data.open([broken])
    assert Data.open([broken], verify=False).train
    shard.write_bytes(content[:-9])
    with pytest.raises(InputError, match=r"tokens\.npy is corrupt"):
        Data.open([broken], verify=False)
    shard.unlink()
    with pytest.raises(InputError, match=r"tokens\.npy is missing"):
        Data.open([broken])
    other = copy("other")
    save_tokenizer(train_tokenizer(documents[:30], 310), other, 32)
    with pytest.raises(InputError, match="another tokenizer than the manifest's"):
        Data.open([other])
    prepare_data([raw / "first.jsonl"], other, tmp_path / "otherwise", max_length=32)
    with pytest.raises(InputError, match="otherwise was tokenized with another tokenizer"):
        Data.open([prepared, tmp_path / "otherwise"])
    with pytest.raises(InputError, match="holds no manifest"):
        Data.open([raw])
    with pytest.raises(InputError, match="data is not given"):
        Data.open([])
    spoilt = copy("spoilt")
    (spoilt / "manifest.json").write_text('{"format": "another"}')
    with pytest.raises(InputError, match=r"^[^:]*manifest\.json is of the format 'another'"):
        Data.open([spoilt])
    (spoilt / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="is no manifest"):
        Data.open([spoilt])


def test_preparing_leaves_all_or_nothing(raw, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="which exists"):
        prepare_data([raw / "first.jsonl"], raw / "tokenizer", raw)
    with pytest.raises(InputError, match="no text to train on"):
        prepare_data([raw / "first.jsonl"], raw / "tokenizer", tmp_path / "all", max_length=32, held_out=1)
    with pytest.raises(InputError, match="shard_tokens is 0"):
        prepare_data([raw / "first.jsonl"], raw / "tokenizer", tmp_path / "all", shard_tokens=0)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("modernbert.training.pretraining.shards.np.save", full)
    with pytest.raises(OSError, match="No space left"):
        prepare_data([raw / "first.jsonl"], raw / "tokenizer", tmp_path / "full", max_length=32)
    assert not list(tmp_path.iterdir())


def test_the_command_tells_what_it_made(raw, tmp_path, capsys):
    command = ["prepare-data", "--tokenizer", raw / "tokenizer", "--output", tmp_path / "data", "--max-length", "40"]
    code, _, err = called(capsys, *command, raw / "none")
    assert code == 2
    assert "no file or folder" in err
    code, out, err = called(capsys, *command, f"tales={raw / 'first.jsonl'}", "--held-out", "0.1")
    assert code == 0
    for part in ("tales", "45 documents", "held out: 5 documents"):
        assert part in out
    assert "a second; written to" in err


@given(st.lists(st.integers(1, 130), max_size=60), st.integers(1, 120))
def test_best_fit_puts_each_length_into_one_bin_that_holds_it(lengths, budget):
    bins = best_fit(lengths, budget)
    assert sorted(i for some in bins for i in some) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in some) <= budget or len(some) == 1 for some in bins)
    # No bin's shortest text would have fitted into an earlier, fuller one that stayed open.
    small = [some for some in bins if 2 * sum(lengths[i] for i in some) <= budget]
    assert len(small) <= 1


def corpora(lengths, shards=2):
    parts = np.array_split(np.array(lengths), shards)
    return [Corpus.of([np.full(n, i % 251, dtype=np.uint16) for i, n in enumerate(part)]) for part in parts]


@given(
    st.lists(st.integers(3, 60), min_size=4, max_size=80), st.lists(st.integers(3, 60), min_size=4, max_size=80),
    st.integers(60, 200), st.integers(0, 5), st.integers(0, 150),
)  # fmt: skip
def test_passes_follow_from_their_number(first, second, budget, seed, start):
    sources = {"a": corpora(first), "b": corpora(second, 3)}
    stream = PassStream(sources, budget, seed)
    passes = list(itertools.islice(stream.passes(), start + 20))
    again = list(itertools.islice(PassStream(sources, budget, seed).passes(start), 20))
    assert again == passes[start:]
    cursor = json.loads(json.dumps(vars(passes[start][0])))
    near = Cursor(cursor["passes"], tuple(cursor["texts"]), tuple(cursor["tokens"]),
                  tuple(type(passes[0][1][0])(*text) for text in cursor["waiting"]))  # fmt: skip
    assert list(itertools.islice(stream.passes(start, near), 20)) == again
    assert all(sum(map(stream.length, texts)) <= budget for _, texts in passes)


def test_an_epoch_has_every_text_once_and_the_next_another_order():
    stream = PassStream({"a": corpora(range(3, 40)), "b": corpora(range(5, 60), 3)}, 100, 0)
    order = [stream._draw(1, i) for i in range(110)]
    assert len(set(order[:55])) == len(set(order[55:])) == 55
    assert order[:55] != order[55:]
    assert order[:55] != sorted(order[:55])


def test_weights_share_out_the_tokens():
    sources = {"a": corpora([7, 9, 30] * 20), "b": corpora([5, 40] * 50), "c": corpora([8] * 9)}
    stream = PassStream(sources, 200, 1, {"a": 3, "b": 1, "c": 0})
    tokens = [0, 0]
    for _, texts in itertools.islice(stream.passes(), 2000):
        for text in texts:
            tokens[text.source] += stream.length(text)
    assert stream.names == ["a", "b"]
    assert tokens[0] / sum(tokens) == pytest.approx(0.75, abs=0.01)
    for weights, message in (
        ({"d": 1}, "weight is given for d"),
        ({"a": -1, "b": 1, "c": 1}, "negative"),
        ({"a": 1, "b": 1}, "not given for c"),
        ({"a": 0, "b": 0, "c": 0}, "no source"),
    ):
        with pytest.raises(InputError, match=message):
            PassStream(sources, 200, 1, weights)


def test_next_to_nothing_of_a_pass_is_empty(data, tmp_path):
    """Under one in a hundred, on real text, for texts of several lengths and budgets down to two of the longest."""
    text = data / "text"
    paths = [text / "asp_stories.jsonl", text / "wikitext2-valid.txt"]
    for max_length, budget in ((512, 1024), (1024, 8192), (8192, 16384), (8192, 8192)):
        output = tmp_path / str(budget + max_length)
        prepare_data(paths, data / "tokenizer", output, max_length=max_length)
        manifest = Manifest.read(output)
        sources = {n: [open_shard(output, s) for s in source.train] for n, source in manifest.sources.items()}
        stream = PassStream(sources, budget, 0)
        count = 2 * sum(stream.sizes) // budget
        filled = [sum(map(stream.length, texts)) for _, texts in itertools.islice(stream.passes(), count)]
        assert 1 - sum(filled) / (count * budget) < 0.01, (max_length, budget)


def test_texts_of_no_fitting_lengths_are_packed_all_the_same():
    stream = PassStream({"a": corpora([60] * 50)}, 100, 0)
    passes = [texts for _, texts in itertools.islice(stream.passes(), 300)]
    assert {len(texts) for texts in passes} == {1}
    longer = PassStream({"a": corpora([130] * 50)}, 100, 0)
    assert {len(texts) for _, texts in itertools.islice(longer.passes(), 300)} == {1}
