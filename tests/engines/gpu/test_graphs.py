"""Buckets of sizes, and what is kept of recordings. That a recording does what its function does: tests/models."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from modernbert.engines.gpu import graphs

LENGTHS = st.lists(st.integers(0, 900), min_size=1, max_size=9) | st.lists(st.integers(0, 30), max_size=256)


@given(LENGTHS)
def test_a_bucket_holds_its_batch_and_little_more(lengths):
    size = graphs.bucket(lengths)
    if not sum(lengths):
        assert size is None
        return
    assert size.tokens >= sum(lengths)
    assert size.texts >= len(lengths)
    assert size.longest >= max(lengths)
    assert size.tokens <= max(16, sum(lengths) + 15, 1.25 * sum(lengths))
    assert size.texts < 4 * len(lengths)
    assert size.longest < max(129, 2 * max(lengths))
    assert size.fillers * size.longest >= size.tokens - sum(lengths)  # what is left over are texts too


def test_there_are_few_buckets_and_none_for_what_is_too_large():
    found = {graphs.bucket([tokens]) for tokens in range(1, graphs.LARGEST + 1)}
    assert len(found) < 50
    assert graphs.bucket([graphs.LARGEST + 1]) is None
    assert graphs.bucket([1] * (graphs.MOST_TEXTS + 1)) is None
    assert graphs.bucket([0]) is graphs.bucket([]) is None
    assert [graphs.step_bucket(n) for n in (1, 2, 3, 5, 64, 65)] == [1, 2, 4, 8, 64, 128]


def run(kept, key, make, take=lambda recorded: None, read=lambda recorded: None):
    return kept.run(key, make, take, read)


def test_what_was_used_longest_ago_is_given_up(monkeypatch):
    monkeypatch.setattr(graphs, "_KEPT", 3)
    made, kept = [], graphs.Graphs(torch.device("cpu"))

    def make(key):
        made.append(key)
        return lambda: None

    for key in (1, 2, 3, 1, 4, 1, 2):
        run(kept, key, lambda key=key: make(key))
    assert made == [1, 2, 3, 4, 2]
    assert len(kept) == 3


def filling(number):
    return lambda recorded: recorded.given.fill_(number)


class Doubled:
    def __init__(self):
        self.given, self.out, self.runs = torch.zeros(1), None, 0

    def __call__(self):
        self.runs += 1
        self.out = self.given * 2


def test_a_batch_is_taken_before_anything_runs_and_read_after_it():
    kept = graphs.Graphs(torch.device("cpu"))
    for number in (3.0, 5.0):
        got = run(kept, "a", Doubled, filling(number), lambda recorded: recorded.out.item())
        assert got == 2 * number


def test_a_bucket_is_recorded_at_its_second_use_with_the_batch_in_place(monkeypatch):
    """On a card recording runs the function: what it finds must be the batch, not what was there before."""
    kept, held = graphs.Graphs(torch.device("cpu")), []

    def record(self, function):
        held.append(function.given.item())
        return function

    monkeypatch.setattr(graphs.Graphs, "_record", record)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())

    class Stream:
        def wait_event(self, event):
            assert event == "read"

        def record_event(self):
            return "read"

    kept.device = torch.device("cuda", 0)
    for number in (3.0, 5.0, 7.0, 9.0):
        assert run(kept, "a", Doubled, filling(number), lambda recorded: recorded.out.item()) == 2 * number
    assert held == [5.0]


def test_what_runs_can_be_written_in_any_mode():
    kept = graphs.Graphs(torch.device("cpu"))
    with torch.inference_mode():
        run(kept, "a", Doubled, lambda recorded: recorded.given.fill_(1))
    run(kept, "a", Doubled, lambda recorded: recorded.given.fill_(2))
