"""The backends against the eager oracle, on random lengths, gaps, windows and head sizes."""

import contextlib
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modernbert.engines.gpu import flash, flex
from modernbert.engines.gpu.flash import FlashAttention
from modernbert.engines.gpu.flex import FlexAttention
from modernbert.errors import BackendError
from modernbert.nn.attention import choose_backend
from modernbert.nn.attention import contract as base
from modernbert.nn.attention.eager import EagerAttention
from modernbert.nn.attention.sdpa import SdpaAttention
from modernbert.nn.packing import Packing

LENGTHS = st.sampled_from([0, 1, 2, 15, 16, 17, 31, 63, 64, 65, 129, 255, 256, 257, 300])
REACHES = st.sampled_from(
    [(None, None), (None, 0), (64, 64), (63, 0), (0, 0), (1, 1), (3, 8), (0, 5), (40, 40), (130, 130), (1000, 1000)]
)


def qkv(tokens, heads=2, size=16, dtype=torch.float32, grad=False):
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(tokens, heads, size, generator=generator).to(dtype).requires_grad_(grad) for _ in range(3)]


def eager(q, k, v, packing, reach):
    """What every backend is compared with."""
    return EagerAttention().attend(q, k, v, EagerAttention().plan(packing, reach, q.dtype))


def with_gaps(seed, columns):
    """Three texts, of which padding hides half the tokens."""
    return Packing.from_mask(torch.rand(3, columns, generator=torch.Generator().manual_seed(seed)) < 0.5)


def both(packing, reach, heads=2, size=16, other=SdpaAttention):
    outs = []
    for backend in (EagerAttention(), other()):
        q, k, v = qkv(packing.tokens, heads, size, grad=True)
        out = backend.attend(q, k, v, backend.plan(packing, reach, q.dtype))
        weight = torch.linspace(-1, 1, out.numel()).view_as(out)
        grads = torch.autograd.grad((out * weight).sum(), (q, k, v)) if packing.tokens else ()
        outs.append((out, *grads))
    return outs


@settings(max_examples=60)
@given(st.lists(LENGTHS, max_size=6), REACHES, st.sampled_from([(1, 8), (3, 16), (2, 64), (1, 80)]))
def test_backends_agree_forward_and_backward(lengths, reach, heads):
    for a, b in zip(*both(Packing.from_lengths(lengths), reach, *heads), strict=True):
        assert a.shape == b.shape
        assert torch.isfinite(b).all()
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@settings(max_examples=30)
@given(st.integers(0, 10**6), REACHES)
def test_backends_agree_where_padding_leaves_gaps(seed, reach):
    packing = with_gaps(seed, 180)
    assert packing.gaps
    for a, b in zip(*both(packing, reach), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@settings(max_examples=30)
@given(st.lists(LENGTHS, min_size=1, max_size=6), REACHES, st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_text_alone_and_in_a_batch_are_equal_bit_for_bit(lengths, reach, dtype):
    for backend in (EagerAttention(), SdpaAttention(), FlexAttention()):
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
    assert choose_backend("flex_attention").name == "flex_attention"


@pytest.mark.skipif(torch.cuda.is_available(), reason="flash attention can run here")
def test_flash_attention_says_why_it_cannot_run():
    with pytest.raises(BackendError, match="'flash_attention_2' cannot run here: it needs a CUDA device"):
        choose_backend("flash_attention_2")
    with pytest.raises(BackendError, match="runs on CUDA devices; these numbers are on cpu"):
        flash.kernel(torch.device("cpu"))


def test_auto_logs_its_choice_and_why(log, monkeypatch):
    choose_backend("auto")
    assert "attention backend: sdpa (on a CPU)" in log.text
    card = torch.device("cuda", 0)
    monkeypatch.setattr(flash, "why_not", lambda: "")
    assert choose_backend("auto", device=card, dtype=torch.bfloat16).name == "flash_attention_2"
    assert "attention backend: flash_attention_2 (on cuda, bfloat16)" in log.text
    assert choose_backend("auto", device=card, dtype=torch.float32).name == "sdpa"
    assert "sdpa (flash attention has no float32)" in log.text
    monkeypatch.setattr(flash, "why_not", lambda: "the card is too old")
    assert choose_backend("auto", device=card, dtype=torch.float16).name == "sdpa"
    assert "sdpa (flash attention: the card is too old)" in log.text
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert choose_backend("auto", device=card, dtype=torch.float16).name == "flex_attention"
    monkeypatch.setattr(flex, "why_not", lambda: "no compiler")
    assert choose_backend("auto", device=card, dtype=torch.float16).name == "sdpa"
    assert choose_backend("auto", device=torch.device("mps"), dtype=torch.float16).name == "sdpa"


# flex_attention: on a CPU by PyTorch's own, unfused form of it


@contextlib.contextmanager
def in_pieces_of(blocks):
    """Calls as large as they are on a card."""
    before = dict(flex._PIECE)
    flex._PIECE["cpu"] = blocks
    try:
        yield
    finally:
        flex._PIECE.update(before)


@settings(max_examples=60)
@given(st.lists(LENGTHS, max_size=6), REACHES, st.sampled_from([(1, 8), (3, 16), (1, 80)]), st.booleans())
def test_flex_agrees_with_eager(lengths, reach, heads, together):
    packing = Packing.from_lengths(lengths)
    q, k, v = qkv(packing.tokens, *heads)
    wanted = eager(q, k, v, packing, reach)
    with in_pieces_of(256 if together else 0):
        backend = FlexAttention()
        got = backend.attend(q, k, v, backend.plan(packing, reach, q.dtype))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@settings(max_examples=20)
@given(st.integers(0, 10**6), REACHES)
def test_flex_agrees_where_padding_leaves_gaps(seed, reach):
    packing, backend = with_gaps(seed, 300), FlexAttention()
    q, k, v = qkv(packing.tokens)
    got = backend.attend(q, k, v, backend.plan(packing, reach, q.dtype))
    torch.testing.assert_close(got, eager(q, k, v, packing, reach), rtol=0, atol=1e-5)


@settings(max_examples=40)
@given(st.lists(LENGTHS, min_size=1, max_size=6), REACHES, st.booleans())
def test_blocks_that_are_visited_hold_all_that_is_seen_and_no_more(lengths, reach, gaps):
    """The masks of blocks against the mask of every query and key, which the unfused form reads alone."""
    packing = Packing.from_lengths(lengths)
    if gaps:
        mask = torch.rand(len(lengths), max(lengths) + 1, generator=torch.Generator().manual_seed(sum(lengths))) < 0.6
        packing = Packing.from_mask(mask)
    with in_pieces_of(3):
        plan = FlexAttention().plan(packing, reach, torch.float32)
    first = 0
    for mask, rows in zip(plan.masks, plan.rows, strict=True):
        every = torch.arange(rows)
        seen = mask.mask_mod(0, 0, every[:, None], every[None, :])
        is_token = torch.zeros(rows, dtype=torch.bool)
        is_token[_rows_of_tokens(plan, rows, first)] = True
        first += rows
        needed = (seen & is_token[:, None]).unflatten(0, (-1, flex.BLOCK)).unflatten(2, (-1, flex.BLOCK))
        all_seen = (seen | ~is_token[:, None]).unflatten(0, (-1, flex.BLOCK)).unflatten(2, (-1, flex.BLOCK))
        partly, whole = (
            _chosen(*pair)
            for pair in ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
        )
        assert not (whole & partly).any()
        assert torch.equal(needed.any(3).any(1), whole | partly)  # nothing is missed, nothing visited in vain
        assert all_seen.all(3).all(1)[whole].all()


def _rows_of_tokens(plan, rows, first):
    order = plan.order_T if plan.order_T is not None else torch.arange(plan.packing.tokens)
    return order[(order >= first) & (order < first + rows)] - first


def _chosen(count, order):
    blocks = torch.zeros(order.shape[2:], dtype=torch.bool)
    for i, number in enumerate(count[0, 0].tolist()):
        blocks[i, order[0, 0, i, :number].long()] = True
    return blocks


def test_masks_are_kept_for_batches_of_the_same_lengths():
    backend = FlexAttention()
    first = backend.plan(Packing.from_lengths([300, 40]), (64, 64), torch.float32)
    assert backend.plan(Packing.from_lengths([300, 40]), (64, 64), torch.float32) is first
    assert backend.plan(Packing.from_lengths([300, 41]), (64, 64), torch.float32) is not first
    assert backend.plan(Packing.from_lengths([300, 40]), (None, None), torch.float32) is not first
    for length in range(1, 40):
        backend.plan(Packing.from_lengths([length]), (64, 64), torch.float32)
    assert len(backend._kept) == flex._KEPT
    assert len(copy.deepcopy(backend)._kept) == 0


def test_flex_leaves_gradients_on_a_cpu_to_sdpa():
    for a, b in zip(*both(Packing.from_lengths([200, 3]), (40, 40), other=FlexAttention), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_many_texts_make_several_calls_of_limited_masks():
    with in_pieces_of(flex._PIECE_ON_CARD):
        plan = FlexAttention().plan(Packing.from_lengths([1] * 600 + [40_000]), (64, 64), torch.float32)
    assert [rows // flex.BLOCK for rows in plan.rows] == [256, 256, 88, 313]


# flash_attention_2: what it hands to the kernels, which are eager attention here


@pytest.fixture
def kernels(monkeypatch):
    """What was asked of the kernels; their place is taken by eager attention."""
    asked = []

    def attend(q, k, v, cu_seqlens, longest, window, deterministic):
        asked.append((cu_seqlens.tolist(), longest, window, deterministic))
        packing = Packing.from_lengths((cu_seqlens[1:] - cu_seqlens[:-1]).tolist())
        plan = EagerAttention().plan(packing, tuple(None if w < 0 else w for w in window), q.dtype)
        out = Attended.apply(q, k, v, plan)
        if deterministic:
            flash._make_deterministic(out.grad_fn)
        return out

    class Attended(torch.autograd.Function):
        """One node, as the kernels' own is."""

        @staticmethod
        def forward(ctx, q, k, v, plan):
            ctx.save_for_backward(q, k, v)
            ctx.plan = plan
            return EagerAttention().attend(q, k, v, plan)

        @staticmethod
        def backward(ctx, grad):
            asked.append(torch.are_deterministic_algorithms_enabled())
            with torch.enable_grad():
                given = [x.detach().requires_grad_() for x in ctx.saved_tensors]
                out = EagerAttention().attend(*given, ctx.plan)
            return (*torch.autograd.grad(out, given, grad), None)

    monkeypatch.setattr(flash, "why_not", lambda: "")
    monkeypatch.setattr(flash, "kernel", lambda device: attend)
    monkeypatch.setattr(flash, "DTYPES", (torch.float32,))
    return asked


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("reach", [(None, None), (None, 0), (8, 8), (7, 0)])
def test_flash_hands_over_texts_and_windows(kernels, deterministic, reach):
    packing, backend = Packing.from_lengths([20, 0, 33]), FlashAttention(deterministic)
    for a, b in zip(*both(packing, reach, other=lambda: backend), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    window = tuple(-1 if r is None else r for r in reach)
    assert kernels == [([0, 20, 20, 53], 33, window, deterministic), deterministic]
    assert not torch.are_deterministic_algorithms_enabled()
    q = qkv(53, grad=True)[0]
    out = backend.attend(q, q, q, backend.plan(packing, reach, q.dtype)).sum()
    first, again = (torch.autograd.grad(out, q, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    assert kernels[-2:] == [deterministic] * 2


def test_flash_leaves_to_sdpa_what_the_kernels_have_not(kernels):
    packing, backend = Packing.from_lengths([40, 9]), FlashAttention()
    q, k, v = qkv(49)
    plan = backend.plan(packing, (8, 8), q.dtype)
    backend.attend(q, k, v, plan, dropout=0.5)
    backend.attend(*(x.double() for x in (q, k, v)), backend.plan(packing, (8, 8), torch.float64))
    odd = qkv(49, size=12)
    assert backend.attend(*odd, backend.plan(packing, (8, 8), q.dtype)).shape == odd[0].shape
    assert kernels == []
    gaps = with_gaps(0, 60)
    for reach, served in (((8, 8), False), ((7, 0), False), ((None, None), True), ((None, 0), True)):
        kernels.clear()
        outs = both(gaps, reach, other=lambda: backend)
        for a, b in zip(*outs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        assert bool(kernels) == served


def test_pytorchs_kernels_are_asked_for_one_piece_where_they_may_split(monkeypatch):
    asked = []

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1), num_splits=None):
        asked.append((max_q, max_k, window_size, num_splits))
        return q

    monkeypatch.setattr(flash, "_varlen", lambda: varlen)
    x, starts = torch.zeros(3, 1, 8), torch.tensor([0, 3], dtype=torch.int32)
    for current in (None, "FA3"):
        monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda current=current: current)
        flash._may_be_asked_for_splits.cache_clear()
        flash._pytorch(x, x, x, starts, 3, (64, 64), False)
    flash._may_be_asked_for_splits.cache_clear()
    assert asked == [(3, 3, (64, 64), None), (3, 3, (64, 64), 1)]


def test_what_is_expected_of_pytorchs_kernels_is_so():
    """Names and signatures, which can be seen without a card."""
    assert flash._varlen() is not None
    assert base.IMPLEMENTATIONS.keys() == {"eager", "sdpa", "native", "flash_attention_2", "flex_attention"}
