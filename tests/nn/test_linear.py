"""Rows of a linear layer do not depend on each other, bit for bit, and its gradients are right."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from modernbert.engines.cpu.onednn import OneDnnWeight
from modernbert.nn.linear import linear, planned_rows
from tests.conftest import threads

SHAPES = [(768, 2304), (1152, 768), (192, 576), (64, 192), (48, 97), (33, 5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("onednn", [True, False], ids=["onednn", "blocks"])
def test_a_row_is_the_same_whatever_the_number_of_rows(shape, dtype, number, onednn, monkeypatch):
    if not onednn:
        monkeypatch.setattr("modernbert.nn.linear.onednn_serves", lambda x: False)
    inputs, outputs = shape
    x, weight, bias = torch.randn(700, inputs), torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    with threads(number, onednn), torch.inference_mode():
        whole = linear(x, weight, bias)
        laid = OneDnnWeight(weight, bias) if onednn else None
        for rows, start in itertools.product((1, 2, 3, 7, 16, 17, 64, 65, 129, 500), (0, 1, 199)):
            part = x[start : start + rows]
            assert torch.equal(linear(part, weight, bias), whole[start : start + rows]), rows
            assert laid is None or torch.equal(laid.product(part), whole[start : start + rows]), rows
    expected = F.linear(x.double(), weight.double(), bias.double())
    limit = 1e-5 if dtype == torch.float32 else 0.05
    assert (whole.double() - expected).abs().max() < limit


def test_gradients():
    x = torch.randn(9, 12, requires_grad=True)
    weight, bias = torch.randn(7, 12, requires_grad=True), torch.randn(7, requires_grad=True)
    ours = linear(x, weight, bias)
    theirs = F.linear(x, weight, bias)
    grad = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, (x, weight, bias), grad),
        torch.autograd.grad(theirs, (x, weight, bias), grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_leading_dimensions_no_rows_and_autocast():
    weight = torch.randn(4, 6, requires_grad=True)
    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
    assert linear(x[:0].flatten(0, 1), weight).shape == (0, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear(x, weight)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert weight.grad.dtype == torch.float32


def test_double_precision_falls_back_to_blocks():
    x, weight = torch.randn(5, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))


def test_few_numbers_of_rows_are_computed_so_that_memory_stays_flat():
    """oneDNN keeps a plan for every number of rows; planned ones are few, and not much larger than asked for."""
    for rows in range(1, 5000):
        planned = planned_rows(rows)
        assert rows <= planned <= (8 if rows <= 8 else rows * 1.45)
        assert rows <= 64 or planned <= rows * 1.125
    assert len({planned_rows(rows) for rows in range(1, 8193)}) <= 70
    assert len({planned_rows(rows) for rows in range(1, 65537)}) <= 100
