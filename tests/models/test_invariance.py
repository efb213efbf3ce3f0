"""Padded = packed = one text at a time, left = right padding: bit for bit, float32 and bfloat16."""

import os
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modernbert import (
    DecoderCache,
    ModernBertConfig,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
)
from tests.conftest import SMALL, padded_batch, threads

LENGTHS = st.lists(st.sampled_from([0, 1, 2, 9, 16, 17, 33, 64, 65, 129, 257, 300]), min_size=1, max_size=5)


def model_of(dtype, implementation, optimized=False, activation="gelu"):
    torch.manual_seed(1)
    changes = {"hidden_activation": activation, "intermediate_size": 97} if activation != "gelu" else {}
    config = ModernBertConfig(**{**SMALL, **changes}, initializer_range=0.2, classifier_bias=True, norm_bias=True)
    model = ModernBertForMaskedLM(config, implementation).eval().to(dtype)
    return model.optimize_for_inference() if optimized else model


@pytest.mark.parametrize("optimized", [False, True], ids=["plain", "optimized"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_one_text_has_one_result(activation, dtype, implementation, optimized):
    model = model_of(dtype, implementation, optimized, activation)

    @settings(max_examples=12)
    @given(LENGTHS)
    @torch.no_grad()
    def check(lengths):
        right, right_mask = padded_batch(lengths, more=2)
        left, left_mask = padded_batch(lengths, "left", more=2)
        ids_T = right[right_mask == 1]
        from_right = model(right, attention_mask=right_mask).logits
        from_left = model(left, attention_mask=left_mask).logits
        cumulative = torch.tensor([0, *lengths]).cumsum(0).int()
        packed = model(ids_T, cu_seqlens=cumulative).logits
        assert torch.isfinite(from_right).all()
        assert not from_right[right_mask == 0].any()
        assert torch.equal(from_right[right_mask == 1], packed)
        assert torch.equal(from_left[left_mask == 1], packed)
        for text, rows in zip(ids_T.split(lengths), packed.split(lengths), strict=True):
            if len(text):
                assert torch.equal(model(text[None]).logits[0], rows)

    check()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_optimizing_without_kernels_of_our_own_changes_no_bit(number, monkeypatch):
    monkeypatch.setattr("modernbert.engines.cpu.library.serving", lambda dtype, device: None)
    ids, mask = padded_batch([300, 1, 64, 17])
    with threads(number), torch.no_grad():
        plain = model_of(torch.float32, "sdpa")(ids, attention_mask=mask).logits
        fast = model_of(torch.float32, "sdpa", optimized=True)(ids, attention_mask=mask).logits
    assert torch.equal(plain, fast)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_row_of_padding_alone_gives_zeros_and_no_nan_in_gradients(implementation):
    model = model_of(torch.float32, implementation)
    ids, mask = torch.zeros(2, 20, dtype=torch.long), torch.zeros(2, 20, dtype=torch.long)
    ids[0], mask[0] = 5, 1
    out = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    assert not out.logits[1].any()
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    nothing = model(ids, attention_mask=mask * 0).logits
    assert nothing.shape == (2, 20, SMALL["vocab_size"])
    assert not nothing.any()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_gradients_do_not_depend_on_padding(implementation):
    model = model_of(torch.float32, implementation)
    gradients = []
    for side in ("left", "right"):
        ids, mask = padded_batch([70, 3, 150], side)
        loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_finite_weights_of_any_size_give_no_nan():
    model = model_of(torch.float32, "sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(50)
    ids, mask = padded_batch([130, 0, 5], "left")
    assert torch.isfinite(model(ids, attention_mask=mask).logits).all()


def random_model(draw, dtype, optimized):
    """A model of odd sizes, and whether it is a decoder."""
    heads = draw.choice([1, 1, 2, 3, 12])
    width = draw.choice([2, 4, 6, 10, 16, 18, 32, 64, 128, 130])
    width = width if heads * width <= 400 else 16
    sizes = {
        "hidden_size": heads * width,
        "num_attention_heads": heads,
        "intermediate_size": draw.choice([5, 16, 33, 64, 97, 130]),
        "num_hidden_layers": 2,
        "local_attention": draw.choice([4, 16, 64, 128]),
        "hidden_activation": draw.choice(["gelu", "silu", "tanh", "sigmoid", "relu"]),
        "global_attn_every_n_layers": draw.choice([1, 2, 3]),
        "initializer_range": draw.choice([0.05, 0.3]),
        "norm_bias": draw.random() < 0.5,
    }
    torch.manual_seed(draw.randrange(99))
    classes = [
        (ModernBertForMaskedLM, ModernBertConfig),
        (ModernBertForSequenceClassification, ModernBertConfig),
        (ModernBertDecoderForCausalLM, ModernBertDecoderConfig),
    ]
    cls, config = draw.choice(classes)
    model = cls(config(**{**SMALL, **sizes}), draw.choice(["sdpa", "auto"])).eval().to(dtype)
    return model.optimize_for_inference() if optimized else model


def continued(model, texts, plan):
    """Logits of texts that a cache holds in parts: `plan` has the lengths of each text's parts."""
    cache, outs, at = DecoderCache(model.config), [[] for _ in texts], [0] * len(texts)
    for part in range(len(plan[0])):
        counts = [of_text[part] for of_text in plan]
        ids = torch.cat([text[a : a + n] for text, a, n in zip(texts, at, counts, strict=True)])
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        logits = model(ids, cu_seqlens=starts, past_key_values=cache).logits
        for out, piece in zip(outs, logits.split(counts), strict=True):
            out.append(piece)
        at = [a + n for a, n in zip(at, counts, strict=True)]
    return [torch.cat(out) for out in outs]


@pytest.mark.parametrize("optimized", [False, True], ids=["plain", "optimized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_models_of_odd_sizes_give_a_text_the_same_bits_alone_and_on_any_number_of_threads(dtype, optimized):
    for seed in range(int(os.environ.get("MODERNBERT_FUZZ", "12"))):
        draw = random.Random(seed)
        model = random_model(draw, dtype, optimized)
        lengths = [draw.choice([6, 7, 16, 17, 31, 64, 65, 130, 257]) for _ in range(draw.randint(1, 4))]
        texts = [torch.randint(3, 96, (n,)) for n in lengths]
        plan = [[draw.choice([1, 2, n - 5]), 1, draw.choice([1, 2]), 1] for n in lengths]
        starts = torch.tensor([0, *lengths]).cumsum(0).int()
        seen = []
        for number in (1, 2, 3):
            with threads(number):
                out = model(torch.cat(texts), cu_seqlens=starts).logits
                rows = out.split(1 if len(out) == len(texts) else lengths)
                for text, logits in zip(texts, rows, strict=True):
                    alone = model(text[None]).logits
                    assert torch.equal(alone if alone.dim() == 2 else alone[0], logits), (seed, number, len(text))
                parts = continued(model, texts, plan) if hasattr(model, "lm_head") else []
                for text, of_text, logits in zip(texts, plan, parts, strict=False):
                    assert torch.equal(continued(model, [text], [of_text])[0], logits), (seed, number, of_text)
            seen.append([out, *parts])
        for other in seen[1:]:
            assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True)), seed
