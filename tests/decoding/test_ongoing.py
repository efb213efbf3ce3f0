"""Texts that join and leave a running batch get the tokens of `generate`."""

import pytest
import torch

from modernbert.decoding.continuation import Storage
from modernbert.decoding.decoders import decoder_of
from modernbert.decoding.loops import Generation
from modernbert.decoding.ongoing import Ongoing, OngoingBatch, OngoingSearch, cache_bytes
from modernbert.decoding.options import GenerationOptions
from tests.conftest import random_decoder


def wanted(model, prompt, limit, options, seed):
    out = model.generate(torch.tensor([prompt]), max_new_tokens=limit, pad_token_id=0,
                         generator=[torch.Generator().manual_seed(seed)], **options)  # fmt: skip
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_text_is_that_of_generate_whoever_joins_and_leaves(optimized, dtype):
    """Twelve texts of various lengths and options, three joining at a time, some in the middle of others."""
    model = random_decoder(dtype=dtype, optimized=optimized)
    chosen = torch.Generator().manual_seed(5)
    kinds = [
        {"do_sample": False, "eos_token_id": []},
        {"do_sample": True, "temperature": 0.8, "top_k": 20, "eos_token_id": []},
        {"do_sample": False, "repetition_penalty": 1.3, "eos_token_id": [7, 11, 30, 41]},
        {"do_sample": True, "min_new_tokens": 3, "eos_token_id": list(range(3, 30))},
    ]
    texts = []
    for number in range(12):
        prompt = torch.randint(3, 90, (int(torch.randint(1, 40, (1,), generator=chosen)),), generator=chosen).tolist()
        limit = int(torch.randint(1, 25, (1,), generator=chosen))
        options = kinds[number % 4]
        made = GenerationOptions.make({**options, "max_new_tokens": limit}, model.generation_defaults())
        text = Ongoing(prompt, limit, made, torch.Generator().manual_seed(number))
        texts.append((text, wanted(model, prompt, limit, options, number)))
    batch, found = OngoingBatch(model), {id(text): [] for text, _ in texts}
    waiting, steps = [text for text, _ in texts], 0
    while waiting or batch.texts:
        joining, waiting = (waiting[:3], waiting[3:]) if steps % 4 == 0 else ([], waiting)
        for step in batch.step(joining):
            found[id(step.text)].append(step.token)
        steps += 1
        assert steps < 200
    for text, tokens in texts:
        assert found[id(text)] == tokens == text.history.new


def test_a_cancelled_text_frees_its_cache_and_changes_no_other():
    model = random_decoder()
    options = GenerationOptions.make({"eos_token_id": [], "max_new_tokens": 20}, model.generation_defaults())
    kept, left = (Ongoing(list(range(3, 3 + n)), 20, options) for n in (9, 30))
    batch = OngoingBatch(model)
    batch.step([kept, left])
    batch.step()
    left.cancelled = True
    assert [step.text for step in batch.step()] == [kept]
    assert batch.cache.lengths == [9 + 2]
    while batch.step():
        pass
    assert kept.history.new == wanted(model, list(range(3, 12)), 20, {"do_sample": False, "eos_token_id": []}, 0)
    assert len(batch) == 0
    assert not batch.step()


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_a_model_that_fails_at_a_text_ends_it_alone_and_changes_no_other(monkeypatch, optimized, late):
    """One of nine fails while it joins or later; texts go on past the window, whose ring a failed pass has written."""
    model = random_decoder(optimized=optimized)
    options = GenerationOptions.make({"eos_token_id": [], "max_new_tokens": 30}, model.generation_defaults())
    texts = [Ongoing(list(range(3 + i, 3 + i + 4 * i + 1)), 30, options) for i in range(9)]
    batch, score, bad = OngoingBatch(model), model.score_next, texts[4]

    def broken(inputs, cache):
        scores = score(inputs, cache)  # the cache has the tokens when it fails
        is_read = bad in batch.texts and inputs.packing.lengths[batch.texts.index(bad)]
        if is_read and (not late or bad.history.length >= 22):
            raise RuntimeError("broken")
        return scores

    monkeypatch.setattr(model, "score_next", broken)
    errors = []
    steps = batch.step(texts[:5]) + batch.step(texts[5:])
    while steps:
        errors += [(step.text, str(step.error)) for step in steps if step.error is not None]
        steps = batch.step()
    assert errors == [(bad, "broken")]
    assert bad.history.length == (22 if late else 0)
    for text in texts:
        if text is not bad:
            prompt = text.history.ids[: text.history.prompt]
            assert text.history.new == wanted(model, prompt, 30, {"do_sample": False, "eos_token_id": []}, 0)


def test_a_pass_that_fails_inside_changes_nothing(monkeypatch):
    """Some layers have written when it fails, and memory may run out while texts are moved."""
    model = random_decoder()
    options = GenerationOptions.make({"eos_token_id": [], "max_new_tokens": 20}, model.generation_defaults())
    batch, texts = OngoingBatch(model), [Ongoing(list(range(3, 3 + n)), 20, options) for n in (5, 40)]
    write, calls = Storage.write, []

    def failing(self, layer, *args):
        write(self, layer, *args)
        calls.append(layer)
        if calls in ([0, 1, 2], [0, 1, 2, 0, 1]):
            raise MemoryError("no room")

    monkeypatch.setattr(Storage, "write", failing)
    steps = batch.step(texts)
    assert [str(step.error) for step in steps] == ["no room", "None"]
    while batch.step():
        pass
    assert texts[1].history.new == wanted(model, list(range(3, 43)), 20, {"do_sample": False, "eos_token_id": []}, 0)
    monkeypatch.setattr(Storage, "make_room", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
    with pytest.raises(MemoryError, match="no room"):
        batch.step([Ongoing([3, 4], 5, options)])
    monkeypatch.undo()
    assert len(batch.step([Ongoing([3, 4], 5, options)])) == 1


@pytest.mark.parametrize("sampled", [False, True])
def test_a_beam_search_by_steps_is_that_of_generate(sampled):
    model = random_decoder()
    given = {"num_beams": 3, "num_return_sequences": 2, "do_sample": sampled, "eos_token_id": [7, 9]}
    options = GenerationOptions.make({**given, "max_new_tokens": 12}, model.generation_defaults())

    def generation():
        return Generation(decoder_of(model, [[3, 4, 5]]), [12], options, torch.Generator().manual_seed(2))

    search, steps, found = OngoingSearch([3, 4, 5], 12, options, generation), 0, None
    while found is None:
        found, steps = search.step(), steps + 1
    assert found == generation().new_ids()
    assert steps > 2
    assert (search.rows, search.history.prompt, search.history.limit) == (3, 3, 12)


def test_bytes_of_a_cache_are_an_upper_limit():
    model = random_decoder()
    options = GenerationOptions.make({"eos_token_id": [], "max_new_tokens": 9}, model.generation_defaults())
    batch = OngoingBatch(model)
    batch.step([Ongoing(list(range(3, 60)), 9, options)])
    held = sum(k.nbytes + v.nbytes for storage in batch.cache.kinds.values() for k, v in storage.layers.values())
    assert 0 < cache_bytes(model, 57) <= held  # slots are made ahead
