"""One result, whatever ran it: the hash of keys and vectors is that of a pipeline in a notebook."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modernbert import corpus
from modernbert.corpus import Settings, Transform
from modernbert.corpus.local import LocalEngine
from modernbert.corpus.output import Output
from modernbert.corpus.work import RUN, Work, unit_of
from tests.clusters import children
from tests.corpus.conftest import TEXTS, write_corpus


@pytest.mark.parametrize("options", [{}, {"shard_size": 7}, {"shard_size": 1}, {"batch_tokens": 64, "shard_size": 50}])
def test_shards_and_batches_of_any_size_give_the_notebooks_bits(run, tmp_path, notebook, options):
    report = run(**options)
    assert (report.rows, report.texts, report.duplicates) == (len(TEXTS) + 4, len(TEXTS), 4)
    assert corpus.digest(tmp_path / "out") == notebook


def test_another_order_of_files_and_texts_gives_the_same_bits(run, tmp_path, notebook):
    texts = list(TEXTS)
    random.Random(5).shuffle(texts)
    run(write_corpus(tmp_path / "in", texts, ("z.txt", "y.jsonl", "x.csv", "w.parquet")), shard_size=33)
    assert corpus.digest(tmp_path / "out") == notebook


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_give_the_same_bits(run, tmp_path, notebook, processes):
    run(shard_size=20, engine_options=[f"processes={processes}", "threads=1"])
    assert corpus.digest(tmp_path / "out") == notebook


def test_a_digest_sees_a_single_bit_and_needs_no_more_memory_than_a_part(run, tmp_path, notebook):
    run(shard_size=40)
    tables = list(corpus.answers(tmp_path / "out"))
    assert corpus.digest_of(tables[::-1]) == corpus.digest_of(lambda: iter(tables), parts=7) == notebook
    vectors = tables[0]["vector"].combine_chunks()
    bits = bytearray(vectors.flatten().buffers()[1])
    bits[0] ^= 1
    numbers = pa.Array.from_buffers(pa.float32(), len(vectors.flatten()), [None, pa.py_buffer(bytes(bits))])
    other = pa.FixedSizeListArray.from_arrays(numbers, vectors.type.list_size)
    changed = tables[0].set_column(1, "vector", other)
    assert corpus.digest_of([changed, *tables[1:]]) != notebook
    assert corpus.digest_of(tables[1:]) != notebook


JOB = """
import json, sys
from modernbert import corpus
places, output, model, engine = sys.argv[1:]
corpus.run(places, output, "sentence-embedding", model, shard_size=4, **json.loads(engine))
"""


def killed_after(shards, places, output, model, engine):
    """Begin a job, and end it with SIGKILL once it has so many shards; the processes that it had started then."""
    job = subprocess.Popen([sys.executable, "-c", JOB, *map(str, (places, output, model, json.dumps(engine)))])
    deadline = time.monotonic() + 300
    started = []
    while job.poll() is None and time.monotonic() < deadline:
        if output.is_dir() and len(list((output / "data").glob("[!.]*"))) >= shards:
            started = children(job.pid)
            job.kill()
            break
        time.sleep(0.002)
    assert job.wait() == -signal.SIGKILL
    return started


def check_resumed(run, places, output, model, engine, moments):
    """Kill a job at these moments and finish it; the processes that were running when it was killed."""
    texts = [f"{i} {TEXTS[i % len(TEXTS)]}" for i in range(600)]
    write_corpus(places, texts)
    started = [killed_after(shards, places, output, model, engine) for shards in moments]
    (output / ".keys-left").mkdir()
    report = run(places, output, shard_size=16)
    assert not list(output.rglob(".*"))  # nothing is left of the runs that were killed
    assert 0 < report.computed < len(texts)
    assert report.texts == len(texts)
    whole = output.with_name("whole")
    run(places, whole)
    assert corpus.digest(output) == corpus.digest(whole)
    assert corpus.verify(output, sample=5).ok  # which finds texts that stand in two shards
    return [number for some in started for number in some]


def check_ended(processes, seconds):
    """Wait until none of these processes is left."""
    until = time.monotonic() + seconds
    while any(os.path.exists(f"/proc/{number}/exe") for number in processes):  # noqa: PTH110 (it is a broken link)
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_job_killed_twice_continues_and_has_the_same_bits(run, tmp_path, model):
    check_resumed(run, tmp_path / "in", tmp_path / "out", model, {"engine_options": ["processes=0"]}, [3, 40])


@pytest.mark.slow  # starts a dozen processes
def test_a_job_of_two_processes_killed_five_times_has_the_same_bits(run, tmp_path, model):
    moments = sorted(random.Random(3).sample(range(1, 100), 5))
    engine = {"engine_options": ["processes=2"]}
    started = check_resumed(run, tmp_path / "in", tmp_path / "out", model, engine, moments)
    assert started
    check_ended(started, 10)


def test_a_worker_that_is_killed_is_replaced(model, tmp_path, notebook):
    settings, output = Settings("sentence-embedding", str(model)), Output(str(tmp_path / "out"))
    output.write_json(RUN, {"run": "a"})
    keys = settings.keys([(text,) for text in TEXTS])
    table = pa.table({"key": pa.array(keys, pa.binary(32)), "text": TEXTS})
    engine = LocalEngine(processes=1, threads=1)
    records = []
    for record in engine.run((unit_of(table.slice(i, 40)) for i in range(0, 160, 40)), Work(settings, output, "a")):
        if not records:
            os.kill(engine.workers[0], signal.SIGKILL)
        records.append(record)
    assert sum(record["texts"] for record in records) == len(TEXTS)
    assert corpus.digest(tmp_path / "out") == notebook


def test_the_callable_knows_no_engine_and_keeps_other_columns(model, notebook):
    transform = Transform(Settings("sentence-embedding", str(model)))
    table = pa.table({"id": range(len(TEXTS)), "text": TEXTS})
    answers = [transform(batch) for batch in table.to_batches(max_chunksize=50)]
    assert corpus.digest_of([answer.drop_columns(["id"]) for answer in answers]) == notebook
    whole = pa.concat_tables(answers)
    assert whole["id"].to_pylist() == list(range(len(TEXTS)))
    assert whole.schema.names == [*transform.schema.names, "id"]
    assert transform.schema.field("vector").type == pa.list_(pa.float32(), 48)


def test_rows_lead_from_a_file_to_its_vectors(run, tmp_path, folder, model):
    run(keep=["id"], places=[folder / "b.jsonl", folder / "d.parquet"])
    tables = [pq.read_table(file) for file in (tmp_path / "out" / "rows").iterdir()]
    assert [table.schema.names for table in tables] == [["file", "row", "key", "id"]] * 2
    rows = [row for table in tables for row in table.to_pylist()]
    assert {row["file"] for row in rows} == {str(folder / "b.jsonl"), str(folder / "d.parquet")}
    (row,) = (row for row in rows if row["file"].endswith("b.jsonl") and row["id"] == "7")
    assert (row["row"], row["key"]) == (7, Settings("sentence-embedding", str(model)).keys([(TEXTS[46],)])[0])
    assert {type(row["id"]) for row in rows if row["file"].endswith("d.parquet")} == {int}
