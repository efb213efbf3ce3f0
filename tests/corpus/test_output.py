"""What an output holds, how it is kept, and what is refused."""

import contextlib
import json

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from modernbert import corpus, pipeline
from modernbert.corpus import CorpusError, Settings, plan
from modernbert.corpus.output import Output, read_parquet
from modernbert.corpus.progress import Progress
from modernbert.errors import InputError
from tests.corpus.conftest import TEXTS
from tests.pipelines.test_streams import CASES


def table_of(output):
    return pa.concat_tables(corpus.answers(output))


def by_text(table, settings, texts):
    """Rows of a table, in the order of texts."""
    rows = {row["key"]: row for row in table.to_pylist()}
    return [rows[key] for key in settings.keys([(text,) for text in texts])]


def test_vectors_are_stored_each_for_itself(run, tmp_path, model):
    vectors = pipeline("sentence-embedding", model)(TEXTS)
    found = {}
    for store in ("float32", "float16", "int8", "bits"):
        run(output=tmp_path / store, store=store, shard_size=9)
        table = table_of(tmp_path / store)
        found[store] = by_text(table, Settings("sentence-embedding", str(model)), TEXTS)
        run(output=tmp_path / f"{store} again", store=store)
        assert corpus.digest(tmp_path / store) == corpus.digest(tmp_path / f"{store} again")
    assert (np.array([row["vector"] for row in found["float32"]], np.float32) == vectors).all()
    assert (np.array([row["vector"] for row in found["float16"]]) == vectors.astype(np.float16)).all()
    codes = np.array([row["vector"] for row in found["int8"]])
    scales = np.array([row["scale"] for row in found["int8"]])[:, None]
    assert (np.abs(codes).max(1) == 127).all()
    assert (np.abs(codes * scales - vectors) <= scales / 2 * 1.001).all()
    bits = np.unpackbits(np.array([row["vector"] for row in found["bits"]], np.uint8), axis=1)
    assert (bits[:, : vectors.shape[1]] == (vectors > 0)).all()


TASKS = {task: case for task, case in CASES.items() if task not in ("text-generation", "text-ranking")}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_its_answers_as_columns(run, tmp_path, heads, task):
    head, options, make = TASKS[task]
    texts = TEXTS[:12]
    items = [make(text) for text in texts]
    rows = [item if isinstance(item, dict) else {"text": item} for item in items]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = run(tmp_path / "in.jsonl", task=task, model=heads / head, shard_size=5, **options)
    assert (report.texts, report.failed) == (len(texts), 0)
    whole = pipeline(task, heads / head, **options)
    expected = list(whole.stream(items))
    settings = Settings(task, str(heads / head), options=options)
    keys = settings.keys([[row.get(f.name) for f in settings.form] for row in rows])
    found = {row["key"]: row for row in table_of(tmp_path / "out").to_pylist()}
    for key, answer in zip(keys, expected, strict=True):
        check_row(found[key], answer)
    assert corpus.verify(tmp_path / "out", sample=6).identical >= 6


def check_row(row, answer):
    """A row has what the pipeline answered."""
    if "vector" in row or "vectors" in row:
        numbers = np.array(row.get("vector") or row["vectors"], np.float32)
        assert (numbers == np.array(answer, np.float32).reshape(numbers.shape)).all()
    elif "labels" in row:
        given = answer if isinstance(answer, dict) else {f"{n}s": [a[n] for a in answer] for n in ("label", "score")}
        assert row["labels"] == given["labels"]
        assert np.float32(row["scores"]).tolist() == np.float32(given["scores"]).tolist()
    elif "tags" in row:
        assert [(tag["entity"], tag["word"], tag["start"]) for tag in row["tags"]] == [
            (tag["entity"], tag["word"], tag["start"]) for tag in answer
        ]
    else:
        assert json.loads(row["answer"]) == json.loads(json.dumps(answer, default=lambda value: value.tolist()))


def test_pairs_are_scored_as_a_ranking_scores_them(run, tmp_path, heads):
    serve = pipeline("text-ranking", heads / "Model")
    documents = TEXTS[:9]
    expected = {answer["text"]: answer["score"] for answer in serve("a dog", documents)}
    (tmp_path / "in.txt").write_text("\n".join(documents) + "\n")
    run(tmp_path / "in.txt", task="text-ranking", model=heads / "Model", query="a dog", shard_size=4)
    settings = Settings("text-ranking", str(heads / "Model"), fixed={"query": "a dog"})
    rows = by_text(table_of(tmp_path / "out"), settings, documents)
    assert [row["score"] for row in rows] == [np.float32(expected[text]) for text in documents]


def test_a_label_and_its_score(run, tmp_path, heads):
    model = heads / "SequenceClassification"
    run(task="text-classification", model=model)
    rows = by_text(table_of(tmp_path / "out"), Settings("text-classification", str(model)), TEXTS[:5])
    for row, answer in zip(rows, pipeline("text-classification", model)(TEXTS[:5]), strict=True):
        assert (row["label"], row["score"]) == (answer["label"], np.float32(answer["score"]))


def test_sparse_vectors_are_entries_and_weights(run, tmp_path, heads):
    run(task="sparse-embedding", model=heads / "MaskedLM", top_k=8)
    answers = pipeline("sparse-embedding", heads / "MaskedLM", top_k=8)(TEXTS[:5])
    settings = Settings("sparse-embedding", str(heads / "MaskedLM"), options={"top_k": 8})
    for row, answer in zip(by_text(table_of(tmp_path / "out"), settings, TEXTS[:5]), answers, strict=True):
        assert row["indices"] == answer["indices"].tolist()
        assert row["values"] == answer["values"].tolist()


def test_a_later_run_computes_what_is_new_alone(run, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("one\ntwo\n")
    assert run(folder).computed == 2
    before = {file.name: file.read_bytes() for file in (tmp_path / "out" / "data").iterdir()}
    (folder / "a.txt").write_text("two\nthree\n")
    (folder / "b.txt").write_text("one\nfour\nthree\n")
    report = run(folder)
    assert (report.computed, report.texts, report.duplicates) == (2, 4, 1)
    after = {file.name: file.read_bytes() for file in (tmp_path / "out" / "data").iterdir()}
    assert before.items() < after.items()


def test_another_model_or_other_options_are_refused_with_what_differs(run, tmp_path, heads):
    run()
    for change, message in (
        (
            {"model": heads / "MultiVector", "task": "late-interaction"},
            "task was 'sentence-embedding' and is 'late-int",
        ),
        ({"model": heads / "MaskedLM"}, "model.safetensors was '"),
        ({"normalize": True}, "normalize was not given and is True"),
        ({"store": "int8"}, "store was 'float32' and is 'int8'"),
        ({"dtype": "bfloat16"}, "dtype was not given and is 'bfloat16'"),
    ):
        with pytest.raises(InputError, match="was made with something else") as raised:
            run(**change)
        assert message in str(raised.value)
    assert corpus.verify(tmp_path / "out", sample=0).ok


def test_the_manifest_says_what_made_the_shards(run, tmp_path):
    run(shard_size=100, prompt="about: ")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["is complete"]
    assert manifest["counts"] == {
        "rows": 164,
        "unreadable": 0,
        "duplicates": 4,
        "texts": 160,
        "failed": 0,
        "truncated": 0,
        "tokens": manifest["counts"]["tokens"],
    }
    assert set(manifest["made with"]["the model's files"]) == {"config.json", "model.safetensors", *TOKENIZER}
    (machine,) = manifest["machines"]
    assert machine["dtype"] == "float32"
    assert {"kernels", "features", "versions", "attention", "prompt"} <= set(machine)
    assert machine["prompt"] == "about: "
    assert sum(shard["texts"] for shard in manifest["shards"].values()) == 160
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["texts"] == 160
    assert lines[-1]["tokens_per_second"] > 0


TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}


def test_verifying_finds_damage_and_other_numbers(run, tmp_path):
    run(shard_size=50)
    report = corpus.verify(tmp_path / "out", sample=20)
    assert (report.ok, report.shards, report.texts, report.identical) == (True, 4, 20, 20)
    manifest = tmp_path / "out" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"torch": "', '"torch": "0.'))
    assert not corpus.verify(tmp_path / "out", sample=20).is_same_machine
    manifest.write_text(text)
    one, other, *_ = sorted((tmp_path / "out" / "data").iterdir())
    content = bytearray(one.read_bytes())
    content[200] ^= 1
    one.write_bytes(content)
    other.unlink()
    report = corpus.verify(tmp_path / "out", sample=0)
    assert not report.ok
    assert report.damaged == [one.name, other.name]


def test_other_bits_are_measured(run, tmp_path):
    import hashlib

    run()
    (file,) = (tmp_path / "out" / "data").iterdir()
    table = pq.read_table(file)
    vectors = table["vector"].combine_chunks()
    moved = pa.FixedSizeListArray.from_arrays(pa.array(vectors.flatten().to_numpy() + np.float32(0.25)), 48)
    pq.write_table(table.set_column(1, "vector", moved), file)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["shards"][file.stem]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    report = corpus.verify(tmp_path / "out", sample=10)
    assert (report.ok, report.texts, report.identical) == (False, 10, 0)
    assert 0.2499 < report.largest < 0.2501


def test_files_are_read_and_shards_written_wherever_fsspec_does(run, folder, notebook):
    memory = fsspec.filesystem("memory")
    for file in folder.iterdir():
        memory.pipe_file(f"/corpus/{file.name}", file.read_bytes())
    try:
        assert run("memory://corpus", "memory://vectors", shard_size=30).texts == len(TEXTS)
        assert corpus.digest("memory://vectors") == notebook
        assert run("memory://corpus/*.csv", "memory://vectors").computed == 0
        assert corpus.verify("memory://vectors", sample=5).ok
    finally:
        memory.rm("/corpus", recursive=True)
        memory.rm("/vectors", recursive=True)


def test_a_lance_dataset_holds_each_text_once_also_after_an_interruption(run, tmp_path, monkeypatch):
    lancedb = pytest.importorskip("lancedb")
    from modernbert.corpus import lance

    (tmp_path / "in.txt").write_text("\n".join(TEXTS[:90]) + "\n")
    monkeypatch.setattr(lance, "_TOGETHER", 2)
    write, calls = lance.Output.write_json, []

    def interrupted(self, name, value):
        calls.append(name)
        if calls.count("lance.json") == 4:  # shards are added, and not noted
            raise KeyboardInterrupt
        write(self, name, value)

    monkeypatch.setattr(lance.Output, "write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "in.txt", format="lance", shard_size=10)
    monkeypatch.setattr(lance.Output, "write_json", write)
    run(tmp_path / "in.txt", format="lance", shard_size=10)
    rows = lancedb.connect(str(tmp_path / "out")).open_table("corpus").to_arrow()
    assert rows.num_rows == 90
    assert corpus.digest_of([rows]) == corpus.digest(tmp_path / "out")


def test_an_output_is_one_jobs_at_a_time(run, tmp_path):
    from modernbert.io.files import locked

    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out", "x"), pytest.raises(InputError, match="another process writes to"):
        run()


def test_what_is_no_output_is_refused(run, tmp_path):
    for call in (corpus.verify, lambda place: list(corpus.answers(place))):
        with pytest.raises(InputError, match="is no output of a corpus"):
            call(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text('{"shards": 3}')
    with pytest.raises(InputError, match="is of no corpus of format 1"):
        run()


class Disk(MemoryFileSystem):
    """A remote disk: what is written is seen as far as it is there, and files are renamed to names that are free."""

    protocol, store, pseudo_dirs, is_silent = "disk", {}, [""], False

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace(f"{cls.protocol}://", "/"))

    def mv(self, path1, path2, **options):
        if self.exists(path2):
            if self.is_silent:
                return
            raise FileExistsError(path2)
        self.store[path2] = self.store.pop(path1)

    def pipe_file(self, path, value, **options):
        assert path.rpartition("/")[2].startswith(".")  # what is half-written has no name yet
        with self.open(path, "wb") as file:
            file.write(value[: len(value) // 2])
            file.write(value[len(value) // 2 :])


class SilentDisk(Disk):
    """One that says nothing where it does not rename."""

    protocol, store, pseudo_dirs, is_silent = "silent", {}, [""], True


@pytest.fixture(params=["memory", "disk", "silent"])
def elsewhere(request):
    """An address of a place that is not of this machine."""
    for system in (Disk, SilentDisk):
        fsspec.register_implementation(system.protocol, system, clobber=True)
    yield f"{request.param}://vectors"
    with contextlib.suppress(FileNotFoundError):
        fsspec.filesystem(request.param).rm("/vectors", recursive=True)


def test_a_file_elsewhere_is_seen_once_it_is_whole(elsewhere, monkeypatch):
    output = Output(elsewhere)
    for content in (b"x" * 100_000, b"y" * 50_000):
        with output.writing("rows/a") as file:
            file.write(content)
            file.flush()
            assert output.read("rows/a") in (None, b"x" * 100_000)
        assert output.read("rows/a") == content
    monkeypatch.setattr("modernbert.corpus.output._AT_ONCE", 10)  # a large file is sent in pieces
    output.write("rows/b", b"z" * 1000)
    with output.writing("rows/b") as file:
        file.write(b"w" * 1000)
    assert output.read("rows/b") == b"w" * 1000
    with contextlib.suppress(KeyboardInterrupt), output.writing("rows/a") as file:
        file.write(b"z")
        raise KeyboardInterrupt
    assert output.read("rows/a") == b"y" * 50_000
    assert {name.rpartition("/")[2] for name in output.system.find("/vectors")} == {"a", "b"}


@pytest.mark.parametrize("elsewhere", ["disk", "silent"], indirect=True)
def test_a_file_elsewhere_that_cannot_be_replaced_stays_as_it_was(elsewhere, monkeypatch):
    output = Output(elsewhere)
    output.write("a", b"old")
    move = type(output.system).mv

    def refused(self, path1, path2, **options):
        if path2.endswith("/a") and self.cat_file(path1) == b"new" and not self.exists(path2):
            raise PermissionError("not now")
        move(self, path1, path2, **options)

    monkeypatch.setattr(type(output.system), "mv", refused)
    with pytest.raises(CorpusError, match="/vectors/a cannot be written: not now; the same call continues"):
        output.write("a", b"new")
    assert output.read("a") == b"old"
    assert [name.rpartition("/")[2] for name in output.system.find("/vectors")] == ["a"]


def test_a_job_elsewhere_shows_no_rows_of_a_file_that_it_still_reads(elsewhere, run, folder, notebook, monkeypatch):
    seen = []
    tell = Progress.tell
    monkeypatch.setattr(Progress, "tell", lambda self, record: (seen.append(rows()), tell(self, record)))

    def rows():
        names = Output(elsewhere).names("rows")
        return [len(read_parquet(Output(elsewhere).open(f"rows/{name}"))) for name in names]

    assert run(output=elsewhere, shard_size=30).texts == len(TEXTS)
    assert [len(some) for some in seen] == [0, 1, 2, 3, 3, 4]  # of four files, which are read as texts are needed
    assert {count for some in seen for count in some} == {41}
    Output(elsewhere).system.pipe_file("/vectors/data/.left.tmp", b"of a run that was killed")
    assert run(output=elsewhere).computed == 0
    assert corpus.digest(elsewhere) == notebook
    assert corpus.verify(elsewhere, sample=5).ok
    is_disk = not elsewhere.startswith("memory")
    assert Output(elsewhere).system.exists("/vectors/data/.left.tmp") != is_disk


def test_a_place_elsewhere_that_fails_is_one_line_and_the_job_continues(elsewhere, run, notebook, monkeypatch):
    system = type(Output(elsewhere).system)
    pipe = system.pipe_file

    class ResetError(Exception):
        pass

    def reset(self, path, value, **options):
        if len(value) > 8000:
            raise ResetError("the connection\nwas reset")
        pipe(self, path, value, **options)

    monkeypatch.setattr(system, "pipe_file", reset)
    with pytest.raises(CorpusError, match=r"parquet cannot be written: the connection was reset; the same call cont"):
        run(output=elsewhere)
    monkeypatch.undo()
    run(output=elsewhere)
    assert corpus.digest(elsewhere) == notebook


def test_a_digest_tells_types_apart_and_not_what_arrow_makes_of_them():
    def digest(**columns):
        return corpus.digest_of([pa.table({"key": pa.array([b"k" * 32], pa.binary(32)), **columns})])

    half = np.array([1.5, 2.5, -3.0, 4.0], np.float16)
    vectors = [pa.FixedSizeListArray.from_arrays(pa.array(some), len(some)) for some in (half, half.view(np.float32))]
    assert digest(vector=vectors[0]) != digest(vector=vectors[1])
    values = [pa.array([7], kind) for kind in (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8())]
    assert len({digest(indices=value) for value in values}) == len(values)
    lists = [pa.array([[1, 2]], pa.list_(kind)) for kind in (pa.int32(), pa.int64())]
    assert digest(indices=lists[0]) != digest(indices=lists[1])
    assert digest(indices=values[0]) != digest(values=values[0])
    alike = [
        *(pa.list_(pa.field("item", pa.string())), pa.list_(pa.field("element", pa.large_string(), False))),
        *(pa.large_list(pa.string()), pa.list_view(pa.string_view())),
    ]
    assert len({digest(labels=pa.array([["a", "b"]], kind)) for kind in alike}) == 1
    nested = pa.list_(pa.list_(pa.float32(), 2)), pa.large_list(pa.list_(pa.field("x", pa.float32()), 2))
    assert len({digest(vectors=pa.array([[[1.0, 2.0]]], kind)) for kind in nested}) == 1
    assert digest(a=values[0], b=lists[0]) == digest(b=lists[0], a=values[0])
    table = pa.table({"key": pa.array([b"k" * 32], pa.binary(32)), "score": pa.array([1.0], pa.float32())})
    with pytest.raises(InputError, match=r"have the columns score \(float\), and one has score \(double\)"):
        corpus.digest_of([table, table.set_column(1, "score", pa.array([1.0]))])


def test_shards_without_a_manifest_are_not_added_to(run, tmp_path):
    run()
    manifest = tmp_path / "out" / "manifest.json"
    for change in (lambda: manifest.write_text('{"manifest"'), manifest.unlink):
        change()
        with pytest.raises(InputError, match=r"has shards, and manifest\.json is missing or damaged"):
            run()


def test_rows_are_noted_in_groups_and_a_sample_reads_those_that_it_needs(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "_GROUP", 100)
    texts = [f"{i} {i * i % 97}" for i in range(950)]
    table = pa.table({"id": pa.array([f"id {i % 7}" for i in range(950)]).dictionary_encode(), "text": texts})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=40)
    run(tmp_path / "in.parquet", keep=["id"])
    (rows,) = (tmp_path / "out" / "rows").iterdir()
    about = pq.read_metadata(rows)
    assert (about.num_rows, about.num_row_groups) == (
        950,
        8,
    )  # 40 rows are read at a time, up to the ends of the file's groups
    assert [row["id"] for row in pq.read_table(rows).to_pylist()] == table["id"].to_pylist()
    assert corpus.verify(tmp_path / "out", sample=30).identical == 30
