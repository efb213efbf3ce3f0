"""`modernbert run` as a user meets it: tables, JSON, pipes and help."""

import io
import json
import subprocess
import sys

import pytest

from tests.commands import called, rows_of, run


def test_a_table_for_each_mask(capsys):
    code, out, err = called(capsys, "run", "The dog ran across the [MASK].", "--top-k", "3")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0] == "The dog ran across the [MASK]."
    assert [w for w in ("score", "word", "text") if w in lines[1] + lines[2]] == ["score", "word", "text"]
    assert sum("The dog ran across the" in line for line in lines) == 4
    _, out, _ = called(capsys, "run", "The [MASK] ran across the [MASK].", "--top-k", "1")
    assert "mask 1" in out
    assert "mask 2" in out


def test_json_one_object_a_line_in_order_from_standard_input_and_from_a_file(tmp_path, capsys):
    texts = [f"Sentence {i} has a [MASK] in it." for i in range(40)] + ["Två [MASK] på svenska: åäö “quoted”."]
    file = tmp_path / "texts.txt"
    file.write_bytes(("\r\n".join(texts) + "\n\n").encode())
    piped = run("run", "--task", "fill-mask", "--json", "--top-k", "2", stdin="\n".join(texts))
    code, read, _ = called(capsys, "run", "--json", "--top-k", "2", "--file", file)
    assert piped.returncode == code == 0, piped.stderr
    assert piped.stdout.decode() == read
    rows = rows_of(read)
    assert [row["input"] for row in rows] == texts
    assert all(set(row) == {"input", "output"} and len(row["output"]) == 2 for row in rows)
    assert set(rows[0]["output"][0]) == {"score", "token", "token_str", "sequence"}
    assert rows_of(called(capsys, "run", "--json", "--top-k", "2", texts[7])[1]) == [rows[7]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (b"", "no text: standard input is empty or blank"),
        (b"\n \n", "no text: standard input is empty or blank"),
        (b"fine [MASK]\n\xff\xfe [MASK]\n", "standard input, line 2, is not UTF-8"),
    ],
)
def test_bad_standard_input_is_one_line_and_exit_code_2(given, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    code, _, err = called(capsys, "run")
    assert code == 2
    assert err.startswith("modernbert: ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_bad_input_ends_a_process_the_same_way():
    done = run("run", "no mask")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"modernbert: there is no [MASK] in 'no mask'; write it where a word is missing\n"


def test_help_lists_the_options_of_the_task_and_version_says_which(capsys):
    for task in (["--task", "ner"], ["--task=token-classification"]):
        assert "--ignore-labels" in called(capsys, "run", *task, "--help")[1]
    general = called(capsys, "run", "--help")[1]
    assert "--ignore-labels" not in general
    assert "--tokenize-kwargs" not in called(capsys, "run", "--task", "feature-extraction", "--help")[1]  # no flag
    assert "--top-k" in general
    assert "train-tokenizer" in called(capsys, "--help")[1]
    assert called(capsys, "--version")[1].startswith("modernbert 0.")


def test_a_gpu_that_is_not_there_is_said_and_the_cpu_serves():
    done = run("run", "--device", "0", "The dog ran across the [MASK].", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert "no GPU; the CPU is used" in done.stderr.decode()


def test_a_reader_that_leaves_is_no_error():
    command = f"{sys.executable} -c 'from modernbert.cli import main; main()' run --json | head -n 1"
    texts = "\n".join(f"Sentence {i} has a [MASK] in it." for i in range(2000))
    done = subprocess.run(["bash", "-c", command], input=texts.encode(), capture_output=True, check=False)
    assert json.loads(done.stdout)["input"].startswith("Sentence 0")
    assert not done.stderr, done.stderr


def test_models_that_share_an_encoder_answer_together(heads, tmp_path, capsys):
    models = ["--model", f"mask={heads / 'MaskedLM'}", "--also", f"vector={heads / 'Model'}:sentence-embedding"]
    texts = ["The dog ran across the [MASK].", "A [MASK] ran."]
    options = ["--option", 'options={"mask": {"top_k": 2}}']
    code, out, err = called(capsys, "run", "--json", *models, *options, *texts)
    assert code == 0, err
    mask = rows_of(called(capsys, "run", "--json", "--model", heads / "MaskedLM", "--top-k", "2", *texts)[1])
    vector = ["--task", "sentence-embedding", "--model", heads / "Model"]
    vectors = rows_of(called(capsys, "run", "--json", *vector, *texts)[1])
    wanted = [{"mask": one["output"], "vector": other["output"]} for one, other in zip(mask, vectors, strict=True)]
    assert [row["output"] for row in rows_of(out)] == wanted
    shown = called(capsys, "run", *models, *options, texts[1])[1]
    assert shown.index("mask: A [MASK] ran.") < shown.index("vector: A [MASK] ran.")
    file = tmp_path / "answers.jsonl"
    assert called(capsys, "run", *models, *options, *texts, "--output", file)[0] == 0
    assert [row["output"] for row in rows_of(file.read_text())] == wanted
    for more, said in (
        (["--top-k", "2"], "--top-k is of one task; with --also give it as --option"),
        (["--task", "fill-mask"], "--task is for one model; with --also give NAME=FOLDER:TASK"),
        (["--also", f"mask={heads / 'Model'}"], "two models are called 'mask'"),
    ):
        code, _, err = called(capsys, "run", *models, *more, texts[0])
        assert code == 2
        assert said in err
        assert len(err.splitlines()) == 1
    assert "--also is given without --model" in called(capsys, "run", "--also", heads / "Model", texts[0])[2]
