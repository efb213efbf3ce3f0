"""Random calls of every task and random files: each ends in an answer, or in one line that is an error of ours.

`MODERNBERT_FUZZ=5000 pytest tests/pipelines/test_fuzz.py` makes so many calls; `MODERNBERT_FUZZ_SEED` other ones.
"""

import json
import os
import random
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from modernbert import pipeline
from modernbert.checks import fields_of
from modernbert.errors import shown
from modernbert.io.tables import ResumableOutput, count_records, read_in_place, read_records
from tests.io.test_records import interrupted
from tests.pipelines.test_streams import CASES

CALLS = int(os.environ.get("MODERNBERT_FUZZ", "330"))
SEED = int(os.environ.get("MODERNBERT_FUZZ_SEED", "0"))
WORDS = ["the", "dog", "[MASK]", "ran", "\n", "  ", "é", "🙂", "\x1b[31m", "\u202e", "\x00", "ﬁ"]
WORDS += ["[CLS]", "[SEP]", "1.5", "!", "—"]
NUMBERS = [0, 1, 2, 3, 7, 48, 511, -1, 1.0, 0.5, float("nan"), float("inf"), 10**20, True, False]


def text(rng):
    return " ".join(rng.choice(WORDS) for _ in range(rng.choice([0, 1, 1, 2, 3, 5, 8, 30, 700])))


def odd(rng):
    """Anything that somebody may hand over by mistake."""
    deep = []
    for _ in range(rng.choice([1, 3, 2000])):
        deep = [deep]
    texts = ["", "\n", "lone \ud800", text(rng), b"bytes", Path("a.txt"), np.array(text(rng)), (text(rng),)]
    several = [[], {}, [text(rng), None], [text(rng), text(rng)], deep, {"text": text(rng)}, {"text": None, "other": 1}]
    others = [None, rng.choice(NUMBERS), {"a"}, np.array([1.0, 2.0]), np.int64(3), range(3), object()]
    return rng.choice([*texts, *several, *others])


def some_input(rng, make):
    """An input of the task, as it should be or with a part that is not."""
    if rng.random() < 0.2:
        return odd(rng)
    item = make(text(rng))
    if isinstance(item, dict) and rng.random() < 0.4:
        item = {**item, rng.choice([*item, "more"]): odd(rng)}
        if rng.random() < 0.3:
            del item[rng.choice([*item])]
    return item


def some_value(rng, name):
    if name in ("max_new_tokens", "max_length", "min_new_tokens", "num_beams", "num_return_sequences"):
        return rng.choice([None, -1, 0, 1, 2, 3, "2", 1.5, True])  # what costs time by itself
    words = ["none", "simple", "first", "softmax", "mean", "cls", "query", "longest_first", "sigmoid", "{}", "a {} b"]
    return rng.choice([rng.choice(NUMBERS), rng.choice(words), odd(rng), [text(rng)], ["a", "b"], True, None])


def call(rng, serve, make):
    shape = rng.random()
    if shape < 0.4:
        inputs = some_input(rng, make)
    else:
        inputs = [some_input(rng, make) for _ in range(rng.choice([0, 1, 2, 5]))]
        inputs = inputs if shape < 0.8 else iter(inputs)
    known = [field.name for field in fields_of(serve.options)]
    names = rng.sample(known, min(len(known), rng.choice([0, 0, 1, 1, 2, 3])))
    options = {name: some_value(rng, name) for name in names}
    if rng.random() < 0.3:
        options["on_error"] = "return"
    if rng.random() < 0.02:
        options["no_such_option"] = 1
    given = f"{serve.task}({shown(inputs)}, {[(name, shown(value)) for name, value in options.items()]})"
    try:
        answers = serve(inputs, **options)
        if hasattr(answers, "__next__"):
            answers = list(answers)
        return given, None
    except Exception as error:
        return given, error


def problem(given, error):
    """What is wrong with how a call ended, in words; None where nothing is."""
    message = str(error)
    if type(error).__module__ != "modernbert.errors":
        return f"{given} -> {type(error).__name__}: {message[:300]}"
    if len(message) >= 1000 or len(message.splitlines()) != 1:
        return f"{given} -> {len(message)} characters in {len(message.splitlines())} lines: {message[:300]!r}"
    if any(c < " " or "\x7f" <= c < "\xa0" for c in message):
        return f"{given} -> control characters: {message!r}"
    return None


@pytest.mark.parametrize("task", CASES)
def test_every_call_ends_in_an_answer_or_in_one_line(heads, task):
    head, options, make = CASES[task]
    serve = pipeline(task, heads / head, **options)
    ended, problems = [], []
    for i in range(-(-CALLS // len(CASES))):
        given, error = call(random.Random(f"{SEED} {task} {i}"), serve, make)
        ended.append(error is None)
        problems += [f"{i}: {problem(given, error)}"] if error is not None and problem(given, error) else []
    assert not problems, "\n".join(problems[:10])
    assert any(ended)
    assert not all(ended)


SUFFIXES = (".txt", ".jsonl", ".csv", ".tsv", ".json", ".conll", ".parquet")


def content(rng, suffix, path):
    """A file of its kind, then often broken."""
    rows = [{"text": text(rng)[:200], "n": rng.choice([None, 1, 2])} for _ in range(rng.randrange(6))]
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows or [{"text": "a"}]), path)
        data = path.read_bytes()
    elif suffix == ".json":
        data = json.dumps(rng.choice([rows, {"train": rows}, {"data": rows}, rows[:1], "a", [[1, "b"]]])).encode()
    elif suffix == ".jsonl":
        lines = [rng.choice([json.dumps(row), json.dumps(row["text"]), "", "7", "[" * 3000]) for row in rows]
        data = "\n".join(lines).encode()
    elif suffix in (".csv", ".tsv"):
        cut = "," if suffix == ".csv" else "\t"
        data = "\n".join([f"text{cut}n", *(f'"{row["text"]}"{cut}{row["n"]}' for row in rows), ""]).encode()
    else:
        data = "\n".join(rng.choice(["", "word O", row["text"]]) for row in rows).encode()
    data = bytearray(data)
    for _ in range(rng.choice([0, 0, 1, 3])):
        if data:
            place = rng.randrange(len(data))
            data[place : place + rng.choice([0, 1, 1, 9])] = rng.choice([b"\x00", b"\xff", b'"', b"\n\n", b"{", b"\r"])
    if rng.random() < 0.2:
        data = data[: rng.randrange(len(data) + 1)]
    path.write_bytes(bytes(data))


def test_every_file_is_read_or_refused_in_one_line(tmp_path):
    for i in range(max(CALLS // 2, 1)):
        rng = random.Random(f"{SEED} file {i}")
        suffix = rng.choice(SUFFIXES)
        path = tmp_path / f"in{suffix}"
        content(rng, suffix, path)
        given = f"file {i}, {suffix}: {path.read_bytes()[:200]!r}"
        for read in (read_records, read_in_place):
            try:
                records = list(read(path))
                count = count_records(path) if read is read_in_place else None
            except Exception as error:
                records, count = [error], None
            problems = [problem(given, record) for record in records if not isinstance(record, dict)]
            assert not any(problems), problems
            assert count is None or count == len(records), given


def test_every_record_that_was_read_is_written_and_read_again(tmp_path):
    for i in range(max(CALLS // 10, 1)):
        rng = random.Random(f"{SEED} record {i}")
        records = []
        for _ in range(rng.randrange(1, 5)):
            plain = [text(rng)[:100], "lone \ud800", None, {"text": text(rng)[:100], "more": [1, None]}]
            records.append(
                {"input": rng.choice(plain), "output": rng.choice([1.5, {"label": text(rng)[:50]}, [{"a": "b"}]])}
            )
        cut = rng.randrange(len(records) + 1)
        interrupted(tmp_path / f"out-{i}.jsonl", {"seed": i}, records[:cut])
        with ResumableOutput(tmp_path / f"out-{i}.jsonl", {"seed": i}) as output:
            assert output.done == cut
            for record in records[cut:]:
                output.write(record)
        assert list(read_records(tmp_path / f"out-{i}.jsonl")) == records


def test_columns_of_any_values_are_written_in_every_form(tmp_path):
    values = [None, 1, -(2**70), 2**60, 1.5, float("nan"), True, "", 'a,\tb\n"', "lone \ud800", "\x00"]
    values += [[1, None], {"a": {}}]
    for i in range(max(CALLS // 10, 1)):
        rng = random.Random(f"{SEED} columns {i}")
        suffix = rng.choice([".csv", ".tsv", ".parquet", ".jsonl"])
        path = tmp_path / f"out-{i}{suffix}"
        with ResumableOutput(path, {}) as output:
            for number in range(rng.randrange(1, 5)):
                row = {name: rng.choice(values) for name in rng.sample(["a", "b", "output", "error", "é"], 3)}
                answer = (
                    {"error": "why"} if rng.random() < 0.3 else {"output": rng.choice([{"label": "x"}, 0.5, ["x"]])}
                )
                output.write({"input": f"text {number}", **answer, "row": {"n": number, **row}})
        assert len(list(read_records(path))) == output.done
