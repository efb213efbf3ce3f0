"""What the command line says: flags, one bounded line, nothing that a terminal acts on."""

import json
import logging
import shutil

import pytest

from modernbert.cli.messages import errors_in_flags, in_flags, say, warnings_shown
from modernbert.errors import printable, shown
from tests.commands import called, rows_of

FLAGS = {"top_k": "--top-k", "truncation": "--truncation", "prompt": "--prompt", "prompt_name": "--prompt-name"}
FLAGS |= {"max_length": "--max-length", "do_sample": "--do-sample", "stride": "--stride"}


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("top_k is 0; it must be a whole number", "--top-k is 0; it must be a whole number"),
        ("truncation=True cuts it", "--truncation cuts it"),
        ("give do_sample=True too", "give --do-sample too"),
        ("prompt and prompt_name are given", "--prompt and --prompt-name are given"),
        ("the job: stride was 2 and is 3", "the job: --stride was 2 and is 3"),
        ("--top-k and --option top_k are given", "--top-k and --option top_k are given"),
        ("max_length is 3", "--max-length is 3"),
        ("the model's prompt is long: 'top_k is 0'", "the model's prompt is long: 'top_k is 0'"),
        ('a text: "it\'s top_k, truncation=True"', 'a text: "it\'s top_k, truncation=True"'),
        ("a stride is a step", "a stride is a step"),
        ("/data/top_k.txt has no text", "/data/top_k.txt has no text"),
    ],
)
def test_options_are_flags_and_texts_stay_as_they_are(message, said):
    assert in_flags(message, FLAGS) == said


def test_what_a_terminal_acts_on_is_escaped():
    assert printable("a\x1b[2Jb\x9b1m\x7f\u202e\ud800 å🙂") == "a\\x1b[2Jb\\x9b1m\\x7f\\u202e\\ud800 å🙂"
    assert printable("a\nb\tc", keep="\n") == "a\nb\\tc"
    assert len(printable("x" * 10_000, limit=600)) <= 600
    assert printable("x" * 600, limit=600) == "x" * 600


def test_values_of_any_size_are_shown_on_one_short_line():
    class Bad:
        def __repr__(self):
            raise RuntimeError

    deep = []
    for _ in range(10_000):
        deep = [deep]
    for value in ("a\nb" * 1000, list(range(100_000)), dict.fromkeys(range(1000), "x" * 1000), deep, Bad(), "\x1b[2J"):
        text = shown(value)
        assert len(text) <= 100
        assert text.isprintable()


def test_messages_are_one_bounded_line(capsys):
    say("first\nsecond \x1b[31m" + "x" * 5000)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("modernbert: first second \\x1b[31mxxx")
    assert len(line) < 650


def test_warnings_of_the_library_are_said_like_everything_else(capsys):
    logger = logging.getLogger("modernbert.somewhere")
    with warnings_shown():
        logger.warning("a tensor called %s", "\x1b]0;title\x07" + "y" * 5000)
        logger.info("not for people")
        with errors_in_flags({"dtype": "--dtype"}):
            logger.warning('dtype="bfloat16" takes half the memory')
    logger.warning("after the command")
    line, flags = capsys.readouterr().err.splitlines()
    assert flags == "modernbert: --dtype bfloat16 takes half the memory"
    assert line.startswith("modernbert: a tensor called \\x1b]0;title\\x07yyy")
    assert len(line) < 650


NASTY = "a \x1b[2J dog\x07 \x9b31m [MASK] \u202eback"


@pytest.mark.parametrize("as_json", [True, False])
def test_control_characters_of_texts_reach_no_terminal(capsys, as_json):
    code, out, err = called(capsys, "run", NASTY, "--top-k", "1", *(["--json"] if as_json else []))
    assert code == 0
    assert not set("\x1b\x07\x9b\u202e") & set(out + err)
    if as_json:
        assert json.loads(out)["input"] == NASTY  # escaped, not changed
    else:
        assert "\\x1b[2J" in out


def test_control_characters_of_names_reach_no_terminal(capsys, tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps({"\x1b[2J": "a", "x" * 5000: "b"}) + "\n")
    for arguments in (
        ["run", "--file", tmp_path / "in.jsonl"],
        ["run", "no mask \x1b[2J"],
        ["run", "[MASK]", "--model", "\x1b[2J/x"],
        ["run", "[MASK]", "--task", "\x1b[2J"],
        ["run", "[MASK]", "--option", "\x1b[2J=1"],
        ["run", "--file", "\x1b[2J.txt"],
        ["run", "[MASK]", "--\x1b[2J"],
    ):
        code, out, err = called(capsys, *arguments)
        assert code == 2
        assert "\x1b" not in out + err
        assert "\\x1b[2J" in err
        assert len(err.splitlines()) == 1
        assert len(err) < 700


def test_control_characters_of_a_checkpoint_reach_no_terminal(capsys, heads, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(heads / "SequenceClassification", folder)
    config = json.loads((folder / "config.json").read_text())
    label = "\x1b[2J [red]bad\x9b"
    labels = {"id2label": {"0": label, "1": "b"}, "label2id": {label: 0, "b": 1}}
    (folder / "config.json").write_text(json.dumps({**config, **labels}))
    (folder / "[red]\x1b[2J.txt").write_text("")
    for arguments in (
        ["info", folder],
        ["info", folder, "--json"],
        ["run", "--model", folder, "a dog", "--top-k", "2"],
    ):
        code, out, err = called(capsys, *arguments)
        assert code == 0
        assert not {"\x1b", "\x9b"} & set(out + err)
        assert "[red]bad" in out
        assert "[red]\\x1b[2J.txt" in out or arguments[0] == "run" or "--json" in arguments


def test_a_lone_surrogate_is_reported_and_ends_nothing(capsys, tmp_path):
    (tmp_path / "in.jsonl").write_text('"one [MASK]"\n"two \\ud800 [MASK]"\n"three [MASK]"\n')
    code, out, _ = called(capsys, "run", "--file", tmp_path / "in.jsonl", "--json", "--skip-errors")
    assert code == 1
    rows = rows_of(out)
    assert [set(row) for row in rows] == [{"input", "output"}, {"input", "error"}, {"input", "output"}]
    assert rows[1]["input"] == "two \ud800 [MASK]"
    output = tmp_path / "out.jsonl"
    assert called(capsys, "run", "--file", tmp_path / "in.jsonl", "--output", output, "--skip-errors")[0] == 1
    assert [json.loads(line)["input"] for line in output.read_text("utf-8").splitlines()] == [r["input"] for r in rows]
