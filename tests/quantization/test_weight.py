"""Quantized weights: the kernels beside the definition, and rows that are their own."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from modernbert.engines.cpu import library as native
from modernbert.engines.cpu.operations import Product
from modernbert.engines.weights import Norm
from modernbert.quantization.rounding import Scheme, choose_columns, round_weight
from modernbert.quantization.weight import PackedIntegers, PlainIntegers, QuantizedWeight, pack_quantized, quantize_rows
from tests.conftest import threads

kernels = pytest.mark.skipif(native.library() is None, reason="installed without the kernels")


def quantized(outputs, inputs, scheme, columns=0):
    kept = torch.randperm(inputs)[:columns].sort().values.to(torch.int32)
    return round_weight(torch.randn(outputs, inputs), scheme, kept)


@pytest.mark.parametrize(("bits", "most"), [(8, 66_311), (4, 1_127_288)])
def test_groups_whose_sums_may_not_fit_32_bits_are_refused(bits, most):
    def made(inputs, **options):
        codes = torch.zeros(1, inputs if bits == 8 else inputs // 2, dtype=torch.int8 if bits == 8 else torch.uint8)
        none = torch.empty(0, dtype=torch.int32), torch.empty(1, 0, dtype=torch.float16)
        return QuantizedWeight(codes, torch.ones(1, 1), *none, bits, inputs, **options)

    fits, too_many = most // 4 * 4, most // 4 * 4 + 4
    assert made(fits).shape == (1, fits)
    with pytest.raises(ValueError, match=f"{too_many:,} of them in a group; sums of int{bits} products hold {most:,}"):
        made(too_many)
    assert made(too_many, float_rows=True).group == too_many


@kernels
def test_the_largest_sums_of_a_group_are_right():
    """Every code and every input at its end, in the longest group that is allowed."""
    inputs = 66_308
    none = torch.empty(0, dtype=torch.int32), torch.empty(2, 0, dtype=torch.float16)
    codes = torch.tensor([[127], [-127]], dtype=torch.int8).repeat(1, inputs)
    weight = QuantizedWeight(codes, torch.ones(2, 1), *none, 8, inputs)
    x = torch.cat((torch.ones(1, inputs), -torch.ones(1, inputs)))
    out = PackedIntegers(weight, None, False).product(x)
    expected = torch.tensor([[127.0, -127.0], [-127.0, 127.0]]) * inputs
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=0)


SHAPES = (st.integers(0, 90), st.integers(1, 60).map(lambda n: 2 * n), st.integers(1, 90))
SCHEMES = st.builds(Scheme, st.sampled_from([8, 4]), st.sampled_from([None, 8, 20, 32, 64]), st.booleans(), st.just(8))


@kernels
@settings(max_examples=60)
@given(*SHAPES, SCHEMES, st.booleans(), st.booleans())
def test_the_kernels_compute_the_definition(rows, inputs, outputs, scheme, normed, gated):
    outputs *= 2 if gated else 1
    weight, bias = quantized(outputs, inputs, scheme, inputs // 6), torch.randn(outputs)
    packed = PackedIntegers(weight, bias, gated)
    back = packed.to_quantized()
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(packed.to_dense(), weight.to_dense())
    norm = Norm(torch.randn(inputs), torch.randn(inputs), 1e-5) if normed else None
    x = torch.randn(rows, inputs)
    out = Product(packed, norm, activation="relu")(x)
    x = F.layer_norm(x, (inputs,), norm.weight, norm.bias, 1e-5) if norm else x
    expected = PlainIntegers(weight, bias).product(x)
    # A number that lies between two steps may be rounded either way: one step of its group at the most, of one input.
    step = 0.0 if scheme.float_rows else float(quantize_rows(x, weight.group).scales.amax()) if rows else 0.0
    slack = step * float(weight.to_dense().abs().amax()) + 1e-3
    if gated:
        (a, b), (size_a, size_b) = expected.chunk(2, 1), expected.abs().chunk(2, 1)
        assert ((out - a.relu() * b).abs() <= slack * (size_a + size_b + slack) + 1e-3).all()
    else:
        assert ((out - expected).abs() <= slack).all()
        assert (out - expected).abs().mean() < 0.1 * slack + 1e-4 or not rows


@pytest.mark.parametrize(
    "scheme", [Scheme(8, None), Scheme(8, 32), Scheme(4, 32), Scheme(4, 32, float_rows=True)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_is_its_own_whatever_the_rows_and_threads(scheme, dtype):
    packed = pack_quantized(quantized(70, 96, scheme, 5), torch.randn(70))
    x = torch.randn(400, 96).to(dtype)
    x[7] *= 1000  # a row with large numbers takes no digits from the others
    whole = packed.product(x)
    for number, rows, start in itertools.product((1, 2, 5), (1, 2, 3, 12, 13, 25, 64, 129), (0, 1, 99)):
        with threads(number):
            assert torch.equal(packed.product(x[start : start + rows]), whole[start : start + rows])


def test_the_definition_is_near_the_float_product():
    weight, x = torch.randn(64, 256), torch.randn(50, 256)
    right = x @ weight.mT
    for scheme, limit in ((Scheme(8, None), 0.012), (Scheme(8, 32), 0.01), (Scheme(4, 32), 0.12)):
        of = round_weight(weight, scheme, torch.empty(0, dtype=torch.int32))
        assert (of.product(x) - right).norm() / right.norm() < limit, scheme
        assert (F.linear(x, of.to_dense()) - right).norm() / right.norm() < limit, scheme


def test_columns_that_reach_far_stay_floats():
    torch.manual_seed(3)
    weight, x = torch.randn(64, 256), torch.randn(50, 256)
    x[:, 17] *= 50
    weight[:, 40] *= 50
    right, scheme = x @ weight.mT, Scheme(8, None)
    columns = choose_columns(weight, x.abs().amax(0), scheme)
    assert {17, 40} <= set(columns.tolist())
    assert len(columns) <= 256 // scheme.kept
    none = torch.empty(0, dtype=torch.int32)
    errors = [
        float((round_weight(weight, scheme, c).product(x) - right).norm() / right.norm()) for c in (columns, none)
    ]
    assert errors[0] < errors[1] / 4


def test_inputs_that_vary_together_make_up_for_rounding():
    torch.manual_seed(0)
    mix = torch.randn(24, 96)
    x = torch.randn(600, 24) @ mix + 0.1 * torch.randn(600, 96)
    weight, columns = torch.randn(40, 96), torch.tensor([3, 50], dtype=torch.int32)
    right = x @ weight.mT
    scheme = Scheme(4, 32, float_rows=True)
    plain, made_up = (round_weight(weight, scheme, columns, m).product(x) for m in (None, x.mT @ x))
    assert (made_up - right).norm() < 0.5 * (plain - right).norm()


def defined(weight, scheme, columns, moments):
    """Whole numbers, scales and kept columns, one column after the other."""
    inputs, lowest = weight.shape[1], -7 - 1 if scheme.bits == 4 else -127
    group, largest = scheme.group_of(inputs), 7 if scheme.bits == 4 else 127
    left, whole, scales = weight.clone(), torch.zeros_like(weight), []
    others = [i for i in range(inputs) if i not in columns.tolist()]
    order = [*others, *columns.tolist()]
    if moments is not None:
        dense = moments.double()[order][:, order]
        dense += 0.01 * dense.diagonal().mean() * torch.eye(inputs, dtype=torch.float64)
        spread = torch.linalg.cholesky(torch.linalg.inv(dense), upper=True).float()
    for begin in range(0, inputs, group):
        own = [i for i in others if begin <= i < begin + group]
        part = left[:, own]
        furthest = (
            part.gather(1, part.abs().argmax(1, keepdim=True))[:, 0] if own else part.new_full((len(part),), 127.0)
        )
        candidates = [furthest.abs() / largest if own else torch.ones_like(furthest)]
        if scheme.bits == 4 and own:
            both = (candidates[0], -furthest / 8)
            candidates = [base * share for base in both for share in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)]
        candidates = [(c.bfloat16().float() if group < inputs else c)[:, None] for c in candidates]
        share = part.new_ones(len(own)) if moments is None else moments.diagonal()[own]
        losses = [(((part / c).round().clamp(lowest, largest) * c - part).square() * share).sum(1) for c in candidates]
        scale = torch.stack(candidates)[torch.stack(losses).argmin(0), torch.arange(len(part)), 0]
        scales.append(scale)
        for i in own:
            whole[:, i] = (left[:, i] / scale).round().clamp(lowest, largest)
            if moments is not None:
                at = order.index(i)
                error = (left[:, i] - whole[:, i] * scale) / spread[at, at]
                left[:, order[at + 1 :]] -= torch.outer(error, spread[at, at + 1 :])
    return whole, torch.stack(scales, 1), left[:, columns.long()]


@pytest.mark.parametrize("inputs", [30, 64, 300])
@pytest.mark.parametrize(
    "scheme", [Scheme(8, None), Scheme(8, 32), Scheme(4, 32), Scheme(4, 32, float_rows=True)], ids=str
)
def test_rounding_is_that_of_the_definition(scheme, inputs):
    torch.manual_seed(inputs)
    weight, columns = torch.randn(700, inputs), torch.arange(2, min(inputs, 40), 7, dtype=torch.int32)
    if inputs == 64:  # a group that has no other columns
        columns = torch.arange(32, dtype=torch.int32)
    x = torch.randn(500, inputs) @ (torch.randn(inputs, inputs) / 8 + torch.eye(inputs))
    for moments in (None, x.mT @ x):
        found = round_weight(weight, scheme, columns, moments)
        whole, scales, kept = defined(weight, scheme, columns, moments)
        if moments is None:
            assert torch.equal(found.whole().float(), whole)
            assert torch.equal(found.scales.float(), scales)
            assert torch.equal(found.kept, kept.half())
        else:  # sums in another order may round a number to the other side, and then others of that output
            same_O = (found.whole() == whole).all(1)
            assert same_O.float().mean() > 0.95
            assert (found.scales.float() == scales)[same_O].float().mean() > 0.999
            torch.testing.assert_close(found.kept.float()[same_O], kept[same_O], rtol=1e-2, atol=1e-2)


def test_rows_of_nothing_and_numbers_that_are_none():
    packed = pack_quantized(quantized(20, 32, Scheme(8, None)))
    x = torch.zeros(3, 32)
    x[1, 5], x[2, 5] = float("nan"), float("inf")
    out = packed.product(x)
    assert not out[0].any()
    assert out[1:].isnan().all()
    assert packed.product(x[:0]).shape == (0, 20)


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_an_embedding(bits):
    weight = quantized(30, 64, Scheme(bits, 32), 3)
    ids = torch.tensor([3, 3, 29, 0])
    assert torch.equal(weight.to_dense(ids), weight.to_dense()[ids])
    assert weight.shape == (30, 64)
    part = weight.outputs(slice(10, 20))
    assert torch.equal(part.to_dense(), weight.to_dense()[10:20])
    assert dataclasses.replace(part, float_rows=True).product(torch.ones(1, 64)).shape == (1, 10)
