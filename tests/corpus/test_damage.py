"""Odd files, damaged outputs and wrong names: each has its line, and the rest of the job goes on."""

import bz2
import gzip
import hashlib
import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from modernbert import corpus
from modernbert.corpus import CorpusError, Settings, Transform
from modernbert.corpus.inputs import find_files, read_batches
from modernbert.corpus.output import Output
from modernbert.errors import InputError
from tests.commands import called
from tests.corpus.conftest import TEXTS


def rows_of(output):
    return [row for file in (output / "rows").iterdir() for row in pq.read_table(file).to_pylist()]


def test_packed_tables_are_read_as_what_is_in_them(run, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.csv.gz").write_bytes(gzip.compress(b'id,text\n1,"one, two"\n'))
    (folder / "b.tsv.bz2").write_bytes(bz2.compress(b"id\ttext\n2\tthree\n"))
    (folder / "c.csv.gz").write_bytes(gzip.compress(b"id;text\n2;three\n"))
    report = run(folder, keep=["id"])
    assert report.texts == 2
    assert {row["id"] for row in rows_of(tmp_path / "out")} == {"1", "2"}
    assert report.files[str(folder / "c.csv.gz")].endswith("A .csv file is separated by commas")


@pytest.mark.parametrize("name", ["file", "row", "key"])
def test_columns_that_would_hide_those_of_the_join_are_refused(run, tmp_path, name):
    with pytest.raises(InputError, match=f"^keep names '{name}', which rows/ has itself; rename the column$"):
        run(keep=["id", name])
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_trained_again_at_its_place_is_loaded_again(model, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    transform, batch = Transform(Settings("sentence-embedding", str(tmp_path / "model"))), pa.table({"text": ["a dog"]})
    before, served = transform(batch)["vector"], transform.pipeline
    assert transform.pipeline is served
    changed = {
        name: value * 1.5 if name.endswith("norm.weight") else value for name, value in load_file(weights).items()
    }
    save_file(changed, tmp_path / "new", {"format": "pt"})
    (tmp_path / "new").replace(weights)
    assert transform(batch)["vector"] != before


def test_a_list_where_a_text_belongs_is_a_row_that_cannot_be_read(run, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a dog"}\n{"text": ["a", "cat"]}\n{"text": [1]}\n{"text": "a cat"}\n')
    report = run(tmp_path / "in.jsonl")
    assert (report.texts, report.unreadable) == (2, 2)
    assert report.reasons[0].endswith("row 1, has list in 'text'; texts are read")


def test_a_file_with_two_columns_of_one_name_leaves_the_others(run, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    table = pa.table([["a dog"], ["a cat"], [1]], names=["text", "text", "id"])
    pq.write_table(table, folder / "a.parquet")
    pq.write_table(table.rename_columns(["other", "text", "other"]), folder / "b.parquet")
    report = run(folder)
    assert report.texts == 1
    assert report.files == {str(folder / "a.parquet"): f"{folder}/a.parquet has more than one column called text"}


def test_rows_before_the_damage_of_a_file_are_answered(run, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "bytes.csv").write_bytes(b'id,text\n1,one\n2,tw\xff\n3,"th\xffr\nee"\n4,four\n')
    (folder / "quote.csv").write_bytes(b'id,text\n1,five\n2,"six\n')
    (folder / "header.csv").write_bytes(b"id,text,\xff\n1,seven,x\n")
    whole = gzip.compress("".join(f"{i} dogs and {i * i % 977} cats\n" for i in range(9000)).encode())
    (folder / "torn.txt.gz").write_bytes(whole[: len(whole) // 2])
    report = run(folder / "*.csv", keep=["id"])
    assert {row["id"] for row in rows_of(tmp_path / "out") if row["file"].endswith("bytes.csv")} == {"1", "4"}
    assert (report.texts, report.unreadable) == (3, 2)
    assert {name.rpartition("/")[2] for name in report.files} == {"quote.csv", "header.csv"}
    assert report.reasons == [f"{folder}/bytes.csv, line {n}, is not UTF-8: invalid start byte" for n in (3, 4)]
    form = Settings("sentence-embedding").form
    (file,) = find_files([str(folder / "torn.txt.gz")])
    batches, rows = read_batches(file, form, {}, []), []
    with pytest.raises(InputError, match=r"torn\.txt\.gz cannot be read"):
        rows.extend(row for batch in batches for row in batch.rows)
    assert len(rows) % 1024
    assert rows == [(f"{i} dogs and {i * i % 977} cats",) for i in range(len(rows))]


def shards_of(output):
    return sorted((output / "data").iterdir())


@pytest.mark.parametrize("left", [0, 100])
def test_a_torn_shard_is_computed_again(run, tmp_path, notebook, left):
    run(shard_size=60)
    torn = shards_of(tmp_path / "out")[1]
    torn.write_bytes(torn.read_bytes()[:left])
    assert 0 < run(shard_size=60).computed < 160
    assert corpus.digest(tmp_path / "out") == notebook


def test_a_shard_that_was_overwritten_with_zeros_is_named(run, tmp_path):
    run()
    (shard,) = shards_of(tmp_path / "out")
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(
        CorpusError, match=rf"^{shard} is damaged \(.*\); delete it, and the same call computes it again$"
    ):
        run()
    shard.unlink()
    assert run().computed == 160


def test_a_first_try_without_any_answer_decides_nothing(run, folder):
    with pytest.raises(InputError, match="and no 'nothing'"):
        run(folder / "c.csv", store="int8", keep=["id"], column=["nothing"])
    report = run()
    assert report.texts == 160
    with pytest.raises(InputError, match="store was 'float32' and is 'int8'"):
        run(store="int8")


def test_errors_are_forgotten_once_their_record_is(run, tmp_path, monkeypatch):
    (tmp_path / "in.txt").write_text("a dog\n" + "word " * 600 + "\n")
    run(tmp_path / "in.txt")
    (file,) = (tmp_path / "out" / "errors").iterdir()
    remove = Output.remove
    monkeypatch.setattr(Output, "remove", lambda self, name: interrupt() if "errors" in name else remove(self, name))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "in.txt", retry_failed=True)
    monkeypatch.undo()
    assert file.exists()
    assert run(tmp_path / "in.txt").computed == 1
    assert not file.exists()


@pytest.mark.parametrize("damage", [b"", b'{"key": "zz"', b'{"key": "00", "error": "x"}\n{"error": "y"}\n'])
def test_errors_that_are_torn_are_found_again(run, tmp_path, damage):
    (tmp_path / "in.txt").write_text("a dog\n" + "".join(f"{'word ' * 600}{i}\n" for i in range(2)))
    assert run(tmp_path / "in.txt").failed == 2
    (file,) = (tmp_path / "out" / "errors").iterdir()
    file.write_bytes(damage)
    report = corpus.verify(tmp_path / "out", sample=0)
    assert (report.ok, report.missing > 0) == (False, True)
    report = run(tmp_path / "in.txt")
    assert (report.computed, report.failed, report.failed_before) == (2, 2, 0)
    assert corpus.verify(tmp_path / "out").ok


@pytest.mark.parametrize("record", ["{}", "[1]", '{"name": "another"}', '{"name"'])
def test_a_record_that_says_nothing_is_made_again(run, tmp_path, notebook, record):
    run(shard_size=100)
    next((tmp_path / "out" / "shards").iterdir()).write_text(record)
    assert 0 < run().computed < 160
    assert corpus.digest(tmp_path / "out") == notebook


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), pa.ArrowInvalid("no magic\nbytes")])
def test_a_shard_that_the_disk_does_not_give_back_is_one_line(run, tmp_path, monkeypatch, error):
    run()
    (shard,) = shards_of(tmp_path / "out")
    ways = {"open": Output.open, "read": Output.read}

    def broken(way):
        def broken(self, name):
            if name.startswith("data/"):
                raise error
            return ways[way](self, name)

        return broken

    if isinstance(error, OSError):
        monkeypatch.setattr(Output, "read", broken("read"))
        assert corpus.verify(tmp_path / "out", sample=0).damaged == [shard.name]
        monkeypatch.undo()
    monkeypatch.setattr(Output, "open", broken("open"))
    with pytest.raises(CorpusError, match=rf"^{shard} is damaged \(.*\); delete it, and the same call") as raised:
        run()
    assert "\n" not in str(raised.value)


def interrupt():
    raise KeyboardInterrupt


def test_a_lance_dataset_that_is_gone_or_whose_shards_changed_holds_each_text_once(run, tmp_path):
    lancedb = pytest.importorskip("lancedb")
    (tmp_path / "in.txt").write_text("\n".join(TEXTS[:60]) + "\n")

    def rows():
        return lancedb.connect(str(tmp_path / "out")).open_table("corpus").to_arrow()

    run(tmp_path / "in.txt", format="lance", shard_size=20)
    assert corpus.verify(tmp_path / "out", sample=0).ok
    lancedb.connect(str(tmp_path / "out")).open_table("corpus").delete("tokens > 5")
    assert corpus.verify(tmp_path / "out", sample=0).damaged == ["corpus.lance"]
    shutil.rmtree(tmp_path / "out" / "corpus.lance")
    assert corpus.verify(tmp_path / "out", sample=0).damaged == ["corpus.lance"]
    run(tmp_path / "in.txt", format="lance", shard_size=20)
    assert corpus.verify(tmp_path / "out", sample=0).ok
    shards_of(tmp_path / "out")[0].unlink()
    run(tmp_path / "in.txt", format="lance", shard_size=7)
    assert (rows().num_rows, corpus.digest_of([rows()])) == (60, corpus.digest(tmp_path / "out"))
    shutil.rmtree(tmp_path / "out" / "corpus.lance")
    run(tmp_path / "in.txt", format="lance")
    assert (rows().num_rows, corpus.digest_of([rows()])) == (60, corpus.digest(tmp_path / "out"))


def change(output, edit):
    """Edit an output's manifest."""
    manifest = json.loads((output / "manifest.json").read_text())
    edit(manifest)
    (output / "manifest.json").write_text(json.dumps(manifest))


def test_verifying_finds_answers_that_are_missing(run, tmp_path):
    (tmp_path / "in.txt").write_text("\n".join([*TEXTS[:40], "word " * 600]) + "\n")
    run(tmp_path / "in.txt", shard_size=10)
    output = tmp_path / "out"
    whole = corpus.verify(output, sample=100)
    assert (whole.ok, whole.missing, whole.texts, whole.identical) == (True, 0, 40, 40)
    lost = shards_of(output)[0]
    texts = pq.read_metadata(lost).num_rows
    lost.unlink()
    change(output, lambda manifest: manifest["shards"].pop(lost.stem))
    report = corpus.verify(output, sample=0)
    assert (report.ok, report.damaged) == (False, [])
    assert report.missing >= texts
    change(output, lambda manifest: manifest.pop("counts"))
    assert corpus.verify(output, sample=100).missing >= texts


def test_a_shard_without_a_hash_is_damaged(run, tmp_path):
    run()
    (shard,) = shards_of(tmp_path / "out")
    change(tmp_path / "out", lambda manifest: manifest["shards"][shard.stem].update(sha256=None))
    assert corpus.verify(tmp_path / "out", sample=0).damaged == [shard.name]


def test_a_sample_that_nothing_could_be_read_of_is_not_ok(run, tmp_path, capsys):
    (tmp_path / "in.txt").write_text("a dog\na cat\n")
    run(tmp_path / "in.txt")
    (tmp_path / "in.txt").unlink()
    report = corpus.verify(tmp_path / "out")
    assert (report.ok, report.texts, report.changed, report.missing) == (False, 0, 2, 0)
    assert corpus.verify(tmp_path / "out", sample=0).ok
    code, _, err = called(capsys, "verify", tmp_path / "out")
    assert code == 1
    assert "could be read again; --sample 0 checks hashes alone" in err


@pytest.mark.parametrize("folder", ["rows", "files"])
def test_what_is_known_of_rows_is_gone(run, folder, tmp_path):
    (tmp_path / "in.txt").write_text("a dog\na cat\n")
    run(tmp_path / "in.txt")
    shutil.rmtree(tmp_path / "out" / folder)
    with pytest.raises(InputError, match=r"a sample of 0 checks shards alone$"):
        corpus.verify(tmp_path / "out")
    with pytest.raises(InputError, match="sample is -1; it must be 0 or more"):
        corpus.verify(tmp_path / "out", sample=-1)
    assert corpus.verify(tmp_path / "out", sample=0).ok
    run(tmp_path / "in.txt")
    assert corpus.verify(tmp_path / "out").ok


def test_a_shard_of_another_machine_excuses_no_other(run, tmp_path):
    run(shard_size=80)
    one, other = shards_of(tmp_path / "out")
    table = pq.read_table(one)
    vectors = table["vector"].combine_chunks()
    moved = pa.FixedSizeListArray.from_arrays(pa.array(vectors.flatten().to_numpy() + np.float32(0.25)), 48)
    pq.write_table(table.set_column(1, "vector", moved), one)

    def moves(machine):
        def edit(manifest):
            manifest["machines"] = [manifest["machines"][0], {"processor": "another"}]
            manifest["shards"][one.stem] |= {"machine": machine, "sha256": hashlib.sha256(one.read_bytes()).hexdigest()}
            manifest["shards"][other.stem]["machine"] = 1 - machine

        return edit

    change(tmp_path / "out", moves(0))
    report = corpus.verify(tmp_path / "out", sample=1000)
    assert (report.ok, report.is_same_machine, report.wrong) == (False, False, 80)
    change(tmp_path / "out", moves(1))
    report = corpus.verify(tmp_path / "out", sample=1000)
    assert (report.ok, report.wrong, report.texts - report.identical) == (True, 0, 80)


def test_names_and_kept_values_that_are_not_utf8_stop_no_job(run, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    try:
        (folder / os.fsdecode(b"caf\xe9.txt")).write_text("a dog\n")
        (folder / os.fsdecode(b"caf\xe8.txt")).write_text("a bird\n")
    except OSError:
        pytest.skip("names of files are UTF-8 here")
    (folder / "in.jsonl").write_text('{"id": "\\ud800x", "text": "a cat"}\n{"id": ["\\udfff"], "text": "two"}\n')
    report = run(folder, keep=["id"])
    assert (report.texts, report.unreadable) == (4, 0)
    found = {row["file"].rpartition("/")[2]: row["id"] for row in rows_of(tmp_path / "out") if row["row"] == 0}
    assert found == {"caf\\xe9.txt": None, "caf\\xe8.txt": None, "in.jsonl": "?x"}
    assert run(folder, keep=["id"]).computed == 0


def test_an_output_is_no_input_by_whichever_link_it_is_reached(run, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "in.txt").write_text("a dog\n")
    (tmp_path / "link").symlink_to(folder)
    for _ in range(2):
        assert run(tmp_path / "link", folder / "out").rows == 1
        assert run(folder, tmp_path / "link" / "out").rows == 1


def test_a_dtype_and_a_device_are_what_their_names_are(model):
    loading = {"dtype": torch.bfloat16, "device": torch.device("cpu"), "batch_tokens": 64}
    one = Settings("sentence-embedding", str(model), loading=loading)
    assert one == Settings("sentence-embedding", str(model), loading={**loading, "dtype": "bfloat16", "device": "cpu"})
    assert Transform(one)(pa.table({"text": ["a dog"]}))["error"].null_count == 1


def test_tables_that_are_given_once_are_not_hashed_in_parts():
    table = pa.table({"key": pa.array([b"a" * 32], pa.binary(32)), "score": pa.array([1.0])})
    assert corpus.digest_of([table], parts=2) == corpus.digest_of(iter([table]))
    with pytest.raises(InputError, match="parts is 2 and tables can be gone through only once"):
        corpus.digest_of(iter([table]), parts=2)


@pytest.mark.parametrize("name", ["error", "tokens", "vector", "truncated"])
def test_columns_called_like_the_answers_are_refused(model, name):
    with pytest.raises(InputError, match=f"has the column {name}, and so has its answer; rename it"):
        Transform(Settings("sentence-embedding", str(model)))(pa.table({"text": ["a"], name: [1]}))
