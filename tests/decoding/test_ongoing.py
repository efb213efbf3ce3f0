"""Texts that join and leave a running batch get the tokens of `generate`."""

import pytest
import torch

from modernbert.decoding.ongoing import Ongoing, OngoingBatch, cache_bytes
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


def test_a_model_that_fails_leaves_an_empty_batch_that_serves_again():
    model = random_decoder()
    options = GenerationOptions.make({"eos_token_id": [], "max_new_tokens": 5}, model.generation_defaults())
    batch, score = OngoingBatch(model), model.score_next
    batch.step([Ongoing([3, 4], 5, options)])
    model.score_next = lambda *_: (_ for _ in ()).throw(RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        batch.step()
    model.score_next = score
    assert len(batch.step([Ongoing([3, 4], 5, options)])) == 1


def test_bytes_of_a_cache_are_an_upper_limit():
    model = random_decoder()
    options = GenerationOptions.make({"eos_token_id": [], "max_new_tokens": 9}, model.generation_defaults())
    batch = OngoingBatch(model)
    batch.step([Ongoing(list(range(3, 60)), 9, options)])
    held = sum(k.nbytes + v.nbytes for storage in batch.cache.kinds.values() for k, v in storage.layers.values())
    assert 0 < cache_bytes(model, 57) <= held  # slots are made ahead
