"""Each sampler against the obvious way to write it, and the draw against PyTorch's own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modernbert.decoding.options import GenerationOptions
from modernbert.decoding.samplers import (
    Draw,
    History,
    compose,
    forbid_end,
    forbid_repeated_ngrams,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    scale,
)

NEVER = float("-inf")


def scores(seed, texts=3, vocabulary=11):
    return torch.randn(texts, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def histories(seed, texts=3, vocabulary=11):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (texts,), generator=generator).tolist()
    return [History(torch.randint(0, vocabulary, (n,), generator=generator).tolist(), 1, 99) for n in lengths]


@given(st.integers(0, 10_000), st.integers(1, 14))
def test_top_k(seed, k):
    x = scores(seed)
    for row, out in zip(x, keep_top_k(x, [], k), strict=True):
        kept = set(sorted(range(11), key=lambda i: -row[i])[:k])
        assert {i for i in range(11) if out[i] > NEVER} == kept
        assert all(out[i] == row[i] for i in kept)


@given(st.integers(0, 10_000), st.floats(0.05, 0.99))
def test_top_p(seed, p):
    x = scores(seed)
    for row, out in zip(x, keep_top_p(x, [], p), strict=True):
        total, kept = 0.0, set()
        for i in sorted(range(11), key=lambda i: -row[i]):
            kept.add(i)
            total += row.softmax(0)[i].item()
            if total >= p + 1e-6:
                break
        found = {i for i in range(11) if out[i] > NEVER}
        assert found == kept or abs(row.softmax(0)[list(found)].sum().item() - p) < 1e-5


@given(st.integers(0, 10_000), st.floats(0.0, 1.0))
def test_min_p(seed, p):
    x = scores(seed)
    for row, out in zip(x, keep_min_p(x, [], p), strict=True):
        likely = row.softmax(0)
        assert [bool(o > NEVER) for o in out] == [bool(q >= p * likely.max()) for q in likely]


@given(st.integers(0, 10_000), st.integers(1, 5))
def test_no_ngram_occurs_twice(seed, size):
    x, texts = scores(seed), histories(seed)
    out = forbid_repeated_ngrams(x, texts, size)
    for row, text, before in zip(out, texts, x, strict=True):
        seen = {tuple(text.ids[i : i + size]) for i in range(len(text.ids) - size + 1)}
        for token in range(11):
            repeated = tuple([*text.ids, token][-size:]) in seen and len(text.ids) >= size - 1
            assert (row[token] == NEVER) == repeated
            assert repeated or row[token] == before[token]


@given(st.integers(0, 10_000))
def test_repetition(seed):
    x, texts = scores(seed), histories(seed)
    out = penalize_repetition(x, texts, 1.7)
    for row, text, before in zip(out, texts, x, strict=True):
        for token in range(11):
            factor = 1.0 if token not in text.ids else 1 / 1.7 if before[token] > 0 else 1.7
            assert row[token].item() == pytest.approx(before[token].item() * factor)


def test_an_end_is_not_taken_early():
    x = scores(0, texts=2)
    out = forbid_end(x, [History([1, 1, 5], 2, 9), History([1, 5, 5], 1, 9)], [3, 4], 2)
    assert out[0, 3] == out[0, 4] == NEVER
    assert torch.equal(out[1], x[1])


def test_composition_keeps_the_order_and_leaves_the_scores_alone():
    x, texts = scores(1), histories(1)
    before = x.clone()
    values = {"do_sample": True, "temperature": 0.5, "top_k": 4, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 2.0}
    expected = penalize_repetition(x, texts, 2.0)
    expected = scale(expected, texts, 0.5)
    expected = keep_top_k(expected, texts, 4)
    expected = keep_top_p(expected, texts, 0.8)
    expected = keep_min_p(expected, texts, 0.05)
    out = x
    for sampler in compose(GenerationOptions.make(values, {})):
        out = sampler(out, texts)
    assert torch.equal(out, expected)
    assert torch.equal(x, before)
    assert not compose(GenerationOptions.make({}, {}))


def test_a_draw_is_pytorch_s_multinomial():
    x = scores(2, texts=5, vocabulary=300)
    for seed in range(20):
        torch.manual_seed(seed)
        expected = torch.multinomial(x.softmax(-1), 1)[:, 0]
        torch.manual_seed(seed)
        assert torch.equal(Draw(5, None)(x, [0, 1, 2, 3, 4]), expected)
        drawn = Draw(5, torch.Generator().manual_seed(seed))(x[[1, 4]], [1, 4])
        assert torch.equal(drawn, expected[[1, 4]])  # who is finished does not change what the others get


def test_a_text_with_a_generator_of_its_own_draws_by_itself():
    x = scores(3, texts=4, vocabulary=50)
    together = Draw(4, [torch.Generator().manual_seed(i) for i in range(4)])(x, [0, 1, 2, 3])
    for i in range(4):
        alone = Draw(1, [torch.Generator().manual_seed(i)])(x[i : i + 1], [0])
        assert alone == together[i]


def test_draws_have_their_probabilities():
    x = torch.tensor([[0.0, 1.0, 2.0]]).expand(20_000, 3)
    counts = Draw(20_000, torch.Generator().manual_seed(0))(x, list(range(20_000))).bincount(minlength=3) / 20_000
    torch.testing.assert_close(counts, x[0].softmax(0), rtol=0, atol=0.01)
