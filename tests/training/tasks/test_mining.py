"""Hard negatives: the ranking of a plain product of all vectors, limits, and tables that fine-tuning reads."""

import json
import random

import numpy as np
import pytest

from modernbert import finetune, pipeline
from modernbert.errors import InputError
from modernbert.io.tables import read_records
from modernbert.training import mine
from tests.commands import called
from tests.training.tasks.conftest import pair_rows, sentence

SMALL = {"num_hidden_layers": 2}
TASKS = {
    "sentence-embedding": "ModernBertModel",
    "sparse-embedding": "ModernBertForMaskedLM",
    "late-interaction": "ModernBertModel",
}


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """Makes a folder of a task's model."""
    made = {}

    def folder(task):
        if task not in made:
            made[task] = tmp_path_factory.mktemp("models") / task
            options = {"max_steps": 2, "batch_size": 8, "progress": False, "query_prompt": "q "}
            finetune(task, pair_rows(16), output=made[task], model=base(TASKS[task], **SMALL), **options)
        return made[task]

    return folder


def scores_of(task, folder, queries, documents):
    """All similarities, by the pipelines alone."""
    serve = pipeline(task, folder)
    if task == "sentence-embedding":
        a, b = serve(queries, prompt_name="query"), serve(documents)
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
        return a @ b.T
    if task == "sparse-embedding":
        return (serve.csr(queries, is_query=True) @ serve.csr(documents).T).toarray()
    return serve.similarity(serve(queries, is_query=True), serve(documents))


@pytest.mark.parametrize("limits", [{}, {"skip": 2, "most_similar": 0.99}, {"margin": 0.01}], ids=str)
@pytest.mark.parametrize("task", list(TASKS))
def test_negatives_are_the_best_ranked_documents_of_others(task, limits, trained, tmp_path, monkeypatch):
    monkeypatch.setattr("modernbert.training.mining._BLOCK", 7)
    monkeypatch.setattr("modernbert.training.mining._QUERIES", 5)
    rows = pair_rows(20)
    rows.append({"anchor": rows[0]["anchor"], "positive": rows[3]["positive"]})  # a query with two right documents
    found = mine(rows, trained(task), tmp_path / "hard.jsonl", negatives=3, **limits)
    table = list(read_records(tmp_path / "hard.jsonl"))
    assert [(row["anchor"], row["positive"]) for row in table] == [(row["anchor"], row["positive"]) for row in rows]
    documents = list(dict.fromkeys(row["positive"] for row in rows))
    scores = scores_of(task, trained(task), [row["anchor"] for row in rows], documents)
    for i, row in enumerate(table):
        right = {other["positive"] for other in rows if other["anchor"] == row["anchor"]}
        least = min(scores[i][documents.index(text)] for text in right)
        most = least - limits.get("margin", 0) if "margin" in limits else np.inf
        most = least - abs(least) * 0.01 if "most_similar" in limits else most
        allowed = [j for j in np.argsort(-scores[i]) if documents[j] not in right and scores[i][j] <= most]
        expected = [documents[j] for j in allowed[limits.get("skip", 0) :][:3]]
        assert row["negatives"] == expected
    assert found.rows == 21
    assert found.negatives == sum(len(row["negatives"]) for row in table)
    assert found.lacking == sum(len(row["negatives"]) < 3 for row in table)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_table_with_a_teachers_scores_trains_every_task(suffix, trained, base, tmp_path, capsys):
    teacher = base("ModernBertForSequenceClassification", num_labels=1, **SMALL)
    pairs, output = tmp_path / "pairs.jsonl", tmp_path / f"hard{suffix}"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in pair_rows(12)))
    rng = random.Random(5)
    (tmp_path / "corpus.txt").write_text("".join(sentence(rng) + "\n" for _ in range(30)))
    command = ["mine", "--pairs", pairs, "--corpus", tmp_path / "corpus.txt", "--model", trained("sentence-embedding")]
    command += ["--teacher", teacher, "--teacher-margin", "-0.2", "--negatives", "2", "--output", output]
    code, said, err = called(capsys, *command)
    assert code == 0, err
    assert said.startswith("12 rows, ")
    rows = list(read_records(output))
    serve = pipeline("text-ranking", teacher, activation="none", dtype="float32")
    lists = [{n: v if isinstance(v, list) else json.loads(v) for n, v in r.items() if n not in ("anchor", "positive")}
             for r in rows]  # fmt: skip
    corpus = set((tmp_path / "corpus.txt").read_text().splitlines())
    for row, of_row in zip(rows, lists, strict=True):
        assert set(of_row["negatives"]) <= corpus
        assert all(score <= of_row["scores"][0] + 0.2 for score in of_row["scores"][1:])
        answer = serve(query=row["anchor"], documents=[row["positive"], *of_row["negatives"]])
        expected = [one["score"] for one in sorted(answer, key=lambda one: one["index"])]
        assert of_row["scores"] == pytest.approx(expected, abs=1e-5)
    assert any(of_row["negatives"] for of_row in lists)
    full = [dict(row, **of_row) for row, of_row in zip(rows, lists, strict=True) if of_row["negatives"]]
    options = {"max_steps": 1, "progress": False, "held_out": 0.0, "loss": "kl"}
    for task in ("late-interaction", "text-ranking"):
        kind = "ModernBertModel" if task == "late-interaction" else "ModernBertForSequenceClassification"
        finetune(task, full, output=tmp_path / task, model=base(kind, **SMALL), **options)
    finetune("sentence-embedding", output, output=tmp_path / "run", model=base("ModernBertModel", **SMALL), max_steps=1,
             progress=False)  # fmt: skip


def test_an_interrupted_job_goes_on_and_another_one_is_refused(trained, base, tmp_path, monkeypatch):
    from modernbert.training import mining

    teacher = base("ModernBertForSequenceClassification", num_labels=1, **SMALL)
    monkeypatch.setattr(mining, "_TOGETHER", 4)
    rows, calls = pair_rows(12), []
    common = {"model": trained("sentence-embedding"), "teacher": str(teacher), "negatives": 2}
    mine(rows, output=tmp_path / "whole.jsonl", **common)
    ask = mining.Teacher.__call__

    def struck(self, asked):
        calls.append(len(asked))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return ask(self, asked)

    monkeypatch.setattr(mining.Teacher, "__call__", struck)
    with pytest.raises(KeyboardInterrupt):
        mine(rows, output=tmp_path / "hard.jsonl", **common)
    assert not (tmp_path / "hard.jsonl").exists()
    with pytest.raises(InputError, match=r"is of another job: .*negatives was 2 and is 3"):
        mine(rows, output=tmp_path / "hard.jsonl", **{**common, "negatives": 3})
    calls.clear()
    found = mine(rows, output=tmp_path / "hard.jsonl", **common)
    assert calls == [4]  # what was scored before is not scored again
    assert found.rows == 12
    assert (tmp_path / "hard.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    with pytest.raises(InputError, match="exists already"):
        mine(rows, output=tmp_path / "hard.jsonl", **common)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_margin": 1.0}, "teacher_margin is given without a teacher"),
        ({"teacher": "x", "candidates": 2}, "candidates is 2 and negatives 4; give at least as many"),
        ({"negatives": 0}, "negatives is 0"),
        ({"column": ["answer=x"]}, "there is no field 'answer'; this task has anchor, positive, text"),
        ({"corpus": [{"a": "b"}]}, "none is known to hold the text"),
        ({"model": "/no/model"}, "/no/model"),
        ({"model": None}, "model is not given"),
    ],
)
def test_what_cannot_be_mined_is_one_error(options, message, trained, tmp_path):
    common = {"model": trained("sentence-embedding"), **options}
    with pytest.raises(ValueError, match=message) as error:
        mine(pair_rows(4), output=tmp_path / "hard.jsonl", **common)
    assert len(str(error.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())
