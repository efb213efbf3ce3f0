"""`modernbert run` and `embed` over folders, and `modernbert verify`."""

import json

import pytest

from modernbert import corpus
from modernbert.corpus.progress import Progress
from tests.commands import called
from tests.corpus.conftest import TEXTS

HERE = ("--engine-option", "processes=0")


def test_a_folder_is_embedded_and_verified(capsys, folder, model, tmp_path, notebook):
    arguments = ("embed", folder, "--model", model, "--output", tmp_path / "out", *HERE)
    code, out, err = called(capsys, *arguments, "--shard-size", 50)
    assert (code, out) == (0, "")
    assert f"164 rows read, 160 distinct texts answered in {tmp_path}/out (4 duplicates)" in err
    assert corpus.digest(tmp_path / "out") == notebook
    assert "(4 duplicates, 160 from before)" in called(capsys, *arguments)[2]
    code, out, _ = called(capsys, "verify", tmp_path / "out", "--sample", 8)
    assert (code, out.splitlines()) == (0, ["shards      4, all whole", "sample      8 texts, 8 with the same bits"])
    next((tmp_path / "out" / "data").iterdir()).unlink()
    code, out, _ = called(capsys, "verify", tmp_path / "out", "--sample", 0)
    assert code == 1
    assert out.startswith("shards      4, 1 damaged: part-")
    assert "delete them from data/ and run the same command" in out


def test_texts_that_fail_are_told_by_the_exit_code(capsys, model, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"body": "a dog"}\n{"body": " "}\n{"id": 1}\n')
    arguments = ("embed", tmp_path / "*.jsonl", "--model", model, "--column", "body", "--output", tmp_path / "out")
    code, _, err = called(capsys, *arguments, *HERE)
    assert code == 1
    assert "1 row could not be read" in err
    assert "1 text could not be answered" in err
    assert "a text is empty or only spaces" in err


def test_what_was_answered_before_is_told_without_what_failed(capsys, model, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("a dog", "a dog", " ", "two")))
    arguments = ("embed", tmp_path / "*.jsonl", "--model", model, "--output", tmp_path / "out", *HERE)
    assert "4 rows read, 2 distinct texts answered in" in (err := called(capsys, *arguments)[2])
    assert "(1 duplicate)" in err
    assert "(1 duplicate, 2 from before)" in called(capsys, *arguments)[2]
    assert "(1 duplicate, 2 from before)" in called(capsys, *arguments, "--retry-failed")[2]


def test_failures_of_an_earlier_run_are_told_and_are_not_those_of_this_one(capsys, model, tmp_path, monkeypatch):
    file = tmp_path / "in.jsonl"
    file.write_text('{"text": "a dog"}\n{"text": " "}\n')
    arguments = ("embed", file, "--model", model, "--output", tmp_path / "out", *HERE)
    tell = Progress.tell

    def interrupted(self, record):
        tell(self, record)
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "tell", interrupted)
    assert called(capsys, *arguments)[0] == 130
    monkeypatch.undo()
    code, _, err = called(capsys, *arguments)  # which tells of what the interrupted one did not tell
    assert (code, "1 text could not be answered; " in err, "a text is empty" in err) == (1, True, True)
    code, _, err = called(capsys, *arguments)
    assert (code, "a text is empty" in err) == (0, False)
    assert "1 text could not be answered by an earlier run; --retry-failed tries again" in err
    file.write_text('{"text": " "}\n{"text": "  "}\n')
    code, _, err = called(capsys, *arguments)
    assert (code, err.count("could not be answered; "), err.count("1 text could not be answered by an")) == (1, 1, 1)
    code, _, err = called(capsys, *arguments, "--retry-failed")
    assert (code, "2 texts could not be answered; " in err, "by an earlier run" in err) == (1, True, False)


def test_any_task_runs_over_a_folder(capsys, folder, heads, tmp_path):
    arguments = (
        "run",
        "--task",
        "text-classification",
        "--model",
        heads / "SequenceClassification",
        folder / "b.jsonl",
    )
    code, _, _ = called(capsys, *arguments, "--output", tmp_path / "out", "--keep", "id", *HERE)
    assert code == 0
    assert next(corpus.answers(tmp_path / "out")).schema.names[1:3] == ["label", "score"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embed", "not/there/", "--output", "out"], "not/there/ is not there; give folders, globs or files"),
        (["embed", "nofolder", "--output", "out"], "there is no folder or file nofolder; texts are answered to"),
        (["embed", "a text", "--output", "out"], "out ends with nothing"),
        (["embed", "{}", "--output", "out", "--json"], "No such option"),
        (["run", "{}", "--output", "out", "--json"], "--json is for texts and files, not for folders"),
        (["embed", "{}", "--output", "out", "--overwrite"], "--overwrite is for texts and files, not for folders"),
        (["embed", "{}", "--output", "out", "--keep", "x", "--engine", "ox"], "--engine is 'ox'; choose one of local"),
        (["embed", "a text", "--output", "x.npy", "--keep", "id"], "--keep is for folders, globs and files"),
        (["embed", "{}/", "--output", "x.npy"], "or for its files an --output that is a folder, too, without .jsonl"),
        (["verify", "{}"], "is no output of a corpus"),
    ],
)
def test_mistakes_are_one_line(capsys, folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = called(capsys, *(word.format(folder) for word in arguments))
    assert code == 2
    assert message in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_progress_is_a_line_a_minute_where_nobody_looks(folder, model, tmp_path, capsys, monkeypatch):
    from modernbert.corpus import progress

    monkeypatch.setattr(progress, "_A_MINUTE", 0.0)
    code, _, err = called(
        capsys, "embed", folder, "--model", model, "--output", tmp_path / "out", "--shard-size", 40, *HERE
    )
    lines = [line for line in err.splitlines() if "tokens/s" in line]
    assert code == 0
    assert len(lines) == 4
    assert lines[0].startswith("40 texts in 0:0")
    assert lines[0].endswith(" left)")
    notes = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(notes[-1])["texts"] == len(TEXTS)
