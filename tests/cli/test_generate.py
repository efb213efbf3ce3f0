"""`modernbert run --task text-generation`, which streams, and `modernbert score`."""

import contextlib
import json
import math
import os
import pty
import subprocess
import sys

import pytest

from modernbert import pipeline
from tests.cli.test_run import run

TEXTS = ["The dog ran", "A cat sat"]


def test_text_is_what_json_gives(heads):
    options = ["--task", "text-generation", "--model", str(heads / "CausalLM"), "--max-new-tokens", "9", "--seed", "4"]
    streamed = run("run", *options, *TEXTS)
    assert streamed.returncode == 0, streamed.stderr
    rows = [json.loads(line) for line in run("run", *options, "--json", *TEXTS).stdout.splitlines()]
    assert [row["input"] for row in rows] == TEXTS
    expected = [row["output"][0]["generated_text"] for row in rows]
    assert streamed.stdout.decode() == "".join(f"{text}\n\n" for text in expected)
    serve = pipeline("text-generation", heads / "CausalLM", max_new_tokens=9, seed=4)
    assert [answer[0]["generated_text"] for answer in serve(TEXTS)] == expected
    without = run("run", *options, "--option", "return_full_text=false", TEXTS[0])
    assert TEXTS[0] + without.stdout.decode() == f"{expected[0]}\n\n"


def test_a_terminal_sees_the_text_as_it_comes(heads):
    """In a terminal of its own: the same text, in many writes."""
    options = ["--model", str(heads / "CausalLM"), "--max-new-tokens", "9", "--seed", "4"]
    code = "from modernbert.cli import main; main()"
    parent, child = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, "run", *options, *TEXTS], stdout=child, stderr=subprocess.PIPE, check=False
        )
        os.close(child)
        assert done.returncode == 0, done.stderr
        seen = b""
        with contextlib.suppress(OSError):  # the end of a terminal
            while part := os.read(parent, 65536):
                seen += part
    finally:
        os.close(parent)
    piped = run("run", *options, *TEXTS)
    assert seen.decode().replace("\r\n", "\n") == piped.stdout.decode()


def test_several_texts_of_a_prompt(heads):
    options = ["--model", str(heads / "CausalLM"), "--max-new-tokens", "4", "--option", "num_return_sequences=2"]
    done = run("run", *options, TEXTS[0])
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().count("The dog ran") == 2


def test_errors_in_a_stream(heads):
    options = ["--model", str(heads / "CausalLM"), "--max-new-tokens", "2", "--seed", "1"]
    done = run("run", *options, "--skip-errors", TEXTS[0], " ", TEXTS[1])
    assert done.returncode == 1
    assert "not answered: a text is empty" in done.stdout.decode()
    assert done.stdout.decode().count("\n\n") == 3
    done = run("run", *options, "--temperature", "0", TEXTS[0])
    assert done.returncode == 2
    assert done.stderr.decode().splitlines()[-1] == "modernbert: --temperature is 0.0; it must be a number above 0"


def test_generated_texts_go_to_a_file(heads, tmp_path):
    options = ["--model", str(heads / "CausalLM"), "--max-new-tokens", "3", "--output", str(tmp_path / "out.jsonl")]
    done = run("run", *options, *TEXTS)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["output"][0]["generated_text"].startswith(text) for row, text in zip(rows, TEXTS, strict=True)]


def test_score(heads, tmp_path):
    options = ["--model", str(heads / "CausalLM")]
    done = run("score", *options, *TEXTS)
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout.decode()
    rows = [json.loads(line)["output"] for line in run("score", *options, "--json", *TEXTS).stdout.splitlines()]
    assert all(row["perplexity"] == pytest.approx(math.exp(-row["log_likelihood"] / row["tokens"])) for row in rows)
    (tmp_path / "long.txt").write_text("The dog ran across the road. " * 200)
    long = run("score", *options, "--json", "--file", str(tmp_path / "long.txt"), "--stride", "100")
    assert json.loads(long.stdout)["output"]["tokens"] > 512
    wrong = run("score", *options, "--stride", "600", TEXTS[0])
    assert wrong.returncode == 2
    assert "stride is 600; a window of 512 tokens" in wrong.stderr.decode()
