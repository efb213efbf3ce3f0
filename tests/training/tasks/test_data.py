"""Data in: every form of file, columns found and named, rows held out, and bad rows refused by name."""

import json

import datasets
import pytest

from modernbert import finetune
from modernbert.errors import InputError
from modernbert.training.tasks.catalog import TASKS
from modernbert.training.tasks.data import Row, hold_out, read_tables, rows_of, with_parts
from modernbert.training.tasks.multiple_choice import choice_number
from tests.training.tasks.conftest import MOODS, answer_rows, choice_rows, mood_rows, pair_rows, tag_rows

FIELDS = TASKS["text-classification"].fields
ROWS = [{"text": "one", "label": "a"}, {"text": 'two, "2"', "label": "b"}, {"text": "three", "label": "a"}]


def test_parts_to_train_and_to_evaluate_on(tmp_path):
    path = str(tmp_path / "p.json")
    (tmp_path / "p.json").write_text(json.dumps({"train": ROWS, "val": ROWS[:1]}))
    assert read_tables(f"{path}#val", None) == {f"{path}#val": ROWS[:1]}
    train, held, chosen = with_parts(path, None)
    assert (train, held) == ([f"{path}#train"], [f"{path}#val"])
    assert "evaluating on its part 'val'" in chosen
    assert with_parts(path, "other.json")[1] == "other.json"
    named = datasets.Dataset.from_list(ROWS).class_encode_column("label")
    datasets.DatasetDict({"train": named, "test": named}).save_to_disk(tmp_path / "folder")
    assert read_tables(named, None) == {"the dataset": ROWS}
    assert with_parts(str(tmp_path / "folder"), None)[1] == [f"{tmp_path / 'folder'}#test"]
    (tmp_path / "h.tsv").write_text('one\ta\n"two\tb\n')
    (rows,) = read_tables(tmp_path / "h.tsv", ["text", "label"]).values()
    assert rows[1] == {"text": '"two', "label": "b"}


def test_lists_and_fields_that_some_rows_lack():
    fields = TASKS["sentence-embedding"].fields
    rows = [{"anchor": "a", "positive": "b"} for _ in range(4)]
    for row, negative in zip(rows[1:], ["a man is asleep", None, '["x", "y"]'], strict=True):
        row["negative"] = negative
    found, chosen = rows_of(read_tables(rows, None), fields, {})
    assert chosen["negatives"] == ["negative"]
    assert [row.values.get("negatives") for row in found] == [None, ["a man is asleep"], None, ["x", "y"]]
    rows = read_tables([{"prompt": "p", "a": "x", "b": None, "c": "z", "label": 0}], None)
    gap, _ = rows_of(rows, TASKS["multiple-choice"].fields, {"choices": ["a", "b", "c"]})
    assert gap[0].values["choices"] == ["x", None, "z"]  # the numbers of the others stay
    tagged = read_tables([{"tokens": "the cat sat", "tags": "O B-x O"}], None)
    words, _ = rows_of(tagged, TASKS["token-classification"].fields, {})
    assert words[0].values["tokens"] == ["the", "cat", "sat"]
    asked = {"question": "q", "choices": {"text": ["one", "two"], "label": ["1", "2"]}, "answerKey": "1"}
    found, _ = rows_of(read_tables([asked], None), TASKS["multiple-choice"].fields, {})
    assert choice_number(found[0]) == 0
    both = Row({"choices": ["1", "0"], "label": "1"}, "r")  # a place, and a text
    assert (choice_number(both), choice_number(both, by_place=False)) == (1, 0)


def test_what_is_held_out():
    rows, _ = rows_of(read_tables([{**row, "doc": i // 4} for i, row in enumerate(mood_rows(40))], None), FIELDS, {})
    train, held = hold_out(rows, 0.2, None)
    assert (len(train), len(held)) == (32, 8)
    assert {r.where for r in train} | {r.where for r in held} == {r.where for r in rows}
    assert hold_out(rows, 0.2, None)[1] == held
    train, held = hold_out(rows, 0.2, "doc")
    assert not {r.values["_record"]["doc"] for r in train} & {r.values["_record"]["doc"] for r in held}
    assert len(held) == 8
    assert hold_out(rows, 0.0, None) == (rows, [])
    with pytest.raises(InputError, match=r"group_by is 'page'; .*row 1 has no such column, but text, label, doc"):
        hold_out(rows, 0.2, "page")
    with pytest.raises(
        InputError, match=r"held_out is 0.5, which takes the only row; give more rows, .* or held_out=0"
    ):
        hold_out(rows[:1], 0.5, None)
    with pytest.raises(InputError, match="takes all of the 4 rows, as they all have one doc"):
        hold_out(rows[:4], 0.5, "doc")


def changed(rows, **values):
    return [*rows[:-1], {**rows[-1], **values}]


TEXTS, PAIRS = "text-classification", "text-ranking"
WOLF = [{"text": "wolf", "answer_start": 3}]
ASKED = {"query": "q", "document": "d"}
BAD = {
    "no rows": (TEXTS, [], "train is not given"),
    "columns": (TEXTS, [{"a": "x", "b": 1}], "has the columns a, b; none is known to hold the text"),
    "blank text": (TEXTS, changed(mood_rows(), text="  "), "row 48: the text is blank"),
    "no label": (TEXTS, changed(mood_rows(), label=None), "row 48 has nothing in 'label'"),
    "one class": (TEXTS, [{"text": "x", "label": "a"}] * 9, "every row has the label 'a'"),
    "word for a value": (TEXTS, [{"text": "x", "label": 0.5}, {"text": "y", "label": "high"}],
                         "row 2 has the label 'high'; regression takes numbers"),
    "tags": ("token-classification", changed(tag_rows(), tags=["O"]), r"row 40 has \d+ words and 1 tags"),
    "empty word": ("token-classification", changed(tag_rows(), tokens=[""], tags=["O"]), "the word ''"),
    "answer": ("question-answering", changed(answer_rows(), answers=WOLF),
               "row 40: the answer 'wolf' does not stand at character 3"),
    "choices": ("multiple-choice", changed(choice_rows(), choices=["one"]), r"row 30 has the choices \['one'\]"),
    "choice": ("multiple-choice", changed(choice_rows(), label=9), "row 30 has the label 9; it must be 0 to"),
    "pair": ("sentence-embedding", changed(pair_rows(), positive=3.5j), "row 40: the positive is a complex"),
    "share": (PAIRS, [{**ASKED, "label": 2}], r"row 1 has the label 2; it must lie in \[0, 1\]"),
    "no label of a pair": (PAIRS, [{**ASKED, "label": 1}, {**ASKED, "document": "e", "label": None}],
                           "row 2 has no label, and other rows have"),
    "rows": (TEXTS, ["a text", 3], "train is not given|a row is"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD))
def test_bad_rows_are_named_and_nothing_is_written(case, base, tmp_path):
    task, rows, message = BAD[case]
    with pytest.raises(InputError, match=message):
        finetune(
            task, rows, output=tmp_path / "runs" / "x", model=base(), held_out=0.0, progress=False,
            problem="regression" if case == "word for a value" else None,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_labels_that_training_has_not_seen_and_empty_files(base, tmp_path):
    options = {"output": tmp_path / "x", "model": base(), "progress": False}
    with pytest.raises(InputError, match=r"row 1 has the label 'angry'; known are calm, happy, sad"):
        finetune("text-classification", mood_rows(), [{"text": "no", "label": "angry"}], **options)
    with pytest.raises(InputError, match=r"row 1 has the label 'calm'; known are happy, sad"):
        finetune("text-classification", [{"text": "x", "label": "calm"}], labels="happy,sad", held_out=0.0, **options)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match=r"empty\.jsonl holds no rows"):
        finetune("text-classification", tmp_path / "empty.jsonl", **options)
    with pytest.raises(InputError, match="there is no file or folder"):
        finetune("text-classification", tmp_path / "none.jsonl", **options)
    with pytest.raises(InputError, match="task is 'poetry'; choose one of text-classification"):
        finetune("poetry", mood_rows(), **options)
    with pytest.raises(InputError, match="text-classification has no option colour"):
        finetune("text-classification", mood_rows(), colour=3, **options)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1}, "lr is -1"), ({"batch_size": 2.5}, "batch_size is 2.5; it must be a whole number of at least 1"),
        ({"optimizer": "sgd"}, "one of adamw, stableadamw, muon"), ({"schedule": "wsd", "warmup": 0.9}, "1 together"),
        ({"max_length": 100_000}, "the model's context holds 64"), ({"freeze_layers": 9}, "the model has 3 layers"),
    ],
)  # fmt: skip
def test_impossible_options_are_named(options, message, base, tmp_path):
    with pytest.raises(InputError, match=message):
        finetune("text-classification", mood_rows(), output=tmp_path / "x", model=base(), progress=False, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"labels": ["a", "b,c"]}, "labels holds 'b,c'; give names without a comma"),
        ({"labels": ["a", None]}, "labels holds None"), ({"column": {"label": None}}, "column has None for the field"),
        ({"column": {"label": 3}}, "column has 3 for the field 'label'; give names of columns"),
    ],
)  # fmt: skip
def test_names_that_are_none_are_refused(options, said, base, tmp_path):
    with pytest.raises(InputError, match=said):
        finetune("text-classification", mood_rows(), output=tmp_path / "x", model=base(), progress=False, **options)


def test_labels_of_0_and_1_and_a_data_frame_are_learnt_from(base, tmp_path):
    options = {"model": base(), "max_steps": 2, "batch_size": 8, "progress": False}
    rows = [{"text": row["text"], "label": [row["label"] == mood for mood in MOODS]} for row in mood_rows()]
    run = finetune("text-classification", rows, output=tmp_path / "run", labels=list(MOODS), **options)
    assert run.model.config.problem_type == "multi_label_classification"
    assert [run.model.config.id2label[i] for i in range(3)] == list(MOODS)
    assert set(run.figures) >= {"f1_micro", "average_precision"}
    assert {answer["label"] for answer in run.pipeline()("the cat", top_k=None)} == set(MOODS)

    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {"text": [row["text"] for row in rows], "label": [float(MOODS.index(row["label"])) for row in mood_rows()]}
    )
    run = finetune("text-classification", frame, output=tmp_path / "frame", **options)
    assert run.model.config.id2label == {0: "0", 1: "1", 2: "2"}
    assert run.model.config.problem_type == "single_label_classification"
    frame.loc[3, "label"] = None
    with pytest.raises(InputError, match="row 4 has nothing in 'label'; give the row a label, or leave it out"):
        finetune("text-classification", frame, output=tmp_path / "gap", **options)


@pytest.mark.parametrize("again", ["a.jsonl", "./b/../a.jsonl", "link.jsonl"])
def test_a_file_that_is_given_twice_is_refused(again, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b").mkdir()
    for name in ("a.jsonl", "other.jsonl"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    assert len(read_tables(["a.jsonl", "other.jsonl"], None)) == 2
    with pytest.raises(InputError, match=r"\.jsonl is given twice, by a\.jsonl and by .*; give it once"):
        read_tables(["a.jsonl", "other.jsonl", again], None)


def test_parts_of_a_file_are_given_once_each(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"train": ROWS, "test": ROWS}))
    assert len(read_tables([f"{path}#train", f"{path}#test"], None)) == 2
    with pytest.raises(InputError, match=r"data\.json is given twice, by .*#train and by .*#train; give it once"):
        read_tables([f"{path}#train", f"{path}#test", f"{path}#train"], None)
    with pytest.raises(InputError, match=r"data\.json is given twice, by .*#train and by .*data\.json; give it once"):
        read_tables([f"{path}#train", str(path)], None)
