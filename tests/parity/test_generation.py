"""Greedy, beam and seeded sampling give the tokens of transformers' generate; and where it errs, a test says so."""

import random

import pytest
import torch
import transformers

import modernbert
from tests.conftest import SMALL
from tests.parity.configs import peer

THETAS = {"full_attention": 160_000.0, "sliding_attention": 10_000.0}
VALUES = {
    **SMALL, "vocab_size": 120, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5,
    "num_attention_heads": 4, "local_attention": 128, "initializer_range": 0.15, "pad_token_id": 3,
    "rope_parameters": {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in THETAS.items()},
}  # fmt: skip
WAYS = [
    {},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"min_new_tokens": 9},
    {"eos_token_id": [2, 50, 60]},
    {"num_beams": 3, "num_return_sequences": 2},
    {"num_beams": 4, "length_penalty": 0.5, "early_stopping": True, "eos_token_id": [2, 50]},
    {"num_beams": 2, "early_stopping": "never", "length_penalty": 1.5, "no_repeat_ngram_size": 3},
    {"do_sample": True},
    {"do_sample": True, "top_k": 0, "top_p": 0.8, "temperature": 0.7},
    {"do_sample": True, "min_p": 0.1, "top_k": 5, "num_return_sequences": 3, "repetition_penalty": 1.1},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    theirs = peer("ModernBertDecoderForCausalLM", VALUES)
    theirs.set_attn_implementation("sdpa")
    with torch.no_grad():
        theirs.decoder.bias[3] = -50.0  # padding is never generated
    theirs.save_pretrained(folder)
    transformers.logging.set_verbosity_error()
    return theirs, modernbert.ModernBertDecoderForCausalLM.from_pretrained(folder)


def prompts(seed, lengths):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), max(lengths)), 3)
    for row, length in zip(ids, lengths, strict=True):
        row[len(row) - length :] = torch.randint(4, 120, (length,), generator=generator)
    return ids, (ids != 3).long()


def both(models, seed, ids, mask, **options):
    out = []
    for model in models:
        torch.manual_seed(seed)
        out.append(model.generate(ids, attention_mask=mask, **options))
    return out


@pytest.mark.parametrize("seed", range(20))
def test_fifty_prompts(seed, models):
    """About fifty texts of mixed lengths with left padding; a window is 64 tokens."""
    rng = random.Random(seed)
    lengths = [rng.choice([1, 2, 20, 60, 63, 64, 65, 100, 130]) for _ in range(rng.randint(1, 4))]
    ids, mask = prompts(seed, lengths)
    a, b = both(models, seed, ids, mask, max_new_tokens=rng.randint(9, 40), **WAYS[seed % len(WAYS)])
    assert torch.equal(a, b), (lengths, WAYS[seed % len(WAYS)])


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "top_p": 0.9}])
def test_past_a_thousand_tokens(options, models):
    ids, mask = prompts(0, [1030, 700])
    a, b = both(models, 0, ids, mask, max_new_tokens=24, **options)
    assert torch.equal(a, b)


def test_from_a_few_tokens_past_the_window(models):
    ids, mask = prompts(1, [3, 9])
    a, b = both(models, 0, ids, mask, max_new_tokens=150, repetition_penalty=1.2)
    assert torch.equal(a, b)


def test_lengths_and_scores(models):
    ids, mask = prompts(2, [7, 4])
    a, b = both(models, 0, ids, mask, max_length=15)
    assert torch.equal(a, b)
    assert torch.equal(models[1].generate(ids, attention_mask=mask), both(models, 0, ids, mask, max_new_tokens=20)[0])
    given = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "max_new_tokens": 6}
    a, b = both(models, 0, ids, mask, repetition_penalty=1.4, eos_token_id=[], **given)
    assert len(a.scores) == len(b.scores) == 6
    for name in ("scores", "logits"):
        for x, y in zip(a[name], b[name], strict=True):
            torch.testing.assert_close(y, x, rtol=0, atol=2e-5)
    a, b = both(models, 0, ids, mask, num_beams=3, max_new_tokens=9, return_dict_in_generate=True, output_scores=False)
    assert torch.equal(a.sequences, b.sequences)
    one = models[0].generate(
        ids, attention_mask=mask, num_beams=3, max_new_tokens=9, return_dict_in_generate=True, output_scores=True
    )
    torch.testing.assert_close(b.sequences_scores, one.sequences_scores, rtol=1e-5, atol=1e-5)


def test_stop_strings(models, data):
    tokenizer = modernbert.AutoTokenizer.from_pretrained(data / "tokenizer")
    theirs = transformers.AutoTokenizer.from_pretrained(data / "tokenizer")
    ids, mask = prompts(3, [9])
    free = models[1].generate(ids, attention_mask=mask, max_new_tokens=30)
    text = tokenizer.decode(free[0, 9:])
    stop = text[len(text) // 3 : len(text) // 3 + 3]
    a = models[0].generate(ids, attention_mask=mask, max_new_tokens=30, stop_strings=[stop], tokenizer=theirs)
    b = models[1].generate(ids, attention_mask=mask, max_new_tokens=30, stop_strings=stop, tokenizer=tokenizer)
    assert torch.equal(a, b)
    assert b.shape[1] < free.shape[1]


def test_a_conversation_goes_on(models):
    ids, mask = prompts(4, [40])
    theirs, ours = models
    a, b = both(models, 0, ids, mask, max_new_tokens=30, return_dict_in_generate=True, eos_token_id=[])
    longer = torch.cat([b.sequences, prompts(5, [11])[0]], 1)
    given = {"max_new_tokens": 12, "attention_mask": torch.ones_like(longer)}
    x = theirs.generate(longer, past_key_values=a.past_key_values, **given)
    y = ours.generate(longer, past_key_values=b.past_key_values, **given)
    assert torch.equal(x, y)
    assert torch.equal(y, ours.generate(longer, **given))


def test_padding_is_no_part_of_a_text_s_ngrams(tmp_path):
    """transformers takes left padding for text: where the padding's id is generated, what followed it is forbidden."""
    theirs = peer("ModernBertDecoderForCausalLM", VALUES)
    theirs.save_pretrained(tmp_path)
    ours = modernbert.ModernBertDecoderForCausalLM.from_pretrained(tmp_path)
    ids, mask = prompts(36, [1, 1, 63])
    options = {"num_beams": 2, "no_repeat_ngram_size": 3, "max_new_tokens": 14, "length_penalty": 1.5}
    a, b = (model.generate(ids, attention_mask=mask, **options)[1, 63:] for model in (theirs, ours))
    alone = [model.generate(ids[1:2, 62:], **options)[0, 1:] for model in (theirs, ours)]
    assert torch.equal(*alone)
    assert torch.equal(b, alone[1])
    assert not torch.equal(a, alone[0])


def test_padding_with_the_id_zero(tmp_path):
    """After beam search transformers fills up with the end's id where the padding's is 0; ours keeps to padding."""
    theirs = peer("ModernBertDecoderForCausalLM", {**VALUES, "pad_token_id": 0, "eos_token_id": 2})
    theirs.save_pretrained(tmp_path)
    ours = modernbert.ModernBertDecoderForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(4, 120, (3, 8))
    options = {"num_beams": 3, "max_new_tokens": 40, "eos_token_id": [2, *range(90, 120)], "num_return_sequences": 3}
    a = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
    b = ours.generate(ids, attention_mask=torch.ones_like(ids), **options)
    differ = a != b
    assert differ.any()
    assert set(a[differ].tolist()) == {2}
    assert set(b[differ].tolist()) == {0}
