"""Pooling: each mode beside its definition, spans anywhere, the same bits whatever else is pooled."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modernbert.nn.packing import Packing
from modernbert.nn.pooling import POOLINGS, pool


def obvious(rows, mode, places):
    """One text's rows (L, M), pooled by the definition."""
    if not len(rows):
        return torch.zeros(rows.shape[1])
    weights = places.double() + 1
    return {
        "cls": lambda: rows[0],
        "last": lambda: rows[-1],
        "mean": lambda: rows.double().mean(0),
        "max": lambda: rows.max(0).values,
        "weighted_mean": lambda: (rows.double() * weights[:, None]).sum(0) / weights.sum(),
        "mean_sqrt_len": lambda: rows.double().sum(0) / len(rows) ** 0.5,
    }[mode]().float()


@given(st.lists(st.integers(0, 9), max_size=6), st.sampled_from(POOLINGS))
def test_every_mode_is_its_definition(lengths, mode):
    packing = Packing.from_lengths(lengths)
    x = torch.randn(packing.tokens, 5)
    out = pool(x, packing.spans, mode, packing.positions_T)
    assert out.shape == (len(lengths), 5)
    for (start, end), vector in zip(packing.spans, out, strict=True):
        places = packing.positions_T[start:end]
        torch.testing.assert_close(vector, obvious(x[start:end], mode, places), rtol=1e-5, atol=1e-6)
        assert torch.equal(pool(x, [(start, end)], mode, packing.positions_T)[0], vector)


@pytest.mark.parametrize("mode", POOLINGS)
def test_spans_may_lie_anywhere_and_overlap(mode):
    x, places = torch.randn(20, 3), torch.arange(20)
    spans = [(4, 9), (0, 20), (7, 7), (9, 10)]
    out = pool(x, spans, mode, places)
    for (start, end), vector in zip(spans, out, strict=True):
        torch.testing.assert_close(vector, obvious(x[start:end], mode, places[start:end]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", POOLINGS)
def test_gradients_and_low_precision(mode):
    x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    pool(x.float(), [(0, 5), (5, 9)], mode, torch.arange(9)).sum().backward()
    assert x.grad.isfinite().all()
    assert pool(torch.randn(9, 4).bfloat16(), [(0, 9)], mode, torch.arange(9)).dtype == torch.bfloat16
