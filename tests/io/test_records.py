"""Records: what goes in comes out, in every form; interrupted output goes on where it stopped."""

import csv
import datetime
import errno
import itertools
import json
import os

import datasets
import numpy as np
import pyarrow.parquet
import pytest

from modernbert.errors import InputError
from modernbert.io.files import replacing
from modernbert.io.tables import (
    Field,
    ResumableOutput,
    choose_columns,
    count_records,
    parse_columns,
    parts_of,
    place_of,
    read_in_place,
    read_records,
    value_in,
)
from modernbert.io.tables.writing import differences

ROWS = [
    {"text": "plain", "label": "a"},
    {"text": 'quotes "and", commas', "label": "b"},
    {"text": "two\nlines, åäö 🙂", "label": "c"},
]


def written(path, rows=ROWS):
    """Rows as a file by its suffix."""
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif not path.suffix:
        datasets.Dataset.from_list(rows).save_to_disk(path)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet", ".json", ""])
def test_every_form_is_read(tmp_path, suffix):
    path = written(tmp_path / f"rows{suffix}")
    assert list(read_records(path)) == list(read_in_place(path)) == ROWS
    assert count_records(path) == (3 if suffix in (".jsonl", ".parquet") else None)


def test_parts_of_files_and_folders(tmp_path):
    parts = {"train": ROWS, "val": ROWS[:1], "odd": [["x", "y"]]}
    path = tmp_path / "p.json"
    path.write_text(json.dumps(parts))
    assert parts_of(path) == ["train", "val", "odd"]
    assert place_of(f"{path}#val") == (path, "val")
    assert list(read_records(path, "val")) == ROWS[:1]
    assert list(read_records(path, "odd")) == [{"0": "x", "1": "y"}]
    with pytest.raises(InputError, match=r"has the parts train, val, odd and none is named; write .*#train"):
        list(read_records(path))
    with pytest.raises(InputError, match="and no 'test'"):
        list(read_records(path, "test"))
    with pytest.raises(InputError, match="has no parts; it cannot give 'a'"):
        list(read_records(written(tmp_path / "rows.csv"), "a"))
    named = datasets.Dataset.from_list(ROWS).class_encode_column("label")
    datasets.DatasetDict({"train": named, "test": named}).save_to_disk(tmp_path / "folder")
    assert parts_of(tmp_path / "folder") == ["train", "test"]
    assert list(read_records(tmp_path / "folder", "test")) == ROWS  # names of classes, not numbers


def test_squad_and_conll(tmp_path):
    path = tmp_path / "s.json"
    who = {"id": "1", "question": "who", "answers": [{"text": "cat", "answer_start": 4}]}
    why = {"id": "2", "question": "why", "is_impossible": True, "answers": []}
    paragraph = {"context": "the cat", "qas": [who, why]}
    path.write_text(json.dumps({"data": [{"title": "t", "paragraphs": [paragraph]}]}))
    first, second = read_records(path)
    assert (first["question"], first["answers"]) == ("who", [{"text": "cat", "answer_start": 4}])
    assert (second["question"], second["answers"]) == ("why", [])
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "x"}]}]}))
    with pytest.raises(InputError, match="not in SQuAD's form: KeyError 'qas'"):
        list(read_records(path))
    path = tmp_path / "n.conll"
    path.write_text("-DOCSTART- -X- O O\n\nEU NNP I-NP B-ORG\nrejects VBZ I-VP O\n\n\nBye UH O O\n")
    assert list(read_records(path)) == [
        {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]},
        {"tokens": ["Bye"], "tags": ["O"]},
    ]
    path.write_text("# text = Hello there\n# O\nHello O\n")
    assert list(read_records(path)) == [{"tokens": ["#", "Hello"], "tags": ["O", "O"]}]
    path.write_text("EU B-ORG\nrejects\n")
    with pytest.raises(InputError, match=r"line 2, is 'rejects'; give a word and its tag"):
        list(read_records(path))


FIELDS = (Field("text", ("sentence",)), Field("label", ("intent",)), Field("text_pair", required=False))


def test_columns_are_found_named_and_missed():
    assert choose_columns(["Sentence", "intent"], FIELDS, {}, "t") == {"text": ["Sentence"], "label": ["intent"]}
    assert choose_columns(["0", "1"], FIELDS, {}, "t") == {"text": ["0"], "label": ["1"]}
    assert choose_columns(["text", "label", "TEXT"], FIELDS, {}, "t")["text"] == ["text"]
    named = parse_columns(["label=b"], FIELDS)
    assert choose_columns(["text", "b", "label"], FIELDS, named, "t")["label"] == ["b"]
    assert parse_columns(["a"], FIELDS, "text") == {"text": ["a"]}
    for columns, chosen, message in [
        (["a", "b"], {}, r'^t has the columns a, b; none is known to hold the text.*column="text=COLUMN"$'),
        (["text", "label"], {"label": ["c"]}, "^t has the columns text, label and no 'c'$"),
    ]:
        with pytest.raises(InputError, match=message):
            choose_columns(columns, FIELDS, chosen, "t")
    for given, message in [
        (["colour=b"], "^column is 'colour=b' and there is no field 'colour'; this task has text, label, text_pair$"),
        (["text=a", "text=b"], "^column is 'text=b' and text has the column 'a' already; give one$"),
        (["text"], "^column is 'text'; write FIELD=COLUMN, such as text=NAME$"),
    ]:
        with pytest.raises(InputError, match=message):
            parse_columns(given, FIELDS)


@pytest.mark.parametrize(
    ("cells", "required", "value"),
    [
        (['["x", "y"]'], True, ["x", "y"]), (["a man"], True, ["a man"]), ([["x"]], True, ["x"]), ([None], True, None),
        (["x", "y", "", None], True, ["x", "y"]), (["x", None, "y"], True, ["x", None, "y"]), ([None, ""], True, None),
        (["x", None, "y"], False, ["x", "y"]),
    ],
)  # fmt: skip
def test_a_list_is_in_one_column_or_several(cells, required, value):
    record = {str(i): cell for i, cell in enumerate(cells)}
    field = Field("choices", many=True, required=required)
    assert value_in(record, list(record), field, "row 1") == value
    with pytest.raises(InputError, match="row 1 has an int in '0'; give a list"):
        value_in({"0": 3}, ["0"], field, "row 1")
    with pytest.raises(InputError, match="row 1 has a str in '0'; give a list"):
        value_in({"0": "a or b"}, ["0"], Field("choices", many=True, alone=False), "row 1")


@pytest.mark.parametrize("suffix", [".txt", ".TXT", ".text", ".md", ""])
def test_text_is_read_by_lines(tmp_path, suffix):
    path = tmp_path / f"text{suffix}"
    path.write_bytes("\ufeffone\r\n\n  \ntwo å\n".encode())
    assert list(read_records(path)) == [{"text": "one"}, {"text": "two å"}]


@pytest.mark.parametrize("suffix", [".pdf", ".gz"])
def test_files_of_an_unknown_suffix_are_refused_by_name(tmp_path, suffix):
    path = tmp_path / f"text{suffix}"
    path.write_text("one\n")
    with pytest.raises(InputError, match=rf"ends with \{suffix}; read are \.txt, .*\.csv, .*no suffix"):
        next(read_records(path))


@pytest.mark.parametrize("content", ["one\n".encode("utf-16-le"), b"\0\1\2", b"fine\0\n"])
def test_binary_content_is_no_text(tmp_path, content):
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(InputError, match="line 1, holds NUL bytes"):
        next(read_records(path))


@pytest.mark.parametrize(
    ("name", "header"), [("a.csv", "text;label"), ("a.csv", "text\tlabel"), ("a.tsv", "text,label"), ("a.csv", "a|b")]
)
def test_a_table_with_another_separator_is_said(tmp_path, name, header):
    path = tmp_path / name
    path.write_text(f"{header}\none;1\n")
    with pytest.raises(InputError, match=r"has a header of one column, .*is it separated by"):
        next(read_records(path))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "\n\none\n \t\ntwo\n\n\n", ["", "", "one", "", "two"]),
        ("a.txt", "one\r\n\r\ntwo\r", ["one", "", "two"]),
        ("a.txt", "one\ntwo", ["one", "two"]),
        ("a.txt", "\n \n", []),
        ("a.jsonl", '"one"\n\n{"text": "two"}\n\n', ["one", "a.jsonl, line 2, is blank", "two"]),
        ("a.csv", "\ntext\none\n\n\ntwo\n\n", ["one", "a.csv, line 4, is blank", "a.csv, line 5, is blank", "two"]),
        ("a.csv", 'text\n"one\n\nmore"\n""\n', ["one\n\nmore", ""]),
        ("a.tsv", "text\tn\none\t1\n\ntwo\t2\n", ["one", "a.tsv, line 3, is blank", "two"]),
    ],
)
def test_blank_lines_keep_their_places_where_they_count_and_the_last_ones_never_do(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content.encode())
    found = list(read_in_place(path))
    shown = [str(record) if isinstance(record, InputError) else record["text"] for record in found]
    assert len(shown) == len(expected)
    for one, wanted in zip(shown, expected, strict=True):
        assert one == wanted or f"{tmp_path}/{wanted};" in one
    assert count_records(path) in (None, len(expected))
    kept = [r for r in found if isinstance(r, dict) and (r["text"] or path.suffix != ".txt")]
    assert list(read_records(path)) == kept


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'"fine"\n' + b"[" * 100_000, "line 2, is not JSON: it is nested more than 64 levels deep"),
        ("a.jsonl", b'{"text":' * 65 + b"1" + b"}" * 65, "a.jsonl, line 1, is not JSON: it is nested more than 64"),
        ("a.json", b"[" * 65 + b"]" * 65, "a.json is not JSON: it is nested more than 64"),
        ("a.txt", b"fine\n\xff\xfe\n", "a.txt, line 2, is not UTF-8"),
        ("a.jsonl", b'{"text": 1}\n{"text":', "a.jsonl, line 2, is not JSON"),
        ("a.jsonl", b"[1]", "line 1, holds a list; give objects or texts"),
        ("a.csv", b"text,label\na\n", "line 2, has fewer cells"),
        ("a.csv", b"text\na,b\n", "line 2, has more cells"),
        ("a.csv", b'text\n"a\n', "is no table"),
        ("a.parquet", b"not parquet", "is no parquet file"),
    ],
)
def test_broken_files_are_one_clear_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read_records(tmp_path / name))


def test_a_huge_line_and_a_deep_one_are_records(tmp_path):
    huge, deep = {"text": "x" * 5_000_000, "n": list(range(50_000))}, '{"text":' * 64 + "1" + "}" * 64
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(huge)}\n{deep}\n")
    assert list(read_records(tmp_path / "a.jsonl")) == [huge, json.loads(deep)]


def test_torn_parquet_files_are_one_clear_error(tmp_path):
    path = written(tmp_path / "rows.parquet")
    whole, refusals = path.read_bytes(), []
    for at in range(0, len(whole), 29):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            list(read_records(path))
        except InputError as error:
            refusals.append(str(error))
    assert refusals
    assert all(str(path) in message and len(message.splitlines()) == 1 for message in refusals)
    with pytest.raises(FileNotFoundError):
        list(read_records(tmp_path / "none.parquet"))


def test_a_parquet_file_that_holds_fewer_rows_than_it_says_is_no_whole_one(tmp_path, monkeypatch):
    path = written(tmp_path / "rows.parquet")
    batches = pyarrow.parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile, "iter_batches", lambda self, size: itertools.islice(batches(self, 1), 2)
    )
    with pytest.raises(InputError, match="says that it has 3 rows and holds 2; it is damaged"):
        list(read_records(path))


def test_torn_folders_of_datasets_are_one_clear_error(tmp_path):
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(InputError, match="is no whole folder of the datasets library"):
        list(read_records(tmp_path))
    for text, message in (('{"splits": 3}', "names no splits"), ("{", "is not JSON")):
        (tmp_path / "dataset_dict.json").write_text(text)
        with pytest.raises(InputError, match=message):
            parts_of(tmp_path)


def test_folders_and_missing_files(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        list(read_records(tmp_path))
    with pytest.raises(OSError, match="No such file"):
        list(read_records(tmp_path / "none.txt"))


ANSWERS = [
    {"input": "one", "output": {"label": "a", "score": 0.5}},
    {"input": {"text": "two", "id": 7}, "error": "a text is empty"},
    {"input": "three", "output": [{"word": "x"}]},
]
DATED = {"input": {"text": "four", "day": datetime.date(2026, 1, 2)}, "output": 1}


def interrupted(path, job, records):
    """A job that writes some records and is stopped."""
    output = ResumableOutput(path, job)
    output.__enter__()
    for record in records:
        output.write(record)
    output.__exit__(KeyboardInterrupt, None, None)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_form_is_written(tmp_path, suffix):
    path = tmp_path / "deep" / f"out{suffix}"
    with ResumableOutput(path, {}) as output:
        for answer in (*ANSWERS, DATED):
            output.write(answer)
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # and no lock
    rows = list(read_records(path))
    if suffix == ".jsonl":
        assert rows == [*ANSWERS, {**DATED, "input": {"text": "four", "day": "2026-01-02"}}]
        return
    assert [row["text"] for row in rows] == ["one", "two", "three", "four"]
    assert rows[3]["day"] == "2026-01-02"
    assert rows[0]["label"] == "a"
    assert float(rows[0]["score"]) == 0.5
    assert rows[1]["error"] == "a text is empty"
    assert json.loads(rows[2]["output"]) == [{"word": "x"}]


def test_vectors(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    records = [{"input": f"text {i}", "output": vector} for i, vector in enumerate(vectors)]
    records[3] = {"input": "bad", "error": "why"}
    for suffix in (".npy", ".parquet", ".jsonl"):
        with ResumableOutput(tmp_path / f"v{suffix}", {}) as output:
            for record in records:
                output.write(record)
    loaded = np.load(tmp_path / "v.npy", mmap_mode="r")
    assert loaded.shape == (5, 3)
    assert loaded.dtype == np.float32
    assert np.isnan(loaded[3]).all()
    good = [0, 1, 2, 4]
    assert np.array_equal(loaded[good], vectors[good])
    table = pyarrow.parquet.read_table(tmp_path / "v.parquet")
    is_fixed = int(pyarrow.__version__.split(".")[0]) >= 26  # older ones cannot with a row that has none
    assert str(table.schema.field("output").type).startswith("fixed_size_list" if is_fixed else "list")
    assert table["output"][1].as_py() == vectors[1].tolist()
    assert table["output"][3].as_py() is None
    assert json.loads((tmp_path / "v.jsonl").read_text().splitlines()[0])["output"] == pytest.approx(
        vectors[0].tolist()
    )


def test_matrices_do_not_fit_npy(tmp_path):
    with pytest.raises(InputError, match="one vector a text"), ResumableOutput(tmp_path / "v.npy", {}) as output:
        output.write({"input": "a", "output": np.zeros((2, 3), np.float32)})
    assert not list(tmp_path.iterdir())  # said at the first record, not after the work


def test_two_jobs_never_write_one_file(tmp_path):
    with ResumableOutput(tmp_path / "out.jsonl", {}) as output:
        output.write(ANSWERS[0])
        with pytest.raises(InputError, match="is being written by another process"):
            ResumableOutput(tmp_path / "out.jsonl", {}).__enter__()
    assert json.loads((tmp_path / "out.jsonl").read_text()) == ANSWERS[0]


def test_a_job_goes_on_only_with_the_inputs_that_it_began_with(tmp_path):
    interrupted(tmp_path / "out.jsonl", {}, ANSWERS[:2])
    with ResumableOutput(tmp_path / "out.jsonl", {}) as output:
        assert (output.done, output.failed) == (2, 1)
        inputs = ["one", {"text": "two", "id": 7}, "three"]
        assert list(output.rest(inputs, lambda item: item)) == ["three"]
        for inputs in (["one", "other", "three"], ["one"]):
            with pytest.raises(InputError, match="input 2 is not the one that"):
                list(output.rest(inputs, lambda item: item))


def test_broken_lines_can_be_passed_over(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'"one"\n{bad\n\xff\n{"text": "two"}\n')
    found = list(read_in_place(tmp_path / "a.jsonl"))
    assert [type(x).__name__ for x in found] == ["dict", "InputError", "InputError", "dict"]
    (tmp_path / "a.csv").write_text("text,n\na,1\nb\nc,3\n")
    found = list(read_in_place(tmp_path / "a.csv"))
    assert [type(x).__name__ for x in found] == ["dict", "InputError", "dict"]
    (tmp_path / "b.csv").write_text("text,text\na,b\n")
    with pytest.raises(InputError, match="more than one column called text"):
        list(read_records(tmp_path / "b.csv"))


def test_an_interrupted_job_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "out.jsonl"
    job = {"task": "x", "options": {"top_k": 2}}
    interrupted(path, job, ANSWERS[:2])
    partial = tmp_path / "out.jsonl.partial"
    with partial.open("ab") as file:
        file.write(b'{"input": "cut off in the mid')
    assert not path.exists()
    with pytest.raises(InputError, match="is of another job"), ResumableOutput(path, {**job, "task": "y"}):
        pass
    with ResumableOutput(path, job) as output:
        assert output.done == 2
        output.write(ANSWERS[2])
    assert [json.loads(line) for line in path.read_text().splitlines()] == ANSWERS
    assert not partial.exists()


def test_a_job_that_answers_nothing_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="early"), ResumableOutput(tmp_path / "out.csv", {}):
        raise ValueError("early")
    assert not list(tmp_path.iterdir())


def test_unknown_forms_are_refused_before_the_work(tmp_path):
    with pytest.raises(InputError, match=r"out.xlsx ends with .xlsx; written are .jsonl, .csv"):
        ResumableOutput(tmp_path / "out.xlsx", {})


def test_a_finished_file_is_replaced_only_when_asked_for_and_once_the_new_one_is_whole(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("finished\n")
    with pytest.raises(
        InputError, match=r"out.jsonl exists already; name another output, or replace it with overwrite="
    ):
        ResumableOutput(path, {})
    with ResumableOutput(path, {}, overwrite=True) as output:
        output.write(ANSWERS[0])
        assert path.read_text() == "finished\n"
    assert json.loads(path.read_text()) == ANSWERS[0]


def test_what_differs_between_two_jobs_is_named():
    before = {"task": "a", "options": {"top_k": 2, "normalize": True}, "files": [1, 2], "seed": None}
    assert differences(before, {**before, "task": "b"}) == "task was 'a' and is 'b'"
    assert differences(before, {**before, "options": {"top_k": 3}}) == (
        "top_k was 2 and is 3, normalize was True and is not given"
    )
    assert differences(before, {**before, "files": [1, 3], "seed": 4}) == (
        "files has changed, seed was not given and is 4"
    )
    assert differences({}, {str(i): i for i in range(9)}).endswith("2 was not given and is 2 and 6 more")


def test_a_partial_file_of_something_else_is_refused_and_kept(tmp_path):
    for content in (b"\xff\xfe\n", b"[1]\n", b'{"job": {}}\n7\n', b"[" * 100_000 + b"\n"):
        (tmp_path / "out.jsonl.partial").write_bytes(content)
        with (
            pytest.raises(InputError, match="was not written by a job like this one"),
            ResumableOutput(tmp_path / "out.jsonl", {}),
        ):
            pass
        assert (tmp_path / "out.jsonl.partial").read_bytes() == content


def test_surrogates_and_numbers_that_are_none_go_through_a_file_and_a_resumption(tmp_path):
    records = [{"input": {"text": "a \ud800", "n": float("nan")}, "error": "why"}, {"input": "\x9b\u2028", "output": 1}]
    interrupted(tmp_path / "out.jsonl", {"text": "\udcff"}, records[:1])
    with ResumableOutput(tmp_path / "out.jsonl", {"text": "\udcff"}) as output:
        assert (output.done, output.failed, output.errors) == (1, 1, {1: "why"})
        assert list(output.rest([records[0]["input"], "next"], lambda item: item)) == ["next"]
        output.write(records[1])
    text = (tmp_path / "out.jsonl").read_text("utf-8")
    assert "\x9b" not in text
    assert [json.loads(line)["input"] for line in text.splitlines()][1] == "\x9b\u2028"
    assert json.loads(text.splitlines()[0])["input"]["text"] == "a \ud800"


def test_an_error_of_the_system_names_the_file(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device: '.*out.txt'"), replacing(tmp_path / "out.txt"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())


def test_integers_of_any_size_go_to_parquet(tmp_path):
    """As integers where 64 bits hold them all, else as text; never an error after the work."""
    columns = {
        "small": [1, 2], "large": [2**62, -(2**63)], "huge": [10**30, 1], "mixed": [2**60, 0.5], "float": [2**53, 0.5]
    }  # fmt: skip
    with ResumableOutput(tmp_path / "out.parquet", {}) as output:
        for i in range(2):
            output.write({"input": {name: values[i] for name, values in columns.items()}, "output": "x"})
    rows = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    expected = {**columns, "huge": ["1" + "0" * 30, "1"], "mixed": [str(2**60), "0.5"]}
    assert [{name: row[name] for name in columns} for row in rows] == [
        {name: values[i] for name, values in expected.items()} for i in range(2)
    ]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_an_answer_never_takes_the_place_of_a_column_of_the_file(tmp_path, suffix):
    rows = [{"text": "a dog", "label": "gold", "error": "none"}, {"text": "", "label": "gold", "error": "none"}]
    with ResumableOutput(tmp_path / f"out{suffix}", {}) as output:
        output.write({"input": "a dog", "output": {"label": "x", "score": 0.5}, "row": rows[0]})
        output.write({"input": "", "error": "a text is empty", "row": rows[1]})
    first, second = read_records(tmp_path / f"out{suffix}")
    assert list(first) == ["text", "label", "error", "output_label", "score", "output_error"]
    assert (first["label"], first["output_label"], first["error"]) == ("gold", "x", "none")
    assert (second["label"], second["error"], second["output_error"]) == ("gold", "none", "a text is empty")
