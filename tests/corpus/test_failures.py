"""Failures are data: each has one clear line, nothing is half-written, and the job goes on or can."""

import contextlib
import gzip
import json
import subprocess
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modernbert import corpus
from modernbert.corpus import CorpusError, Settings, plan
from modernbert.corpus.contract import ATTEMPTS, Units
from modernbert.corpus.keys import KeySet
from modernbert.corpus.local import LocalEngine
from modernbert.corpus.output import Output
from modernbert.corpus.progress import Progress
from modernbert.corpus.work import RUN, Work, unit_of
from modernbert.errors import InputError
from tests.commands import files_of_at_most
from tests.corpus.conftest import TEXTS


def errors(output):
    return [json.loads(line) for file in (output / "errors").iterdir() for line in file.read_text().splitlines()]


def unreadable(output):
    return [json.loads(line) for file in (output / "unreadable").iterdir() for line in file.read_text().splitlines()]


def test_texts_that_cannot_be_served_are_rows_of_an_error_file(run, tmp_path, model):
    long = "word " * 600
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in (" ", "a dog", long, "a cat")))
    report = run(tmp_path / "in.jsonl")
    assert (report.texts, report.failed) == (2, 2)
    keys = Settings("sentence-embedding", str(model)).keys([(" ",), (long,)])
    found = {bytes.fromhex(error["key"]): error["error"] for error in errors(tmp_path / "out")}
    assert found[keys[0]] == "a text is empty or only spaces; there is nothing to answer"
    assert "tokens and the model's context holds 512" in found[keys[1]]
    assert run(tmp_path / "in.jsonl").computed == 0  # they are not tried again
    assert run(tmp_path / "in.jsonl", retry_failed=True).computed == 2
    assert len(errors(tmp_path / "out")) == 2


def test_texts_that_are_cut_are_counted(run, tmp_path):
    (tmp_path / "in.txt").write_text("word " * 600 + "\na dog\n" + "other " * 600 + "\na cat\n")
    report = run(tmp_path / "in.txt", truncation=True)
    assert (report.texts, report.failed, report.truncated) == (4, 0, 2)
    table = pa.concat_tables(corpus.answers(tmp_path / "out")).to_pylist()
    assert sorted((row["tokens"], row["truncated"]) for row in table)[2:] == [(512, True), (512, True)]


def test_files_and_rows_that_cannot_be_read_leave_the_others(run, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "torn.parquet").write_bytes(b"PAR1 and no more")
    (folder / "other.csv").write_text("title,year\nx,1\n")
    (folder / "latin.txt").write_bytes(b"a dog\ncaf\xe9\n")
    (folder / "surrogate.jsonl").write_text(
        '{"text": "\\ud800"}\n{"text": 5}\n{"text": null}\n[1]\nno json\n{"text": "ok"}\n'
    )
    (folder / "empty.txt").write_text("")
    (folder / "packed.txt.gz").write_bytes(gzip.compress(b"a packed text\n"))
    (folder / "bad.txt.gz").write_bytes(gzip.compress(b"a bad text\n" * 9999)[:30] + b"\xff" * 60)
    (folder / "torn.txt.gz").write_bytes(gzip.compress(b"a torn text\n" * 9999)[:60])
    report = run(folder)
    assert report.texts == 4
    assert {file.rpartition("/")[2] for file in report.files} == {
        "torn.parquet",
        "other.csv",
        "torn.txt.gz",
        "bad.txt.gz",
    }
    assert all("\n" not in reason for reason in report.files.values())
    assert report.files[str(folder / "other.csv")].startswith(f"{folder}/other.csv has the columns title, year; none")
    assert report.unreadable == 6
    reasons = {(error["file"].rpartition("/")[2], error["row"]) for error in unreadable(tmp_path / "out")}
    assert ("latin.txt", 1) in reasons
    assert {("surrogate.jsonl", i) for i in range(5)} <= reasons
    (folder / "other.csv").write_text("title,text\nx,now\n")
    assert run(folder).computed == 1
    assert "other.csv" not in {error["file"].rpartition("/")[2] for error in unreadable(tmp_path / "out")}


@pytest.mark.parametrize("megabytes", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_text_of_many_megabytes_is_one_of_the_texts_that_fail(run, tmp_path, megabytes):
    (tmp_path / "in.txt").write_text("a dog\n" + "word " * 200_000 * megabytes + "\na cat\n")
    report = run(tmp_path / "in.txt")
    assert (report.texts, report.failed) == (2, 1)
    assert len(errors(tmp_path / "out")[0]["error"]) < 300


def test_a_full_disk_is_one_line_and_the_job_continues(run, tmp_path, notebook):
    with files_of_at_most(20_000), pytest.raises(CorpusError, match="cannot be") as raised:
        run()
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith("and the same call continues")
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert not list((tmp_path / "out").glob("data/*"))
    run()
    assert corpus.digest(tmp_path / "out") == notebook


def test_a_disk_that_is_really_full_leaves_nothing_half_written(run, tmp_path, notebook):
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", place]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a disk of its own needs root")
    lines = []
    try:
        for size in range(16, 240, 24):  # it is full at another moment each time
            subprocess.run(["mount", "-o", f"remount,size={size}k", place], check=True)
            try:
                run(output=place / "out", shard_size=20)
                break
            except (CorpusError, OSError) as error:
                lines.append(str(error))
            assert not [path for path in place.rglob(".*") if path.name != ".out.lock"]
            assert all(pq.read_metadata(shard).num_rows == 20 for shard in (place / "out" / "data").glob("*"))
        else:
            subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
            run(output=place / "out", shard_size=20)
        assert corpus.digest(place / "out") == notebook
        assert corpus.verify(place / "out", sample=5).ok
    finally:
        subprocess.run(["umount", "-l", place], check=True)
    assert len(lines) > 2
    assert all("\n" not in line and line.endswith("and the same call continues") for line in lines)


def test_a_line_for_which_there_is_no_room_is_cut_back(tmp_path):
    output = Output(str(tmp_path))
    output.append("metrics.jsonl", "{}")
    with files_of_at_most(10), pytest.raises(CorpusError, match=r"metrics\.jsonl cannot be written: .*continues$"):
        output.append("metrics.jsonl", '{"texts": 100000}')
    output.append("metrics.jsonl", "[]")
    assert output.read("metrics.jsonl") == b"{}\n[]\n"


def test_keys_that_cannot_be_kept_are_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CorpusError, match=r"the keys of texts cannot be kept in .*file: .*; make room there, and the"):
        KeySet(tmp_path / "file")


def test_a_job_is_ended_while_a_thread_is_inside_its_corpus(run, tmp_path, monkeypatch):
    inside, read, before = threading.Event(), plan.read_batches, threading.active_count()

    def endless(*given):
        (batch,) = read(*given)
        while True:  # nothing in it is new the second time, so that the next unit is never made
            yield batch
            inside.set()
            time.sleep(0.001)

    def interrupted(self, record):
        assert inside.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "read_batches", endless)
    monkeypatch.setattr(Progress, "tell", interrupted)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(shard_size=15, engine_options=["processes=1"])
    assert threading.active_count() == before
    assert time.monotonic() - begun < 60
    out = tmp_path / "out"
    assert not [*out.rglob(".*"), *(out / "rows").iterdir(), *(out / "files").glob("*")]
    monkeypatch.undo()
    assert 0 < run().computed < len(TEXTS)


def test_units_that_hang_keep_nobody_from_ending(monkeypatch):
    monkeypatch.setattr("modernbert.corpus.contract.PATIENCE", 0.1)
    inside, leave = threading.Event(), threading.Event()

    def hanging():
        inside.set()
        leave.wait(60)
        yield None

    units = Units(hanging())
    thread = threading.Thread(target=lambda: list(units))
    thread.start()
    assert inside.wait(60)
    units.close()
    leave.set()
    thread.join(60)
    assert list(units) == []


def test_a_batch_that_breaks_is_tried_text_by_text(run, tmp_path, model, monkeypatch):
    from modernbert.pipelines.sentence_embedding import SentenceEmbeddingPipeline

    whole = SentenceEmbeddingPipeline.run
    poison = len(SentenceEmbeddingPipeline.load(model).tokenizer(TEXTS[100]).input_ids)

    def breaking(self, rows, options):
        if any(len(row.ids) == poison for row in rows):
            raise RuntimeError("out of memory")
        return whole(self, rows, options)

    same = sum(len(row) == poison for row in SentenceEmbeddingPipeline.load(model).tokenizer(TEXTS).input_ids)
    monkeypatch.setattr(SentenceEmbeddingPipeline, "run", breaking)
    report = run()
    assert (report.failed, report.texts) == (same, len(TEXTS) - same)
    assert {error["error"] for error in errors(tmp_path / "out")} == {"RuntimeError: out of memory"}


class Death(BaseException):
    """The end of a worker's process."""


def deadly(work, poison):
    """The work of a worker that ends whenever it computes one of these texts."""
    whole = work.transform

    class Deadly:
        schema, machine, prepare = whole.schema, whole.machine, whole.prepare

        def __call__(self, table):
            if poison.intersection(table["text"].to_pylist()):
                raise Death
            return whole(table)

    work.transform = Deadly()
    return work


@pytest.mark.parametrize("poison", [{3}, {0, 70, 71, 150}])
def test_the_text_that_ends_its_worker_is_found_and_the_others_are_answered(model, tmp_path, poison):
    settings, output = Settings("sentence-embedding", str(model)), Output(str(tmp_path / "out"))
    output.write_json(RUN, {"run": "a"})
    keys = settings.keys([(text,) for text in TEXTS])
    unit = unit_of(pa.table({"key": pa.array(keys, pa.binary(32)), "text": TEXTS}))
    record = None
    for _ in range(ATTEMPTS):  # as an engine does
        with contextlib.suppress(Death):
            record = deadly(Work(settings, output, "a"), {TEXTS[i] for i in poison})(unit)
            break
    assert (record["failed"], record["texts"]) == (len(poison), len(TEXTS) - len(poison))
    assert {error["key"] for error in errors(tmp_path / "out")} == {keys[i].hex() for i in poison}
    (file,) = (tmp_path / "out" / "data").iterdir()
    rest = [key for i, key in enumerate(keys) if i not in poison]
    assert pq.read_table(file)["key"].to_pylist() == rest  # in their order
    assert not list((tmp_path / "out" / "work").iterdir())


def test_a_unit_whose_worker_always_ends_becomes_errors(model, tmp_path):
    settings, output = Settings("sentence-embedding", str(model)), Output(str(tmp_path / "out"))
    output.write_json(RUN, {"run": "a"})
    unit = unit_of(
        pa.table({"key": pa.array(settings.keys([(t,) for t in TEXTS[:40]]), pa.binary(32)), "text": TEXTS[:40]})
    )
    record = None
    for _ in range(ATTEMPTS):
        with contextlib.suppress(Death):
            record = deadly(Work(settings, output, "a"), set(TEXTS))(unit)
            break
    assert (record["texts"], record["failed"]) == (0, 40)


def test_a_worker_of_an_earlier_run_writes_nothing(model, tmp_path):
    settings, output = Settings("sentence-embedding", str(model)), Output(str(tmp_path / "out"))
    output.write_json(RUN, {"run": "the next one"})
    unit = unit_of(pa.table({"key": pa.array(settings.keys([("a dog",)]), pa.binary(32)), "text": ["a dog"]}))
    with pytest.raises(CorpusError, match="another run writes"):
        Work(settings, output, "a")(unit)
    assert not (tmp_path / "out" / "data").exists()


def test_processes_that_cannot_load_the_model_end_the_job_with_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("modernbert.corpus.local.sys.executable", "/bin/false")
    unit = unit_of(pa.table({"key": pa.array([b"0" * 32], pa.binary(32)), "text": ["a"]}))
    with pytest.raises(CorpusError, match="a process that loads the model ended with exit code 1, 3 times"):
        list(LocalEngine(processes=1).run(iter([unit]), print))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"places": "nowhere/at all"}, "nowhere/at all is not there"),
        ({"places": []}, "places is empty"),
        ({"places": "no-protocol://x"}, "no-protocol://x cannot be opened"),
        ({"task": "text-generation"}, "text-generation is not run over corpora"),
        ({"task": "poetry"}, "task is 'poetry'; choose one of"),
        ({"engine": "steam"}, "engine is 'steam'; choose one of local"),
        ({"engine_options": ["processes"]}, "write NAME=VALUE"),
        ({"engine_options": ["horses=2"]}, "the engine local has no option horses; there are processes, threads"),
        ({"engine_options": ["processes=-1"]}, "processes is -1; it must be"),
        ({"store": "float8"}, "store is 'float8'; choose one of float32, float16, int8, bits"),
        ({"shard_size": 0}, "shard_size is 0; it must be"),
        ({"colour": "red"}, "sentence-embedding has no option colour; there are"),
        ({"column": ["nose=x"]}, "there is no field 'nose'"),
        ({"keep": ["nose"], "places": "d.parquet"}, "and no 'nose', which keep names"),
    ],
)
def test_wrong_arguments_are_one_line(run, folder, change, message):
    if change.get("places") == "d.parquet":
        change = {**change, "places": folder / "d.parquet"}
    with pytest.raises(InputError) as raised:
        run(**change)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_keys_are_told_apart_in_a_bounded_memory():
    keys = KeySet()
    keys.add_known([b"a" * 32])
    assert keys.meet([b"a" * 32, b"b" * 32, b"a" * 32, b"b" * 32]) == ["known", "new", "again", "again"]
    keys.close()
