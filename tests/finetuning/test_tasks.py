"""What tasks make of rows, and how they judge."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modernbert import Tokenizer
from modernbert.finetuning.data import Row
from modernbert.finetuning.metrics import (
    classification_figures,
    entity_figures,
    multi_label_figures,
    regression_figures,
    squad_figures,
)
from modernbert.finetuning.options import OPTIONS
from modernbert.finetuning.tasks import TASKS
from modernbert.ops.losses import IGNORED
from tests.finetuning.conftest import answer_rows, tag_rows


def worker_of(task, backend, rows, **options):
    worker = TASKS[task](OPTIONS[task](**options))
    found = [Row({**row, "_record": row}, f"row {i}") for i, row in enumerate(rows, 1)]
    worker.learn(found)
    prefixed = task == "token-classification"
    worker.use(Tokenizer(type(backend).from_str(backend.to_str()), add_prefix_space=prefixed or None), 64)
    return worker, found


texts = st.text(alphabet="ab thean.,'! ", max_size=20)


def words_of(text):
    """What SQuAD compares: lower case, no punctuation, no articles."""
    kept = "".join(c for c in text.lower() if c not in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
    return [word for word in kept.split() if word not in ("a", "an", "the")]


@given(st.lists(texts, min_size=1, max_size=3), texts)
def test_squads_figures_by_counting(answers, said):
    def f1(one):
        rest, shared = words_of(one), 0
        for word in words_of(said):
            if word in rest:
                rest.remove(word)
                shared += 1
        if not words_of(one) or not words_of(said):
            return float(words_of(one) == words_of(said))
        precision, recall = shared / len(words_of(said)), shared / len(words_of(one))
        return 0.0 if not shared else 2 * precision * recall / (precision + recall)

    found = squad_figures([answers], [said])
    assert found["exact_match"] == 100 * max(float(words_of(one) == words_of(said)) for one in answers)
    assert found["f1"] == pytest.approx(100 * max(map(f1, answers)))


@pytest.mark.parametrize(
    ("answers", "said", "exact", "f1"),
    [
        (["The Eiffel Tower"], "eiffel tower.", 100, 100), (["in 1889", "1889"], "1889", 100, 100),
        (["a red fox"], "red", 0, 200 / 3), (["cat"], "dog", 0, 0), ([], "", 100, 100), ([], "cat", 0, 0),
        (["well-known"], "well known", 0, 0),
    ],
)  # fmt: skip
def test_squads_figures_of_known_answers(answers, said, exact, f1):
    assert squad_figures([answers], [said]) == pytest.approx({"exact_match": exact, "f1": f1})


def test_figures_of_constants_and_of_nothing_are_numbers():
    import numpy as np

    ones = np.ones(4)
    assert regression_figures(ones, np.arange(4.0))["pearson"] == 0.0
    assert multi_label_figures(np.eye(3, dtype=int), np.zeros((3, 3), int), np.zeros((3, 3)))["f1_micro"] == 0.0
    assert classification_figures([0, 0], [0, 0], 2) == (
        {"accuracy": 1.0, "f1_macro": 1.0, "matthews": 0.0},
        [[2, 0], [0, 0]],
    )
    assert entity_figures([["O", "O"]], [["O", "B-x"]])["f1"] == 0.0
    assert entity_figures([["B-x", "I-x", "O"]], [["B-x", "O", "O"]])["f1"] == 0.0  # a part is none
    assert entity_figures([["B-x", "I-x", "O"]], [["B-x", "I-x", "O"]])["f1"] == 1.0


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
    assert any("1 of 2 texts are longer than 64 tokens and were cut" in note for note in worker.notes)


def test_random_negatives_are_never_the_right_document(backend):
    rows = [{"query": f"q {i}", "document": f"the cat {i % 5}"} for i in range(20)]
    worker, found = worker_of("text-ranking", backend, rows, negatives=3)
    examples = worker.prepare(found, True)
    right = {row["query"]: row["document"] for row in rows}
    assert sum(example.label for example in examples) == 20
    assert all((e.record["document"] == right[e.record["query"]]) == (e.label == 1.0) for e in examples)
    assert len(examples) >= 20 * 4


def test_a_model_that_knows_the_answers_is_judged_perfect(backend):
    """The judges count as they say, on outputs that are known."""
    rows = tag_rows(12)
    worker, found = worker_of("token-classification", backend, rows)
    examples = worker.prepare(found, False)
    by_ids = {tuple(example.rows[0]): example.label for example in examples}

    class Oracle(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, cu_seqlens):
            starts = cu_seqlens.tolist()
            labels = [by_ids[tuple(input_ids[a:b].tolist())] for a, b in itertools.pairwise(starts)]
            flat = torch.tensor([tag for label in labels for tag in label]).clamp(min=0)
            return type("Out", (), {"logits": torch.nn.functional.one_hot(flat, 2).float()})

    found = worker.judge(Oracle(), examples)
    assert found.figures["f1"] == found.figures["accuracy"] == 1.0
    assert found.errors == []
