"""The cache: with it equals without it, whatever the lengths, the order and the cuts; and what it weighs."""

import itertools
import random

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modernbert import DecoderCache, ModernBertDecoderConfig
from modernbert.errors import InputError
from modernbert.nn.attention import choose_backend
from modernbert.nn.packing import Packing
from tests.conftest import SMALL, random_decoder
from tests.models.test_invariance import continued

IMPLEMENTATIONS = ("eager", "sdpa")
close = {"rtol": 0, "atol": 1e-5}


def random_ids(texts, columns, seed=0):
    return torch.randint(3, 96, (texts, columns), generator=torch.Generator().manual_seed(seed))


def in_parts(model, ids, sizes, mask=None):
    """Logits of a text read in parts, and the cache."""
    cache, parts, start = None, [], 0
    for size in sizes:
        given = {} if mask is None else {"attention_mask": mask[:, start : start + size]}
        out = model(ids[:, start : start + size], past_key_values=cache, **given)
        cache = out.past_key_values
        parts.append(out.logits)
        start += size
    return torch.cat(parts, 1), cache


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_prompt_cut_at_every_offset_goes_on_token_by_token(implementation):
    """Windows are 8 tokens wide: cuts fall before, at and after every edge."""
    model = random_decoder(implementation)
    ids = random_ids(2, 30)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        for cut in range(1, 30):
            parts, _ = in_parts(model, ids, [cut, *[1] * (30 - cut)])
            torch.testing.assert_close(parts, whole, **close)
            parts, _ = in_parts(model, ids, [cut, 30 - cut])
            torch.testing.assert_close(parts, whole, **close)


@settings(max_examples=25)
@given(
    st.lists(st.integers(1, 13), min_size=1, max_size=7),
    st.integers(1, 4),
    st.integers(0, 999),
    st.sampled_from([2, 5, 16, 40]),
    st.sampled_from(IMPLEMENTATIONS),
)
def test_any_parts_with_any_padding_equal_the_whole(sizes, texts, seed, window, implementation):
    """Padding anywhere, gaps and parts of nothing but padding included."""
    model = random_decoder(implementation, local_attention=window)
    ids = random_ids(texts, sum(sizes), seed)
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.8
    with torch.no_grad():
        parts, cache = in_parts(model, ids, sizes, mask)
        for row in range(texts):
            real = ids[row][mask[row]]
            assert cache.lengths[row] == len(real)
            if not mask[row].any():
                continue
            # Positions count padding inside a part's text, and none at its ends.
            starts = [0, *torch.tensor(sizes).cumsum(0).tolist()]
            positions, end = [], 0
            for a, b in itertools.pairwise(starts):
                inside = mask[row, a:b].nonzero()[:, 0]
                positions += (inside - inside[:1] + end).tolist()
                end = positions[-1] + 1 if len(inside) else end
            gapped = torch.zeros(1, end, dtype=torch.long)
            gapped[0, positions] = real
            seen = torch.zeros(1, end, dtype=torch.bool)
            seen[0, positions] = True
            alone = model(gapped, attention_mask=seen, use_cache=False).logits[0, positions]
            torch.testing.assert_close(parts[row][mask[row]], alone, **close)
            assert not parts[row][~mask[row]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimized", [False, True])
def test_a_text_s_scores_do_not_depend_on_its_batch_bit_for_bit(dtype, optimized):
    model = random_decoder("sdpa", dtype, optimized)
    plan = [
        [1, 1, 1, 5, 1], [2, 1, 2, 1, 1], [7, 3, 1, 1, 9], [8, 1, 1, 1, 1], [9, 1, 9, 1, 2], [30, 1, 1, 2, 1],
        [30, 1, 1, 2, 1], [3, 2, 2, 1, 1],
    ]  # fmt: skip
    texts = [row[: sum(parts)] for row, parts in zip(random_ids(len(plan), 40, 1), plan, strict=True)]
    with torch.no_grad():
        together = continued(model, texts, plan)
        for text, parts, logits in zip(texts, plan, together, strict=True):
            assert torch.equal(continued(model, [text], [parts])[0], logits), parts
        reversed_order = continued(model, texts[::-1], plan[::-1])
        assert all(torch.equal(a, b) for a, b in zip(reversed_order[::-1], together, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=20)
@given(data=st.data())
def test_texts_can_be_chosen_repeated_and_reordered(implementation, data):
    model = random_decoder(implementation)
    lengths = data.draw(st.lists(st.integers(1, 25), min_size=1, max_size=4))
    ids = [random_ids(1, n, i)[0] for i, n in enumerate(lengths)]
    with torch.no_grad():
        starts = torch.tensor([0, *lengths]).cumsum(0).int()
        cache = model(torch.cat(ids), cu_seqlens=starts, use_cache=True).past_key_values
        for step in range(4):
            chosen = data.draw(st.lists(st.integers(0, len(ids) - 1), min_size=1, max_size=5))
            assert cache.select(chosen) is cache
            new = random_ids(1, len(chosen), 100 + step)[0]
            ids = [torch.cat([ids[t], new[i : i + 1]]) for i, t in enumerate(chosen)]
            starts = torch.arange(len(chosen) + 1, dtype=torch.int32)
            scores = model(new, cu_seqlens=starts, past_key_values=cache).logits
            assert cache.lengths == [len(text) for text in ids]
            for text, row in zip(ids, scores, strict=True):
                torch.testing.assert_close(row, model(text[None], use_cache=False).logits[0, -1], **close)


def test_growing_past_its_room_keeps_everything():
    model = random_decoder()
    ids = random_ids(2, 420)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        parts, cache = in_parts(model, ids, [100, *[1] * 320])
    torch.testing.assert_close(parts, whole, rtol=0, atol=2e-5)
    assert cache.lengths == [420, 420]


def test_crop_and_go_on():
    model = random_decoder()  # windows of 8
    ids, other = random_ids(2, 40), random_ids(2, 40, 9)
    with torch.no_grad():
        for slack, cut in ((0, 1), (5, 6), (30, 31)):
            cache = DecoderCache(model.config, slack=slack)
            model(ids, past_key_values=cache)
            cache.crop(40 - cut)
            assert cache.lengths == [40 - cut] * 2
            assert cache.get_seq_length() == 40 - cut
            out = model(other[:, :4], past_key_values=cache).logits
            whole = torch.cat([ids[:, : 40 - cut], other[:, :4]], 1)
            torch.testing.assert_close(out, model(whole, use_cache=False).logits[:, -4:], **close)
            if slack < 30:
                with pytest.raises(InputError, match="can be cropped to"):
                    cache.crop(-(slack + 8))
        twice = in_parts(model, ids, [40])[1].crop(39)
        with pytest.raises(InputError, match="can be cropped to"):  # what the window needs was overwritten
            twice.crop(38)
        short = in_parts(model, ids[:, :6], [6])[1].crop(-4)  # all of it still lies in the window
        out = model(other[:, :2], past_key_values=short).logits
        whole = torch.cat([ids[:, :2], other[:, :2]], 1)
        torch.testing.assert_close(out, model(whole, use_cache=False).logits[:, -2:], **close)
        nothing = in_parts(model, ids[:, :6], [6])[1].crop(0)
        torch.testing.assert_close(
            model(other, past_key_values=nothing).logits, model(other, use_cache=False).logits, **close
        )


def test_a_copy_goes_its_own_way_and_bytes_bring_it_back():
    model = random_decoder()
    ids, other = random_ids(3, 20), random_ids(3, 5, 4)
    with torch.no_grad():
        cache = in_parts(model, ids, [12, 8])[1]
        saved = cache.to_bytes()
        copy = cache.copy()
        first = model(other, past_key_values=cache).logits
        assert torch.equal(model(other, past_key_values=copy).logits, first)
        again = DecoderCache.from_bytes(saved, model.config)
        assert again.lengths == [20, 20, 20]
        assert torch.equal(model(other, past_key_values=again.to("cpu")).logits, first)
        whole = model(torch.cat([ids, other], 1), use_cache=False).logits[:, -5:]
    torch.testing.assert_close(first, whole, **close)
    local = ModernBertDecoderConfig(**{**SMALL, "layer_types": ["sliding_attention"] * 4})
    with pytest.raises(InputError, match="the saved cache is of another model"):
        DecoderCache.from_bytes(DecoderCache(local).to_bytes(), model.config)


def test_a_text_of_8192_tokens_at_base_size_takes_a_third_of_a_full_cache():
    config = ModernBertDecoderConfig()
    cache = DecoderCache(config)
    packing = Packing.from_lengths([8192])
    attends = cache.begin(packing, choose_backend("sdpa"), torch.float32)
    heads, size = config.num_attention_heads, config.head_dim
    rows = torch.zeros(8192, heads, size)
    for number, kind in enumerate(config.layer_types):
        attend = attends[kind]
        attend.storage.write(number, rows, rows, attend.slots, attend.of_T)
    cache.finish()
    full = 2 * config.num_hidden_layers * 8192 * config.hidden_size * 4
    counted = sum(
        tensor.nbytes
        for storage in cache.kinds.values()
        for tensor in (storage.positions_R, *(t for pair in storage.layers.values() for t in pair))
    )
    assert cache.nbytes == counted
    assert 8 / 22 < cache.nbytes / full <= 0.38
    assert "1 texts of [8192] tokens" in repr(cache)


def test_a_pass_that_fails_leaves_no_cache_that_lies(monkeypatch):
    model = random_decoder()
    ids = random_ids(1, 12)
    with torch.no_grad():
        cache = in_parts(model, ids, [10])[1]

        def fail(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(model.model.layers[2], "forward", fail)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, 10:], past_key_values=cache)
        monkeypatch.undo()
        for use in (
            lambda: model(ids[:, 10:], past_key_values=cache),
            cache.copy,
            cache.to_bytes,
            lambda: cache.crop(1),
        ):
            with pytest.raises(InputError, match="left half-written"):
                use()


def test_mistakes():
    model = random_decoder()
    ids = random_ids(2, 6)
    cache = in_parts(model, ids, [6])[1]
    with pytest.raises(InputError, match="the input has 3 texts; past_key_values holds 2"):
        model(random_ids(3, 1), past_key_values=cache)
    with torch.no_grad():
        with pytest.raises(InputError, match=r"cache_position is \[5\]; with 6 columns .* it must be 6 to 6"):
            model(ids[:, :1], past_key_values=cache, cache_position=torch.tensor([5]))
        with pytest.raises(InputError, match="past_key_values is a str; it must be a DecoderCache"):
            model(ids, past_key_values="x")
        with pytest.raises(InputError, match=r"past_key_values holds torch.float32 and the model computes in"):
            random_decoder().double()(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)  # and none of that has harmed it
        with pytest.raises(InputError, match=r"texts are \[2\]; the cache holds texts 0 to 1"):
            cache.select([2])
    with pytest.raises(InputError, match="use_cache is False and past_key_values is given"):
        model(ids, past_key_values=cache, use_cache=False)
    for other in ({"local_attention": 32}, {"num_attention_heads": 6}, {"num_hidden_layers": 3}):
        with pytest.raises(InputError, match="past_key_values is of another model"):
            random_decoder(**other)(ids, past_key_values=cache)
    with pytest.raises(InputError, match="are no saved cache"):
        DecoderCache.from_bytes(b"garbage", model.config)
    for slack in (-1, 1.5, "x", True):
        with pytest.raises(InputError, match="slack is"):
            DecoderCache(model.config, slack=slack)
    model.train()
    with pytest.raises(InputError, match="are for evaluation mode"):
        model(ids, use_cache=True)
    assert model(ids).past_key_values is None


def test_a_copy_made_for_inference_serves_outside_of_it(small_decoder):
    ids = random_ids(1, 12)
    with torch.inference_mode():
        copy = small_decoder(ids[:, :10]).past_key_values.copy()
    with torch.no_grad():
        expected = small_decoder(ids, use_cache=False).logits[:, 10:]
    torch.testing.assert_close(small_decoder(ids[:, 10:], past_key_values=copy).logits, expected, **close)


def test_rows_of_dropped_texts_are_freed(small_decoder):
    with torch.no_grad():
        cache = small_decoder(random_ids(20, 30)).past_key_values
        before = cache.nbytes
        cache.select([3])
        assert cache.nbytes < before / 8


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_reach_new_tokens_through_a_cache_that_has_none(implementation):
    """The past is a constant: what new tokens' inputs get is what they get where the past is detached."""
    model = random_decoder(implementation)
    ids = random_ids(2, 15)
    embeds = torch.randn(2, 4, 48, requires_grad=True)
    cache = model(ids).past_key_values
    assert all(not k.requires_grad for storage in cache.kinds.values() for k, _ in storage.layers.values())
    model(inputs_embeds=embeds, past_key_values=cache).logits.square().sum().backward()
    through, embeds.grad = embeds.grad.clone(), None
    past = model.get_input_embeddings()(ids).detach()
    whole = model(inputs_embeds=torch.cat([past, embeds], 1), use_cache=False).logits[:, -4:]
    whole.square().sum().backward()
    torch.testing.assert_close(through, embeds.grad, rtol=1e-4, atol=1e-4)


def test_attention_weights_with_a_cache(small_decoder):
    ids = random_ids(1, 20)
    with torch.no_grad():
        whole = small_decoder(ids, output_attentions=True, use_cache=False).attentions
        cache = small_decoder(ids[:, :17]).past_key_values
        new = small_decoder(ids[:, 17:], past_key_values=cache, output_attentions=True).attentions
    for a, b in zip(whole, new, strict=True):
        assert b.shape == (1, 3, 3, 20)
        torch.testing.assert_close(b, a[:, :, 17:], **close)


def test_a_damaged_saved_cache_is_one_line():
    model = random_decoder()
    with torch.no_grad():
        cache = model(random_ids(2, 12)).past_key_values
    whole = safetensors.torch.load(cache.to_bytes())
    draw = random.Random(0)
    refused = []
    for _ in range(200):
        tensors = {name: tensor.clone() for name, tensor in whole.items()}
        name = draw.choice(sorted(tensors))
        change = draw.randrange(4)
        if change == 0:
            del tensors[name]
        elif change == 1:
            tensors[name] = tensors[name][:-1].contiguous()
        elif change == 2:
            tensors[name] = tensors[name].float() if not tensors[name].is_floating_point() else tensors[name].long()
        else:
            values = [-7, 100, 2**40] if tensors[name].dtype == torch.int64 else [3]
            tensors[name].flatten()[draw.randrange(tensors[name].numel())] = draw.choice(values)
        try:
            again = DecoderCache.from_bytes(safetensors.torch.save(tensors), model.config)
            with torch.no_grad():
                model(random_ids(2, 1), past_key_values=again)
        except InputError as error:
            refused.append(str(error))
    assert len(refused) > 80
    for name in (name for name in whole if name.endswith(("/k", "/v"))):  # a layer's keys and values are both there
        some = {n: tensor for n, tensor in whole.items() if n != name}
        with pytest.raises(InputError, match="are no whole saved cache"):
            DecoderCache.from_bytes(safetensors.torch.save(some), model.config)
    assert all("\n" not in message and len(message) < 500 for message in refused)
    again = DecoderCache.from_bytes(cache.to_bytes(), model.config)
    with torch.no_grad():
        assert torch.equal(
            model(random_ids(2, 1), past_key_values=again).logits, model(random_ids(2, 1), past_key_values=cache).logits
        )
