"""The sdpa backend against the eager oracle, on random lengths, gaps, windows and head sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modernbert.errors import BackendError
from modernbert.ops.attention import IMPLEMENTATIONS, choose_backend
from modernbert.ops.attention.eager import EagerAttention
from modernbert.ops.attention.sdpa import SdpaAttention
from modernbert.ops.packing import Packing

LENGTHS = st.sampled_from([0, 1, 2, 15, 16, 17, 31, 63, 64, 65, 129, 255, 256, 257, 300])
REACHES = st.sampled_from(
    [(None, None), (None, 0), (64, 64), (63, 0), (0, 0), (1, 1), (3, 8), (0, 5), (40, 40), (130, 130), (1000, 1000)]
)


def qkv(tokens, heads=2, size=16, dtype=torch.float32, grad=False):
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(tokens, heads, size, generator=generator).to(dtype).requires_grad_(grad) for _ in range(3)]


def both(packing, reach, heads=2, size=16):
    outs = []
    for backend in (EagerAttention(), SdpaAttention()):
        q, k, v = qkv(packing.tokens, heads, size, grad=True)
        out = backend.attend(q, k, v, backend.plan(packing, reach, q.dtype))
        weight = torch.linspace(-1, 1, out.numel()).view_as(out)
        grads = torch.autograd.grad((out * weight).sum(), (q, k, v)) if packing.tokens else ()
        outs.append((out, *grads))
    return outs


@settings(max_examples=60)
@given(st.lists(LENGTHS, max_size=6), REACHES, st.sampled_from([(1, 8), (3, 16), (2, 64), (1, 80)]))
def test_backends_agree_forward_and_backward(lengths, reach, heads):
    eager, sdpa = both(Packing.from_lengths(lengths), reach, *heads)
    for a, b in zip(eager, sdpa, strict=True):
        assert a.shape == b.shape
        assert torch.isfinite(b).all()
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@settings(max_examples=30)
@given(st.integers(0, 10**6), REACHES)
def test_backends_agree_where_padding_leaves_gaps(seed, reach):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(3, 180, generator=generator) < 0.5
    packing = Packing.from_mask(mask)
    assert packing.gaps
    for a, b in zip(*both(packing, reach), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@settings(max_examples=30)
@given(st.lists(LENGTHS, min_size=1, max_size=6), REACHES, st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_text_alone_and_in_a_batch_are_equal_bit_for_bit(lengths, reach, dtype):
    for backend in (EagerAttention(), SdpaAttention()):
        packing = Packing.from_lengths(lengths)
        q, k, v = qkv(packing.tokens, dtype=dtype)
        whole = backend.attend(q, k, v, backend.plan(packing, reach, dtype))
        for start, length in zip(packing.starts, lengths, strict=False):
            rows = slice(start, start + length)
            alone = backend.plan(Packing.from_lengths([length]), reach, dtype)
            assert torch.equal(backend.attend(q[rows], k[rows], v[rows], alone), whole[rows])


def test_the_window_is_inclusive():
    packing = Packing.from_lengths([10])
    _, weights = EagerAttention().attend_with_weights(*qkv(10), EagerAttention().plan(packing, (2, 1), torch.float32))
    seen = weights[0][0] > 0
    assert [row.nonzero().flatten().tolist() for row in seen][5] == [3, 4, 5, 6]


def test_long_local_texts_need_no_square_matrix():
    """The largest tensor of a plan for 8,192 tokens is linear in them."""
    plan = SdpaAttention().plan(Packing.from_lengths([8192]), (64, 64), torch.float32)
    assert plan.pieces[0].bias_N1QK.numel() == 8192 * 192


def test_dropout_keeps_the_mean():
    packing = Packing.from_lengths([300, 20])
    q, k, v = qkv(320)
    v = torch.ones_like(v)
    for backend in (EagerAttention(), SdpaAttention()):
        for reach in ((None, None), (None, 0), (16, 16)):
            out = backend.attend(q, k, v, backend.plan(packing, reach, q.dtype), dropout=0.2)
            assert abs(out.mean().item() - 1) < 0.05
            assert out.std() > 0.01


def test_choosing():
    assert choose_backend("eager").name == "eager"
    assert choose_backend("sdpa", deterministic=True).deterministic
    assert choose_backend(None).name == choose_backend("auto").name == "sdpa"
    with pytest.raises(ValueError, match=r"'fast'; choose one of auto, eager, sdpa"):
        choose_backend("fast")
    for name, entry in IMPLEMENTATIONS.items():
        if isinstance(entry, str):
            with pytest.raises(BackendError, match=name):
                choose_backend(name)


def test_auto_logs_its_choice(log):
    choose_backend("auto")
    assert "attention backend: sdpa" in log.text
