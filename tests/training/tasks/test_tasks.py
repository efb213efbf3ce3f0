"""What tasks make of rows, and the metrics of their evaluations."""

import contextlib
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from modernbert import Tokenizer
from modernbert.errors import InputError
from modernbert.nn.losses import IGNORED
from modernbert.training.tasks.catalog import TASKS
from modernbert.training.tasks.data import Row, hold_out, read_tables, rows_of
from modernbert.training.tasks.metrics import (
    classification_metrics,
    multi_label_metrics,
    regression_metrics,
    squad_metrics,
    tag_metrics,
)
from modernbert.training.tasks.multiple_choice import choice_number
from modernbert.training.tasks.options import OPTIONS
from tests.training.tasks.conftest import answer_rows, tag_rows


def worker_of(task, backend, rows, **options):
    worker = TASKS[task](OPTIONS[task](**options))
    found = rows_of(read_tables(rows, None), TASKS[task].fields, {})[0]
    worker.fit_labels(found)
    prefixed = task == "token-classification"
    worker.set_tokenizer(Tokenizer(type(backend).from_str(backend.to_str()), add_prefix_space=prefixed or None), 64)
    return worker, found


class Fixed(torch.nn.Module):
    """A model whose logits are a function of the packed ids and where texts begin."""

    def __init__(self, logits_of):
        super().__init__()
        self.weight, self.logits_of = torch.nn.Parameter(torch.zeros(1)), logits_of

    def forward(self, input_ids, cu_seqlens):
        return SimpleNamespace(logits=self.logits_of(input_ids, cu_seqlens.tolist()).float())


@pytest.mark.parametrize(
    ("answers", "said", "exact", "f1"),
    [
        (["The Eiffel Tower"], "eiffel tower.", 100, 100), (["in 1889", "1889"], "1889", 100, 100),
        (["a red fox"], "red", 0, 200 / 3), (["cat"], "dog", 0, 0), ([], "", 100, 100), ([], "cat", 0, 0),
        (["well-known"], "well known", 0, 0), (["the"], "", 100, 100), (["cat", "the dog"], "A dog!", 100, 100),
        (["the cat cat"], "cat", 0, 200 / 3), (["a cat and a dog"], "dog cat cat", 0, 200 / 3), (["cat"], "", 0, 0),
    ],
)  # fmt: skip
def test_squads_metrics_of_known_answers(answers, said, exact, f1):
    assert squad_metrics([answers], [said]) == pytest.approx({"exact_match": exact, "f1": f1})


def test_metrics_of_constants_and_of_nothing_are_numbers():
    ones = np.ones(4)
    assert regression_metrics(ones, np.arange(4.0))["pearson"] == 0.0
    assert multi_label_metrics(np.eye(3, dtype=int), np.zeros((3, 3), int), np.zeros((3, 3)))["f1_micro"] == 0.0
    assert classification_metrics([0, 0], [0, 0], 2) == (
        {"accuracy": 1.0, "f1_macro": 1.0, "matthews": 0.0},
        [[2, 0], [0, 0]],
    )
    names = ["O", "B-x", "I-x"]
    assert tag_metrics([["O", "O"]], [["O", "B-x"]], names, True)[0]["f1"] == 0.0
    assert tag_metrics([["B-x", "I-x", "O"]], [["B-x", "O", "O"]], names, True)[0]["f1"] == 0.0  # a part is none
    assert tag_metrics([["B-x", "I-x", "O"]], [["B-x", "I-x", "O"]], names, True)[0]["f1"] == 1.0


def test_only_the_first_token_of_a_word_has_its_tag(backend):
    rows = [*tag_rows(6), {"tokens": ["catdogbird", "sat"], "tags": ["B-animal", "O"]}]
    worker, found = worker_of("token-classification", backend, rows)
    assert worker.names.names == ["O", "B-animal"]
    for row, example in zip(rows, worker.prepare(found, True), strict=True):
        counted = [tag for tag in example.label if tag != IGNORED]
        assert [worker.names.names[tag] for tag in counted] == row["tags"]
        assert len(example.label) == len(example.rows[0])
        assert example.label[0] == example.label[-1] == IGNORED
        text = worker.tokenizer.decode(example.rows[0], skip_special_tokens=True)
        assert text.split() == row["tokens"]


def test_windows_hold_the_answer_or_none(backend):
    rows = answer_rows(30)
    worker, found = worker_of("question-answering", backend, rows, max_length=24, stride=6)
    examples = worker.prepare(found, True)
    assert len(examples) > len(rows)
    held = set()
    for example in examples:
        first, last = example.label
        ids = list(example.rows[0])
        assert len(ids) <= 24
        if (first, last) != (0, 0):
            said = worker.tokenizer.decode(ids[first : last + 1]).strip()
            assert said == example.record["answers"][0][0]
            held.add(example.record["id"])
    assert held == {row["id"] for row in rows}  # the stride is longer than any answer
    impossible = {**rows[0], "answers": []}
    worker, found = worker_of("question-answering", backend, [impossible])
    assert all(example.label == (0, 0) for example in worker.prepare(found, True))


def test_answers_in_other_forms(backend):
    row = answer_rows(1)[0]
    start, text = row["answers"][0]["answer_start"], row["answers"][0]["text"]
    forms = [{"text": [text], "answer_start": [start]}, [{"text": text, "answer_start": start}]]
    worker, _ = worker_of("question-answering", backend, [row])
    for form in forms:
        assert worker.record_of(Row({**row, "answers": form}, "r"))["answers"] == [(text, start)]


@pytest.mark.parametrize(
    ("given", "right"), [(1, 1), ("1", 1), ("B", 1), ("b", 1), ("second one", 1), ("second one ", 1)]
)
def test_right_choices_in_many_forms(backend, given, right):
    row = {"prompt": "x", "choices": ["first one", "second one"], "label": given}
    worker, found = worker_of("multiple-choice", backend, [row])
    (example,) = worker.prepare(found, True)
    assert example.label == right
    assert len(example.rows) == 2


def test_labels_of_several_classes_and_values(backend):
    rows = [{"text": "a", "label": "1,3"}, {"text": "b", "label": "2"}, {"text": "c", "label": ["1", "2"]}]
    worker, found = worker_of("text-classification", backend, rows, problem="multi-label")
    assert worker.names.names == ["1", "2", "3"]
    truth = worker.labels(worker.prepare(found, True))["labels"]
    assert truth.tolist() == [[1, 0, 1], [0, 1, 0], [1, 1, 0]]
    assert worker.config_changes()["problem_type"] == "multi_label_classification"
    rows = [{"text": "a", "label": "low"}, {"text": "b", "label": "high"}]
    worker, found = worker_of("text-classification", backend, rows, problem="regression", labels="low,middle,high")
    assert worker.labels(worker.prepare(found, True))["labels"].tolist() == [0.0, 2.0]
    rows = [{"text": "a", "label": 0.25}, {"text": "b", "label": 3.0}]
    worker, _ = worker_of("text-classification", backend, rows)
    assert worker.problem == "regression"
    assert worker.config_changes()["num_labels"] == 1


def truth_of(backend, column, **options):
    """The targets that text-classification makes of a column of labels, and the task."""
    rows = [{"text": f"the cat {i}", "label": label} for i, label in enumerate(column)]
    worker, found = worker_of("text-classification", backend, rows, **options)
    return worker.labels(worker.prepare(found, True))["labels"].tolist(), worker


@pytest.mark.parametrize("labels", [None, "low,middle,high"])
@pytest.mark.parametrize(
    "form",
    [
        list, tuple, np.array, torch.tensor, str, json.dumps, lambda bits: [bool(bit) for bit in bits],
        lambda bits: [float(bit) for bit in bits], lambda bits: np.array(bits, dtype=np.float32),
        lambda bits: torch.tensor(bits, dtype=torch.bool), lambda bits: [np.int8(bit) for bit in bits],
        lambda bits: [str(bit) for bit in bits],
    ],
)  # fmt: skip
def test_lists_of_0_and_1_are_targets_in_every_form(backend, form, labels):
    bits = [[1, 0, 0], [0, 1, 1], [0, 0, 0]]
    truth, worker = truth_of(backend, [form(row) for row in bits], labels=labels)
    assert truth == bits
    assert worker.problem == "multi-label"
    assert worker.names.names == (["LABEL_0", "LABEL_1", "LABEL_2"] if labels is None else ["low", "middle", "high"])


def test_lists_of_names_and_of_numbers_of_classes_stay_such(backend):
    assert truth_of(backend, [["b"], ["a", "b"], []])[0] == [[0, 1], [1, 1], [0, 0]]
    assert truth_of(backend, ["['b']", '["a", "b"]', "[]"])[0] == [[0, 1], [1, 1], [0, 0]]
    assert truth_of(backend, [[0], [1, 3], [3]])[1].names.names == ["0", "1", "3"]
    assert truth_of(backend, [[0.0], [2.0]], labels="x,y,z")[0] == [[1, 0, 0], [0, 0, 1]]
    assert truth_of(backend, [[1.0], [0.0]])[0] == [[1], [0]]  # one class, and whether a text has it
    assert truth_of(backend, [["a"], {"b", "a"}])[0] == [[1, 0], [1, 1]]


@pytest.mark.parametrize(
    ("labels", "options", "said"),
    [
        ([[1, 0, 0], [1, 0, 0, 0]], {}, "row 2 has 4 numbers of 0 and 1 and .*row 1 has 3; give one for each class"),
        ([[1, 0, 0], [0, 0, 1]], {"labels": "a,b"}, "row 1 has 3 numbers of 0 and 1, and labels names 2 classes"),
        ([[0.2, 0.8], [0.5, 0.5]], {}, "row 1 has 0.2 among its labels"),
        ([["a"], ["b", None]], {}, "row 2 has None among its labels"),
        ([[1, -100], [0, 1]], {}, "row 1 has -100 among its labels"),
        ([[1, 0], [0, 1]], {"problem": "single-label"}, "row 1 has a list of labels, and problem is single-label"),
        ([{"a": 1}, {"a": 2}], {}, "row 1 has the label {'a': 1}; give a name"),
    ],
)
def test_lists_of_labels_that_make_no_sense_are_refused(backend, labels, options, said):
    with pytest.raises(InputError, match=said):
        truth_of(backend, labels, **options)


@pytest.mark.parametrize(
    ("labels", "problem", "names"),
    [
        (["3", "3.5", "4"], "regression", None), ([3, 3.5, 4], "regression", None), ([0.25, 3.0], "regression", None),
        (["0.0", "1.0", "1.0"], "single-label", ["0", "1"]), ([0.0, 1.0], "single-label", ["0", "1"]),
        (["1", "2.0", 3, 10.0], "single-label", ["1", "2", "3", "10"]), ([True, False], "single-label",
        ["False", "True"]), (["1.0", "2.0", "beta"], "single-label", ["1.0", "2.0", "beta"]),
        (["007", "7"], "single-label", ["007", "7"]), (["\u00b2", "a"], "single-label", ["a", "\u00b2"]),
        ([np.float32(0.5), np.float32(1)], "regression", None),
        ([np.int64(1), np.int64(0)], "single-label", ["0", "1"]),
        (["nan", "a"], "single-label", ["a", "nan"]),
    ],
)  # fmt: skip
def test_the_whole_column_says_what_labels_are(backend, labels, problem, names):
    _, worker = truth_of(backend, labels)
    assert worker.problem == problem
    assert names is None or worker.names.names == names
    assert any(
        f"labels: {problem}, because" in note and "problem=KIND sets another kind" in note for note in worker.notes
    )


def test_a_label_of_minus_100_does_not_count(backend):
    truth, worker = truth_of(backend, ["a", "-100", "b", -100, -100.0, "a"])
    assert truth == [0, 1, 0]
    assert worker.names.names == ["a", "b"]
    assert "not counted, as the label is -100: 3 of 6 rows" in worker.notes
    assert truth_of(backend, [0.5, -100.0], problem="regression")[0] == [0.5, -100.0]  # a value as any other
    assert truth_of(backend, ["a", "-100"], labels="a,-100")[0] == [0, 1]  # a name that somebody gave


@pytest.mark.parametrize("form", [int, str, float, np.int64])
def test_a_tag_of_minus_100_does_not_count(backend, form):
    rows = tag_rows(6)
    for row in rows:
        row["tags"] = [tag if i else form(-100) for i, tag in enumerate(row["tags"])]
    rows.append({"tokens": ["the"], "tags": [form(-100)]})
    worker, found = worker_of("token-classification", backend, rows)
    assert worker.names.names == ["O", "B-animal"]
    examples = worker.prepare(found, True)
    assert len(examples) == 6  # nothing of the last row counts
    for row, example in zip(rows[:-1], examples, strict=True):
        counted = [worker.names.names[tag] for tag in example.label if tag != IGNORED]
        assert counted == row["tags"][1:]

    tags = [tag for row in rows for tag in row["tags"][1:]]
    found = worker.evaluate_on(Fixed(lambda ids, starts: torch.tensor([[1, 0]]).expand(len(ids), -1)), examples)
    assert found.metrics["accuracy"] == pytest.approx(tags.count("O") / len(tags))
    assert sum(map(sum, found.confusion)) == len(tags)
    with pytest.raises(InputError, match="row 1 has no tag for a word"):
        worker_of("token-classification", backend, [{"tokens": ["a", "b"], "tags": ["O", None]}])


def test_nothing_becomes_the_word_none(backend):
    row = {"question": "None", "context": "None here", "answers": {"text": [None], "answer_start": [0]}}
    worker, found = worker_of("question-answering", backend, [row])
    with pytest.raises(InputError, match="give a list of text and answer_start"):
        worker.prepare(found, True)
    rows = [{"prompt": "x", "choices": {"text": ["a", "b"], "label": [None, "None"]}, "label": "None"}]
    found = rows_of(read_tables(rows, None), TASKS["multiple-choice"].fields, {})[0]
    assert choice_number(found[0]) == 1
    rows = [{"text": "a", "label": "x", "doc": None} for _ in range(20)]
    found = rows_of(read_tables(rows, None), TASKS["text-classification"].fields, {})[0]
    train, held = hold_out(found, 0.2, "doc")  # rows of no document are not of one document
    assert (len(train), len(held)) == (16, 4)
    options = OPTIONS["sentence-embedding"].of({"query_prompt": None, "train": None, "output": "x", "seed": None})
    assert (options.query_prompt, options.train, options.seed) == ("", [], 0)
    with pytest.raises(InputError, match=r"train is \[None\]; it must be a string or a list"):
        OPTIONS["sentence-embedding"].of({"train": [None]})


def test_every_piece_of_raw_text_is_learnt_from(backend):
    text = ". ".join("the cat sat on the mat and the dog ran under the tree" for _ in range(20))
    worker, found = worker_of("causal-lm", backend, [{"text": text}], max_length=32)
    examples = worker.prepare(found, True)
    assert all(len(example.rows[0]) <= 32 for example in examples)
    said = " ".join(worker.tokenizer.decode(example.rows[0], skip_special_tokens=True) for example in examples)
    assert "".join(said.split()) == "".join(text.split())


def test_long_texts_are_cut_and_that_is_told(backend):
    rows = [{"text": "the cat " * 60, "label": "a"}, {"text": "the cat", "label": "b"}]
    worker, found = worker_of("text-classification", backend, rows)
    assert len(worker.prepare(found, True)[0].rows[0]) == 64
    assert any("1 of 2 texts is longer than 64 tokens and was cut" in note for note in worker.notes)


def test_random_negatives_are_never_the_right_document(backend):
    rows = [{"query": f"q {i}", "document": f"the cat {i % 5}"} for i in range(20)]
    worker, found = worker_of("text-ranking", backend, rows, negatives=3)
    examples = worker.prepare(found, True)
    right = {row["query"]: row["document"] for row in rows}
    assert sum(example.label for example in examples) == 20
    assert all((e.record["document"] == right[e.record["query"]]) == (e.label == 1.0) for e in examples)
    assert len(examples) >= 20 * 4


def test_a_model_that_knows_the_answers_is_perfect_by_its_metrics(backend):
    rows = tag_rows(12)
    worker, found = worker_of("token-classification", backend, rows)
    examples = worker.prepare(found, False)
    by_ids = {tuple(example.rows[0]): example.label for example in examples}

    def logits_of(ids, starts):
        labels = [by_ids[tuple(ids[a:b].tolist())] for a, b in itertools.pairwise(starts)]
        flat = torch.tensor([tag for label in labels for tag in label])
        return torch.nn.functional.one_hot(flat.clamp(min=0), 2)

    found = worker.evaluate_on(Fixed(logits_of), examples)
    assert found.metrics["f1"] == found.metrics["accuracy"] == 1.0
    assert found.errors == []


# Weights of classes


LABELLED = [{"text": "a", "label": label} for label in ("x", "x", "x", "y")]
SEVERAL = [{"text": "a", "label": label} for label in (["x"], ["x", "y"], ["x", "z"], [])]
TAGGED = [{"tokens": ["a", "b", "c"], "tags": tags} for tags in (["O", "O", "B-p"], ["O", -100, "B-p"])]


@pytest.mark.parametrize(
    ("task", "rows", "given", "expected"),
    [
        ("text-classification", LABELLED, "balanced", [2 / 3, 2.0]),
        ("text-classification", LABELLED, ["1", "2.5"], [1.0, 2.5]),
        ("text-classification", LABELLED, ["y=3"], [1.0, 3.0]),
        ("text-classification", SEVERAL, "balanced", [1 / 3, 3.0, 3.0]),
        ("token-classification", TAGGED, "balanced", [5 / 6, 5 / 4]),
        ("text-classification", LABELLED, [], None),
    ],
)
def test_classes_have_weights_and_the_loss_is_their_mean(real_backend, task, rows, given, expected):
    worker, found = worker_of(task, real_backend, rows, class_weights=given)
    examples = worker.prepare(found, True)
    if expected is None:
        assert worker.class_weights is None
        return
    assert worker.class_weights.tolist() == pytest.approx(expected)
    batch = worker.collate(examples, [0] * len(examples))
    labels, classes = batch["labels"], len(expected)
    logits = torch.randn(len(labels), classes)
    model = Fixed(lambda ids, starts: logits)
    total = worker.count(batch)
    loss = worker.losses(model, [batch], total, lambda is_last: contextlib.nullcontext(lambda loss: None))
    weights = torch.tensor(expected)
    if labels.is_floating_point():
        reference = torch.nn.BCEWithLogitsLoss(pos_weight=weights)(logits, labels)
    else:
        reference = torch.nn.CrossEntropyLoss(weights)(logits, labels)
    torch.testing.assert_close(loss, reference)


@pytest.mark.parametrize("given", [["x=-1"], ["q=1"], ["1", "2", "3"], ["fair"], ["x=a"]])
def test_weights_of_no_class_are_refused(real_backend, given):
    worker, found = worker_of("text-classification", real_backend, LABELLED, class_weights=given)
    with pytest.raises(InputError, match=r"class_weights is .*; give balanced, LABEL=WEIGHT, or .* each of x, y"):
        worker.prepare(found, True)


def test_values_have_no_classes_to_weigh(real_backend):
    rows = [{"text": "a", "label": value} for value in (0.5, 1.5)]
    worker, found = worker_of("text-classification", real_backend, rows, class_weights="balanced")
    with pytest.raises(InputError, match="labels are values"):
        worker.prepare(found, True)


def test_words_are_tagged_with_a_tokenizer_that_is_not_byte_level(tmp_path):
    backend = Backend(models.WordLevel({"[UNK]": 0, "a": 1}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    worker = TASKS["token-classification"](OPTIONS["token-classification"]())
    assert worker.load_tokenizer(tmp_path, worker.options)("a").input_ids == [1]
