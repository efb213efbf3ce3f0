"""The command line for every task: inputs from everywhere, outputs to everywhere, jobs that go on."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from modernbert import pipeline
from modernbert.io.tables import read_records
from modernbert.pipelines import small_model
from tests.commands import answers, called
from tests.io.test_records import written

FEATURES = ["run", "a", "--task", "feature-extraction"]


@pytest.mark.parametrize(
    ("head", "arguments", "call"),
    [
        ("SequenceClassification", ["a dog", "a cat"], lambda p: [p("a dog")[0], p("a cat")[0]]),
        ("SequenceClassification", ["a dog", "--top-k", "2"], lambda p: [p("a dog", top_k=2)]),
        ("TokenClassification", ["Anna", "--aggregation-strategy", "first"],
         lambda p: [p("Anna", aggregation_strategy="first")]),
        ("QuestionAnswering", ["--question", "Who?", "Anna ran."], lambda p: [p(question="Who?", context="Anna ran.")]),
        ("MultipleChoice", ["The dog", "barks", "reads"], lambda p: [p(prompt="The dog", choices=["barks", "reads"])]),
        ("Model", ["a dog"], lambda p: [p("a dog")]),
    ],
)  # fmt: skip
def test_arguments(heads, capsys, head, arguments, call):
    code, out, err = called(capsys, "run", "--model", heads / head, *arguments, "--json")
    assert (code, err) == (0, "")
    serve = pipeline(model=heads / head)
    assert answers(out) == call(serve)
    code, out, _ = called(capsys, "run", "--model", heads / head, *arguments)
    assert code == 0
    assert out.strip()
    if head == "QuestionAnswering":
        code, _, err = called(capsys, "run", "--model", heads / head, "Anna ran.")
        assert code == 2
        assert "--question is not given; the task needs one" in err


def test_zero_shot_and_ranking(heads, capsys):
    where = ["--model", heads / "SequenceClassification", "--task", "zero-shot-classification"]
    code, out, _ = called(capsys, "run", *where, "a dog", "--label", "pets", "--label", "money", "--json")
    assert code == 0
    assert set(answers(out)[0]["labels"]) == {"pets", "money"}
    _, out, _ = called(capsys, "run", "--task", "text-ranking", "a dog", "a cat", "a hound", "--json")
    assert answers(out) == [pipeline("text-ranking")(query="a dog", documents=["a cat", "a hound"])]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_columns(heads, tmp_path, capsys, suffix):
    rows = [{"id": i, "body": f"text {i}", "other": f"pair {i}"} for i in range(30)]
    path = written(tmp_path / f"in{suffix}", rows)
    where = ["run", "--model", heads / "SequenceClassification", "--file", path, "--json"]
    serve = pipeline("text-classification", heads / "SequenceClassification")
    _, out, _ = called(capsys, *where, "--column", "body")
    assert answers(out) == serve([row["body"] for row in rows])
    _, out, _ = called(capsys, *where, "--column", "text=body", "--column", "text_pair=other")
    assert answers(out) == serve([{"text": row["body"], "text_pair": row["other"]} for row in rows])
    code, _, err = called(capsys, *where, *(["--skip-errors"] if suffix != ".jsonl" else []))  # of a table, at once
    assert code == 2
    where = path if suffix != ".jsonl" else f"{path}, record 1,"
    assert err == (
        f"modernbert: {where} has the columns id, body, other; none is known to hold the text. Say which one does: "
        "--column text=COLUMN\n"
    )


def test_columns_of_tasks_with_several_fields(heads, tmp_path, capsys):
    path = tmp_path / "in.csv"
    path.write_text('q,c,a,b\nWho?,"Anna ran.",first,second\n')
    where = ["run", "--file", path, "--json", "--model"]
    columns = ["--column", "question=q", "--column", "context=c"]
    _, out, _ = called(capsys, *where, heads / "QuestionAnswering", *columns)
    assert answers(out) == [pipeline(model=heads / "QuestionAnswering")(question="Who?", context="Anna ran.")]
    columns = ["--column", "prompt=q", "--column", "choices=a,b"]
    _, out, _ = called(capsys, *where, heads / "MultipleChoice", *columns)
    assert answers(out) == [pipeline(model=heads / "MultipleChoice")(prompt="Who?", choices=["first", "second"])]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_output_files(heads, tmp_path, capsys, suffix):
    texts = [f"text number {i}" for i in range(50)]
    (tmp_path / "in.txt").write_text("\n".join(texts))
    where = ["run", "--model", heads / "SequenceClassification", "--file", tmp_path / "in.txt"]
    code, out, err = called(capsys, *where, "--output", tmp_path / f"out{suffix}")
    assert (code, out) == (0, "")
    assert f"50 answers in {tmp_path}" in err
    expected = pipeline("text-classification", heads / "SequenceClassification")(texts)
    rows = list(read_records(tmp_path / f"out{suffix}"))
    if suffix == ".jsonl":
        assert [row["output"] for row in rows] == expected
    else:
        found = [{"text": row["text"], "label": row["label"], "score": float(row["score"])} for row in rows]
        assert found == [{"text": text, **answer} for text, answer in zip(texts, expected, strict=True)]


def test_embed(tmp_path, capsys):
    texts = [f"text number {i}" for i in range(20)]
    (tmp_path / "in.txt").write_text("\n".join(texts))
    expected = pipeline("sentence-embedding")(texts, normalize=True, truncate_dim=32)
    where = ["embed", "--file", tmp_path / "in.txt", "--normalize", "--truncate-dim", "32"]
    assert called(capsys, *where, "--output", tmp_path / "out.npy")[0] == 0
    assert np.array_equal(np.load(tmp_path / "out.npy"), expected)
    assert called(capsys, *where, "--output", tmp_path / "out.parquet")[0] == 0
    rows = list(read_records(tmp_path / "out.parquet"))
    assert [row["text"] for row in rows] == texts
    assert np.array_equal(np.array([row["output"] for row in rows], np.float32), expected)


def test_an_interrupted_job_goes_on_and_gives_the_same_bytes(tmp_path, capsys):
    texts = [f"text number {i} " + "and so on " * (i % 40) for i in range(1500)]
    (tmp_path / "in.txt").write_text("\n".join(texts))
    where = ["embed", "--file", str(tmp_path / "in.txt"), "--output"]
    # A shell that runs the tests in the background has them ignore the signal.
    code = "import signal; signal.signal(2, signal.default_int_handler); from modernbert.cli import main; main()"
    command = [sys.executable, "-c", code, *where, str(tmp_path / "out.npy")]
    partial = tmp_path / "out.npy.partial"
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (partial.exists() and partial.stat().st_size > 10_000):
        time.sleep(0.02)
    job.send_signal(signal.SIGINT)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 130
    assert not (tmp_path / "out.npy").exists()
    done = len(partial.read_bytes().splitlines()) - 1
    assert 0 < done < 1500
    said = f"modernbert: interrupted; {partial} holds {done} answers, and the same command continues after them"
    assert err.decode().splitlines()[-1] == said
    code, _, err = called(capsys, *where, tmp_path / "out.npy")
    assert code == 0
    assert f"holds {done} answers; continuing after them" in err
    assert called(capsys, *where, tmp_path / "once.npy")[0] == 0
    assert (tmp_path / "out.npy").read_bytes() == (tmp_path / "once.npy").read_bytes()
    assert not partial.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "a", "--task", "text-classification"], "text-classification needs one that was trained for it"),
        (["run", "a", "--task", "sentence-embedding", "--output", "x.npy"], "vectors are written by modernbert embed"),
        (["score", "a", "--output", "x.npy"], "vectors are written by modernbert embed"),
        (["run", "--task", "text-ranking", "only a query"], "give a query and then its documents"),
        (["embed", "a", "--output", "x.npy", "--pooling", "best"], "pooling is 'best'; choose one of cls"),
        (["embed", "a"], "Missing option '--output'"),
        (["info", "./none"], "neither a folder on this disk"),
        (["info", str(small_model()), "--lengths", "many"], "--lengths is 'many'"),
        (["attention", ""], "text is empty or only spaces"),
        (["attribution", "no mask"], "there is no [MASK] in the text"),
        ([*FEATURES, "--option", "top_k"], "--option 'top_k': write name=value"),
        ([*FEATURES, "--option", "top_k=2"], "extraction has no --option top_k"),
        ([*FEATURES, "--option", "on_error=return"], "has no --option on_error"),
        ([*FEATURES, "--output", "x.docx"], "x.docx ends with .docx; written are"),
        ([*FEATURES, "--output", "x.csv", "--json"], "give one of them"),
        ([*FEATURES, "--question", "Who?"], "--question is not an option of feature-extr"),
        ([*FEATURES, "--column", "x"], "--column is for files"),
        (["run", "[MASK]", "--file", "."], "texts are given both as arguments and by --file"),
        (["run", "--file", "."], ". is a folder; give a file"),
        (["run", "--file", "none.txt"], "there is no file none.txt"),
        (["run", "no mask"], "there is no [MASK] in 'no mask'; write it where a word is missing"),
        (["run", "[MASK]", "--task", "sing"], "task is 'sing'; choose one of fill-mask"),
        (["run", "[MASK]", "--model", "no-one/nothing"], "no such model in the cache"),
        (["run", "[MASK]", "--top-k", "many"], "'--top-k'"),
        (["run", "[MASK]", "--top-k", "0"], "--top-k is 0"),
        (["run", "[MASK]", "--device", "toaster"], "--device is 'toaster'"),
        (["run", "[MASK]", "--dtype", "int3"], "--dtype is torch.int3"),
        (["run", "[MASK]", "--attn-implementation", "magic"], "--attn-implementation is 'magic'"),
        (["sing"], "No such command 'sing'"),
        (["run", "[MASK]", "--loud"], "No such option"),
    ],
    ids=lambda v: " ".join(v)[:50] if isinstance(v, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, err = called(capsys, *arguments)
    assert code == 2
    lines = [line for line in err.splitlines() if "the package's small encoder" not in line]
    assert len(lines) == 1, err
    assert lines[0].startswith("modernbert: ")
    assert message in lines[0]
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_info_says_what_a_checkpoint_is(heads, capsys):
    code, out, _ = called(capsys, "info", small_model())
    assert code == 0
    for part in ("ModernBertForMaskedLM", "3,937,792", "64 tokens to either side", "model.safetensors", "7.9 MB"):
        assert part in out
    code, out, _ = called(capsys, "info", heads / "SequenceClassification", "--json", "--lengths", "100,200")
    found = json.loads(out)
    model = pipeline("text-classification", heads / "SequenceClassification").model
    assert found["model"]["parameters"] == model.num_parameters()
    assert found["labels"] == {"0": "LABEL_0", "1": "LABEL_1"}
    assert found["architecture"]["global layers"] == [0, 3]
    assert found["files"]["config.json"] == (heads / "SequenceClassification" / "config.json").stat().st_size
    small, large = (found["memory"][n] for n in ("100", "200"))
    assert small < large


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be read here")
def test_the_memory_that_info_gives_is_about_what_a_forward_pass_takes():
    code = """
import torch
from pathlib import Path
from modernbert import ModernBertConfig, ModernBertModel
from modernbert.tools.info import activation_bytes

def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

config = ModernBertConfig(num_hidden_layers=2, vocab_size=60000)
model = ModernBertModel(config).optimize_for_inference()
ids = torch.randint(5, 1000, (24000,))
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = memory("VmRSS")
with torch.inference_mode():
    model(ids, cu_seqlens=torch.arange(0, 24001, 500))
print((memory("VmHWM") - before) / activation_bytes(config, 24000, 4))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.6 < float(done.stdout) < 1.6, done.stdout


def test_pages_are_written(heads, tmp_path, capsys):
    code, out, _ = called(capsys, "attention", "The dog ran.", "--output", tmp_path / "a.html")
    assert (code, "6 layers, " in out) == (0, True)
    code, out, _ = called(
        capsys,
        *("attribution", "The dog ran.", "--model", heads / "SequenceClassification", "--target", "LABEL_1"),
        *("--output", tmp_path / "b.html"),
    )
    assert code == 0
    assert out.startswith("LABEL_1: score 0.")
    assert all((tmp_path / name).read_text().startswith("<!doctype html>") for name in ("a.html", "b.html"))
