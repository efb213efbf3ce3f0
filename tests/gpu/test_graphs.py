"""Buckets of sizes, and what is kept of recordings. That a recording does what its function does: tests/models."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from modernbert.gpu import graphs

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


def test_what_was_used_longest_ago_is_given_up(monkeypatch):
    monkeypatch.setattr(graphs, "_KEPT", 3)
    made, kept = [], graphs.Graphs(torch.device("cpu"))

    def make(key):
        made.append(key)
        return lambda: None

    for key in (1, 2, 3, 1, 4, 1, 2):
        kept.find(key, lambda key=key: make(key))
    assert made == [1, 2, 3, 4, 2]
    assert len(kept) == 3


def test_what_is_recorded_can_be_written_in_any_mode():
    kept = graphs.Graphs(torch.device("cpu"))

    class Counter:
        def __init__(self):
            self.number = torch.zeros(1)

        def __call__(self):
            self.number += 1

    with torch.inference_mode():
        recorded, replay = kept.find("a", Counter)
        replay()
    recorded.number.fill_(5)
    replay()
    assert recorded.number.item() == 6
