"""Every row of a file is answered in its place or said to be unanswered; nothing is answered that nobody asked."""

import errno
import json
import os

import numpy as np
import pytest

from modernbert import pipeline
from tests.commands import answers, called, files_of_at_most, rows_of
from tests.io.test_records import written


@pytest.fixture
def paras(tmp_path):
    path = tmp_path / "paras.txt"
    path.write_text("one\n\n  \nfour\n\n\n")
    return path


def embed(heads, *arguments):
    return ["embed", "--model", heads / "Model", *arguments]


# Blank lines


def test_row_i_of_the_vectors_is_line_i_of_the_text(heads, paras, tmp_path, capsys):
    out = tmp_path / "out.npy"
    code, _, err = called(capsys, *embed(heads, "--file", paras, "--output", out, "--skip-errors"))
    assert code == 1
    assert err.splitlines() == [
        f"modernbert: 2 answers in {out}",
        f"modernbert: {paras}, record 2: a text is empty or only spaces; there is nothing to answer",
        f"modernbert: {paras}, record 3: a text is empty or only spaces; there is nothing to answer",
        "modernbert: 2 of 4 inputs could not be answered",
    ]
    vectors = np.load(out)
    assert vectors.shape[0] == 4  # the blank lines at the very end are no rows
    assert np.isnan(vectors[1:3]).all()
    assert np.array_equal(vectors[[0, 3]], pipeline("sentence-embedding", heads / "Model")(["one", "four"]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '"one"\n\n{"text": "three"}\n\n', "a.jsonl, line 2, is blank"),
        ("a.txt", "one\n\nthree\n\n", "record 2: a text is empty or only spaces; there is nothing to answer"),
        ("a.jsonl", '"one"\n{"text":\n"three"\n', "a.jsonl, line 2, is not JSON"),
        ("a.csv", "text,n\none,1\n\nthree,3\n\n", "a.csv, line 3, is blank"),
        ("a.csv", 'text\none\n""\nthree\n', "record 2: a text is empty"),
        ("a.tsv", "text\tn\none\t1\n\t2\nthree\t3\n", "record 2: a text is empty"),
    ],
)
def test_every_kind_of_file_keeps_its_rows_in_place(heads, tmp_path, capsys, name, content, message):
    (tmp_path / name).write_text(content)
    where = ["run", "--model", heads / "SequenceClassification", "--json", "--file", tmp_path / name]
    code, out, err = called(capsys, *where, "--skip-errors")
    assert code == 1
    assert message in err
    rows = rows_of(out)
    assert [set(row) for row in rows] == [{"input", "output"}, {"input", "error"}, {"input", "output"}]
    code, out, err = called(capsys, *where)
    assert code == 2
    assert len(out.splitlines()) == 1
    assert len(err.splitlines()) == 1
    assert message in err


def test_documents_keep_the_numbers_of_their_lines(heads, tmp_path, capsys):
    path = tmp_path / "documents.txt"
    path.write_text("a cat\n\na hound\n")
    where = ["run", "--task", "text-ranking", "--model", heads / "Model", "--query", "a dog", "--file", path]
    code, _, err = called(capsys, *where, "--json")
    blank = f"modernbert: {path}, record 2, is empty or only spaces; there is nothing to answer\n"
    assert (code, err) == (2, blank)
    code, out, err = called(capsys, *where, "--json", "--skip-errors")
    assert (code, err) == (1, f"{blank}modernbert: 1 of 3 documents could not be ranked\n")
    found = json.loads(out)
    assert found["input"]["documents"] == ["a cat", None, "a hound"]
    serve = pipeline("text-ranking", heads / "Model")
    wanted = serve("a dog", ["a cat", "a hound"])
    assert found["output"] == [{**answer, "index": 2 * answer["index"]} for answer in wanted]


def test_a_document_that_is_too_long_is_left_out_under_its_number(heads, tmp_path, capsys):
    path = tmp_path / "documents.txt"
    path.write_text(f"a cat\n{'word ' * 600}\na hound\n")
    where = ["run", "--task", "text-ranking", "--model", heads / "Model", "--query", "a dog", "--json"]
    code, _, err = called(capsys, *where, "--file", path)
    assert code == 2
    assert err.startswith(f"modernbert: {path}, record 2: a text has 60")
    for given in (["--file", path], ["a cat", "word " * 600, "a hound"]):
        code, out, err = called(capsys, *where, *given, "--skip-errors")
        assert code == 1
        assert sorted(answer["index"] for answer in json.loads(out)["output"]) == [0, 2]
        assert "2: a text has 60" in err.splitlines()[0]
    code, out, err = called(capsys, *where, " ", "--skip-errors")
    assert code == 1
    assert "error" in json.loads(out)


def test_the_last_choices_of_a_row_may_be_missing_but_none_before_them(heads, tmp_path, capsys):
    path = tmp_path / "in.csv"
    path.write_text("prompt,a,b,c\nThe dog,barks,reads,\nThe cat,,reads,sleeps\n")
    where = ["run", "--model", heads / "MultipleChoice", "--file", path, "--column", "choices=a,b,c", "--json"]
    _, out, _ = called(capsys, *where, "--skip-errors")
    rows = rows_of(out)
    assert rows[0]["input"]["choices"] == ["barks", "reads"]
    assert rows[1]["error"] == "a text is empty or only spaces; there is nothing to answer"


# Line ends


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_documented_loop_over_a_file_gives_the_command_s_vectors_bit_for_bit(heads, tmp_path, capsys, end):
    path = tmp_path / "corpus.txt"
    path.write_bytes(end.join(["one", "  two, indented", "three \t", "four å"]).encode())
    assert called(capsys, *embed(heads, "--file", path, "--output", tmp_path / "out.npy"))[0] == 0
    serve = pipeline("sentence-embedding", heads / "Model")
    with path.open(encoding="utf-8") as lines:
        vectors = list(serve(line.rstrip("\n") for line in lines))
    assert np.array_equal(np.load(tmp_path / "out.npy"), vectors)


# What is no text


def test_an_argument_that_names_a_file_is_not_a_text(heads, paras, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for argument, message in [
        ("paras.txt", "paras.txt is a file; did you mean --file paras.txt?"),
        (str(paras), f"{paras} is a file; did you mean --file {paras}?"),
        ("folder/", "folder/ is a folder; give a file with --file"),
        ("folder", "folder is a folder; give a file with --file, or for its files an --output that is a folder, too"),
        ("para.txt", "para.txt is an argument that ends like a file, and there is no such file"),
        ("data/Rows.JSONL", "ends like a file"),
    ]:
        for command in (embed(heads, "--output", "out.npy"), ["score"], ["run", "--task", "feature-extraction"]):
            code, out, err = called(capsys, *command, "a text", argument)
            assert (code, out) == (2, "")
            assert message in err
            assert len(err.splitlines()) == 1
    for text in ("a folder", "see paras.txt", "the end.", "word " * 2000):
        assert called(capsys, *embed(heads, "--output", "out.npy", "--overwrite"), "--truncation", text)[0] == 0, text


# Options that are given twice, files that are there


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--file", "a.txt", "--file", "b.txt"], "--file is given 2 times; give it once"),
        (["embed", "a", "--output", "a.npy", "--output", "b.npy"], "--output is given 2 times"),
        (["info", "x", "--lengths", "1", "--lengths=2"], "--lengths is given 2 times"),
        (["finetune", "masked-lm", "--output", "a", "--output", "b"], "--output is given 2 times"),
        (["run", "[MASK]", "--option", "top_k=1", "--option", "top-k=2"], "--option top_k is given twice"),
        (["run", "[MASK]", "--option", "top_k=1", "--top-k", "2"], "--top-k and --option top_k are given"),
        (
            ["run", "a", "--task", "feature-extraction", "--top-k", "2"],
            "--top-k is not an option of feature-extraction",
        ),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_of_two_values_none_is_dropped_in_silence(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("one [MASK]\n")
    code, out, err = called(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_repeated_options_that_add_up_still_do(capsys):
    code, out, _ = called(capsys, "run", "--json", "The [MASK] ran.", "--target", "dog", "--target", "cat", "--json")
    assert code == 0
    assert len(answers(out)[0]) == 2


def test_a_finished_output_is_never_overwritten_unless_asked_for(heads, paras, tmp_path, capsys):
    out = tmp_path / "out.npy"
    out.write_bytes(b"finished")
    (tmp_path / "out.jsonl").write_text("finished")
    for command in (
        embed(heads, "one", "--output", out),
        ["score", "one", "--output", tmp_path / "out.jsonl"],
        ["run", "[MASK]", "--output", tmp_path / "out.jsonl"],
    ):
        code, _, err = called(capsys, *command)
        assert code == 2
        assert err == f"modernbert: {command[-1]} exists already; name another output, or replace it with --overwrite\n"
        assert command[-1].read_bytes() == b"finished"
    assert called(capsys, *embed(heads, "one", "--output", out), "--overwrite")[0] == 0
    assert np.load(out).shape == (1, 48)
    code, _, err = called(capsys, "run", "[MASK]", "--overwrite")
    assert (code, err) == (2, "modernbert: --overwrite is for --output, which is not given\n")


# Errors, in the words of the command line


def test_a_text_that_is_too_long_is_one_line_with_its_number_and_the_flag(heads, tmp_path, capsys):
    path = tmp_path / "in.txt"
    path.write_text("fine\n" + "word " * 900 + "\nfine\n")
    code, _, err = called(capsys, *embed(heads, "--file", path, "--output", tmp_path / "out.npy"))
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith(f"modernbert: {path}, record 2: a text has ")
    assert line.endswith("; --truncation cuts it")
    code, _, err = called(capsys, "run", "--model", heads / "SequenceClassification", "--file", path, "--json")
    (line,) = err.splitlines()
    assert line.endswith("; --truncation cuts it")
    code, _, err = called(capsys, "run", "--model", heads / "SequenceClassification", "word " * 900)
    assert err.startswith("modernbert: a text has ")
    where = ["run", "--model", heads / "SequenceClassification", "--file", path, "--json"]
    assert called(capsys, *where, "--option", "truncation=true")[0] == 0


def test_a_record_without_the_field_is_skipped_and_named(heads, tmp_path, capsys):
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a"}\n{"body": "b", "id": 7}\n{"text": "c"}\n')
    message = (
        f"{path}, record 2, has the columns body, id; none is known to hold the text. Say which one does: "
        "--column text=COLUMN"
    )
    where = ["run", "--model", heads / "SequenceClassification", "--file", path]
    code, out, err = called(capsys, *where, "--json", "--skip-errors")
    assert code == 1
    assert [set(row) for row in rows_of(out)] == [{"input", "output"}, {"input", "error"}, {"input", "output"}]
    assert err.splitlines() == [f"modernbert: {message}", "modernbert: 1 of 3 inputs could not be answered"]
    code, out, err = called(capsys, *where, "--json")
    assert (code, err) == (2, f"modernbert: {message}\n")
    assert len(out.splitlines()) == 1
    output = tmp_path / "out.jsonl"
    assert called(capsys, *where, "--output", output, "--skip-errors")[0] == 1
    rows = rows_of(output.read_text())
    assert rows[1] == {"input": None, "error": message, "row": {"body": "b", "id": 7}}


def test_failures_are_listed_to_ten_and_counted_over_an_interruption(heads, tmp_path, capsys):
    path = tmp_path / "in.txt"
    path.write_text("\n".join(["fine", *[" "] * 14, "fine"]))
    out = tmp_path / "out.npy"
    code, _, err = called(capsys, *embed(heads, "--file", path, "--output", out, "--skip-errors"))
    lines = err.splitlines()
    assert code == 1
    assert len(lines) == 12
    assert lines[1].startswith(f"modernbert: {path}, record 2: ")
    assert lines[-1] == "modernbert: 14 of 16 inputs could not be answered; the first 10 are listed above"
    out.unlink()
    assert called(capsys, *embed(heads, "--file", path, "--output", out))[0] == 2  # stops at record 2
    resumed = called(capsys, *embed(heads, "--file", path, "--output", out, "--skip-errors"))[2].splitlines()
    assert resumed == [f"modernbert: {out}.partial holds 1 answer; continuing after them", *lines]


def test_arguments_that_fail_are_numbered_too(heads, capsys):
    where = ["run", "--model", heads / "SequenceClassification", "--json"]
    assert called(capsys, *where, "fine", " ")[2] == (
        "modernbert: argument 2: a text is empty or only spaces; there is nothing to answer\n"
    )
    assert called(capsys, *where, " ", "fine", "--skip-errors")[2].splitlines() == [
        "modernbert: argument 1: a text is empty or only spaces; there is nothing to answer",
        "modernbert: 1 of 2 inputs could not be answered",
    ]
    assert called(capsys, *where, " ")[2] == "modernbert: a text is empty or only spaces; there is nothing to answer\n"


def test_a_part_of_a_file_is_read_as_its_message_says(heads, tmp_path, capsys):
    path = tmp_path / "in.json"
    path.write_text(json.dumps({"train": [{"text": "one"}], "test": ["two"]}))
    where = ["run", "--model", heads / "SequenceClassification", "--json", "--file"]
    code, _, err = called(capsys, *where, path)
    assert code == 2
    assert f"write {path}#train" in err
    code, out, _ = called(capsys, *where, f"{path}#test")
    assert code == 0
    assert json.loads(out)["input"] == "two"
    assert "has the parts train, test and no 'dev'" in called(capsys, *where, f"{path}#dev")[2]
    assert called(capsys, *where, tmp_path / "none.json#a")[2] == f"modernbert: there is no file {tmp_path}/none.json\n"


def test_nulls_are_refused_and_never_the_word_none(heads, tmp_path, capsys):
    rows = [{"text": "a", "text_pair": None}, {"text": None, "text_pair": "b"}, {"text": "None", "text_pair": None}]
    serve = pipeline("text-classification", heads / "SequenceClassification")
    for name in ("in.parquet", "in.jsonl"):
        where = ["run", "--model", heads / "SequenceClassification", "--file", written(tmp_path / name, rows), "--json"]
        _, out, _ = called(capsys, *where, "--skip-errors")
        first, second, third = map(json.loads, out.splitlines())
        assert [first["output"]] == serve("a")
        assert second["error"] == "a text is None; it must be a string"
        assert [third["output"]] == serve("None")


# Jobs that stop


def test_a_job_with_other_options_names_what_differs(heads, tmp_path, capsys):
    path = tmp_path / "in.txt"
    path.write_text("one\n\nthree\n")
    out = tmp_path / "out.npy"
    assert called(capsys, *embed(heads, "--file", path, "--output", out))[0] == 2
    code, _, err = called(capsys, *embed(heads, "--file", path, "--output", out, "--truncate-dim", "8", "--normalize"))
    assert code == 2
    assert err == (
        f"modernbert: {out}.partial is of another job: --normalize was not given and is True, "
        "--truncate-dim was not given and is 8; finish that one, remove the file, or name another output\n"
    )
    path.write_text("one\n\nthree, another\n")
    code, _, err = called(capsys, *embed(heads, "--file", path, "--output", out))
    assert "is of another job: the file's content has changed; finish that one" in err
    (tmp_path / "out.npy.partial").write_bytes(b'{"torn": \n')
    code, _, err = called(capsys, *embed(heads, "--file", path, "--output", out))
    assert code == 2
    assert err.startswith(f"modernbert: {out}.partial, line 1, was not written by a job like this one; remove the file")


def test_a_full_disk_names_the_file_and_loses_nothing(heads, tmp_path, capsys):
    path = tmp_path / "in.txt"
    path.write_text("\n".join(f"text number {i}" for i in range(400)))
    out = tmp_path / "out.npy"
    with files_of_at_most(40_000):
        code, _, err = called(capsys, *embed(heads, "--file", path, "--output", out))
    assert code == 2
    assert err == f"modernbert: [Errno {errno.EFBIG}] {os.strerror(errno.EFBIG)}: '{out}.partial'\n"
    code, _, err = called(capsys, *embed(heads, "--file", path, "--output", out))
    assert code == 0
    assert "continuing after them" in err
    expected = pipeline("sentence-embedding", heads / "Model")([f"text number {i}" for i in range(400)])
    assert np.array_equal(np.load(out), expected)
