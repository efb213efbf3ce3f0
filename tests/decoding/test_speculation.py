"""Guessing tokens ahead: the same tokens in fewer passes, whatever is guessed."""

import copy

import pytest
import torch

from modernbert import DecoderCache
from modernbert.decoding import speculation
from modernbert.decoding.speculation import Assistant, PromptLookup, SpeculatingDecoder
from modernbert.engines.cpu.library import library
from modernbert.errors import InputError
from tests.conftest import random_decoder

pytestmark = pytest.mark.skipif(library() is None, reason="guesses are verified by the compiled kernels")
GREEDY = {"max_new_tokens": 60, "eos_token_id": -1, "do_sample": False}


def prompts(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 96, (n,), generator=generator) for n in lengths]
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, -len(row) :], mask[i, -len(row) :] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def made(monkeypatch):
    """The decoders that guess, in the order in which they were made."""
    found = []

    class Seen(SpeculatingDecoder):
        def __init__(self, *args):
            super().__init__(*args)
            found.append(self)

    monkeypatch.setattr(speculation, "SpeculatingDecoder", Seen)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("assisted", [False, True])
@pytest.mark.parametrize("options", [GREEDY, GREEDY | {"do_sample": True, "top_k": 4, "num_return_sequences": 2}])
def test_the_tokens_and_scores_are_those_that_come_without_guessing(dtype, assisted, options, made):
    """Prompts shorter and longer than the window of 8 tokens; rings go round several times."""
    model = random_decoder(dtype=dtype, optimized=True)
    how = {"prompt_lookup_num_tokens": 7}
    if assisted:
        how = {"assistant_model": random_decoder(dtype=dtype, num_hidden_layers=1), "num_assistant_tokens": 5}
    outputs = []
    for given in ({}, how):
        keep = {"return_dict_in_generate": True, "output_logits": True}
        outputs.append(model.generate(**prompts(3, 30, 11), **options, **given, **keep, generator=torch.Generator()))
    plain, guessed = outputs
    assert guessed.sequences.equal(plain.sequences)
    assert all(a.equal(b) for a, b in zip(plain.logits, guessed.logits, strict=True))
    assert len(made) == 1
    assert plain.past_key_values.lengths == guessed.past_key_values.lengths


def test_a_model_that_guesses_its_own_tokens_needs_a_pass_for_several(made):
    model = random_decoder(optimized=True)
    plain = model.generate(**prompts(9), **GREEDY)
    twin = copy.deepcopy(model)
    assert model.generate(**prompts(9), **GREEDY, assistant_model=twin, num_assistant_tokens=6).equal(plain)
    assert made[0].passes <= 13  # 2, 4, then 6 right guesses a pass, 60 tokens


def test_a_text_that_repeats_itself_needs_fewer_passes(made):
    """A small random model soon goes round in a circle."""
    model = random_decoder(optimized=True)
    plain = model.generate(**prompts(9), **GREEDY | {"max_new_tokens": 200})
    assert model.generate(**prompts(9), **GREEDY | {"max_new_tokens": 200}, prompt_lookup_num_tokens=8).equal(plain)
    assert made[0].passes < 120


def test_texts_end_and_leave_as_without_guessing():
    model = random_decoder(optimized=True)
    ids = prompts(5, 12, 20, 7)
    plain = model.generate(**ids, **GREEDY)
    ends = plain[1, -20].item()
    expected = model.generate(**ids, **GREEDY | {"eos_token_id": ends, "pad_token_id": 0})
    assert model.generate(
        **ids, **GREEDY | {"eos_token_id": ends, "pad_token_id": 0}, prompt_lookup_num_tokens=5
    ).equal(expected)


def test_the_cache_can_be_gone_on_with_afterwards():
    model = random_decoder(optimized=True)
    first = {"max_new_tokens": 25, "eos_token_id": -1, "return_dict_in_generate": True}
    whole = model.generate(**prompts(9), **GREEDY)
    for slack in (None, 0, 6):
        cache = None if slack is None else DecoderCache(model.config, slack=slack)
        out = model.generate(**prompts(9), **first, prompt_lookup_num_tokens=6, past_key_values=cache)
        assert out.past_key_values.lengths == [33]
        rest = model.generate(
            out.sequences, past_key_values=out.past_key_values, **GREEDY | {"max_new_tokens": 35},
            prompt_lookup_num_tokens=6,
        )  # fmt: skip
        assert rest.equal(whole)


def test_a_cache_made_without_a_configuration_has_no_slack(log):
    model = random_decoder(optimized=True)
    whole = model.generate(**prompts(20), **GREEDY)
    for more in ({}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}):
        cache = DecoderCache()
        given = {**GREEDY, **more, "past_key_values": cache}
        found = model.generate(**prompts(20), **given, prompt_lookup_num_tokens=7)
        assert all(row.equal(whole[0]) for row in found)
    assert "past_key_values has no slack" in log.text


class Ends(Exception):
    """What a caller's own code raises."""


def test_however_it_ends_the_cache_holds_no_guesses():
    model = random_decoder(optimized=True)
    options = {**GREEDY, "prompt_lookup_num_tokens": 7}

    def ending(ids, scores):
        if ids.shape[1] == 31:
            raise Ends
        return False

    for new in (14, 22, 30):
        cache = DecoderCache(model.config, slack=7)
        streamed = model.stream(
            prompts(20)["input_ids"], past_key_values=cache, tokenizer=Words(), **options | {"max_new_tokens": new}
        )
        for _ in streamed:
            pass
        assert cache.lengths == [19 + new]
    cache = DecoderCache(model.config, slack=7)
    with pytest.raises(Ends):
        model.generate(**prompts(20), past_key_values=cache, stopping_criteria=[ending], **options)
    assert cache.lengths == [30]


class Words:
    """As much of a tokenizer as a stream takes."""

    all_special_ids = ()

    def decode(self, ids, *args, **kwargs):
        return " ".join(map(str, ids))


def test_a_model_that_is_not_optimized_guesses_nothing(made, log):
    model = random_decoder()
    plain = model.generate(**prompts(9), **GREEDY)
    assert model.generate(**prompts(9), **GREEDY, prompt_lookup_num_tokens=6).equal(plain)
    assert not made
    assert "no tokens are guessed" in log.text


def test_what_cannot_guess_is_refused():
    model = random_decoder(optimized=True)
    other = random_decoder(vocab_size=50)
    with pytest.raises(InputError, match="vocabulary of 50 and the model one of"):
        model.generate(**prompts(4), assistant_model=other)
    with pytest.raises(InputError, match="give one of them"):
        model.generate(**prompts(4), assistant_model=random_decoder(), prompt_lookup_num_tokens=3)
    with pytest.raises(InputError, match="assistant_model is a str"):
        model.generate(**prompts(4), assistant_model="small")
    with pytest.raises(InputError, match="prompt_lookup_num_tokens"):
        model.generate(**prompts(4), prompt_lookup_num_tokens=-1)


def test_a_lookup_takes_what_followed_the_longest_match_last():
    lookup = PromptLookup(3)
    assert lookup.guess([5, 1, 2, 3, 7, 8, 9, 1, 2, 3], 2) == [7, 8]
    assert lookup.guess([5, 1, 2, 3, 7, 8, 9, 1, 2, 3, 7], 9) == [8, 9, 1, 2, 3, 7]
    assert lookup.guess([4, 4], 3) == [4]
    assert lookup.guess([4, 5, 6], 3) == []
    assert lookup.guess([6, 1, 6, 2, 6], 1) == [2]  # the later one


def test_an_assistant_reads_again_only_what_changed():
    model = random_decoder(optimized=True)
    assistant, ids = Assistant(model, 4), list(range(5, 20))
    first = assistant.guess(ids, 4)
    assert first == model.generate(torch.tensor([ids]), **GREEDY | {"max_new_tokens": 4})[0, -4:].tolist()
    wrong = [*ids, first[0], (first[1] + 1) % 90 + 3]
    assert assistant.guess(wrong, 3) == Assistant(model, 4).guess(wrong, 3)
    assert assistant.read[: len(wrong)] == wrong
    short = ids[:3]  # further back than the windows reach
    assert assistant.guess(short, 2) == Assistant(model, 4).guess(short, 2)
