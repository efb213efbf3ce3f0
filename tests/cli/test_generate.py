"""`modernbert run --task text-generation`, which streams, and `modernbert score`."""

import contextlib
import math
import os
import pty
import subprocess
import sys

import pytest

from modernbert import pipeline
from tests.commands import answers, called, rows_of

TEXTS = ["The dog ran", "A cat sat"]


@pytest.fixture
def model(heads):
    return ["--model", heads / "CausalLM"]


def test_text_is_what_json_gives(heads, model, tmp_path, capsys):
    options = ["run", "--task", "text-generation", *model, "--max-new-tokens", "9", "--seed", "4"]
    code, streamed, err = called(capsys, *options, *TEXTS)
    assert code == 0, err
    rows = rows_of(called(capsys, *options, "--json", *TEXTS)[1])
    assert [row["input"] for row in rows] == TEXTS
    expected = [row["output"][0]["generated_text"] for row in rows]
    assert streamed == "".join(f"{text}\n\n" for text in expected)
    serve = pipeline("text-generation", heads / "CausalLM", max_new_tokens=9, seed=4)
    assert [answer[0]["generated_text"] for answer in serve(TEXTS)] == expected
    without = called(capsys, *options, "--option", "return_full_text=false", TEXTS[0])[1]
    assert TEXTS[0] + without == f"{expected[0]}\n\n"
    several = called(capsys, *options, "--option", "num_return_sequences=2", TEXTS[0])[1]
    assert several.count("The dog ran") == 2
    assert called(capsys, *options, "--output", tmp_path / "out.jsonl", *TEXTS)[0] == 0
    assert rows_of((tmp_path / "out.jsonl").read_text()) == rows


def test_a_terminal_sees_the_text_as_it_comes(model, capsys):
    """In a terminal of its own: the same text, in many writes."""
    options = ["run", *model, "--max-new-tokens", "9", "--seed", "4"]
    code = "from modernbert.cli import main; main()"
    parent, child = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *options, *TEXTS], stdout=child, stderr=subprocess.PIPE, check=False
        )
        os.close(child)
        assert done.returncode == 0, done.stderr
        seen = b""
        with contextlib.suppress(OSError):  # the end of a terminal
            while part := os.read(parent, 65536):
                seen += part
    finally:
        os.close(parent)
    assert seen.decode().replace("\r\n", "\n") == called(capsys, *options, *TEXTS)[1]


def test_errors_in_a_stream(model, capsys):
    options = ["run", *model, "--max-new-tokens", "2", "--seed", "1"]
    code, out, _ = called(capsys, *options, "--skip-errors", TEXTS[0], " ", TEXTS[1])
    assert code == 1
    assert "not answered: a text is empty" in out
    assert out.count("\n\n") == 3
    code, _, err = called(capsys, *options, "--temperature", "0", TEXTS[0])
    assert code == 2
    assert err.splitlines()[-1] == "modernbert: --temperature is 0.0; it must be a number above 0"


def test_score(model, tmp_path, capsys):
    code, out, _ = called(capsys, "score", *model, *TEXTS)
    assert code == 0
    assert "perplexity" in out
    rows = answers(called(capsys, "score", *model, "--json", *TEXTS)[1])
    assert all(row["perplexity"] == pytest.approx(math.exp(-row["log_likelihood"] / row["tokens"])) for row in rows)
    (tmp_path / "long.txt").write_text("The dog ran across the road. " * 200)
    (long,) = answers(called(capsys, "score", *model, "--json", "--file", tmp_path / "long.txt", "--stride", "100")[1])
    assert long["tokens"] > 512
    code, _, err = called(capsys, "score", *model, "--stride", "600", TEXTS[0])
    assert code == 2
    assert "stride is 600; a window of 512 tokens" in err
