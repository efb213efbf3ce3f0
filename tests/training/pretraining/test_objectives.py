"""Masks, next tokens, evaluations, and the tokenizer that models are trained with."""

import dataclasses

import numpy as np
import pytest
import torch

from modernbert import ModernBertConfig, ModernBertDecoderConfig, ModernBertDecoderForCausalLM, ModernBertForMaskedLM
from modernbert.errors import InputError
from modernbert.training.pretraining.objectives import CausalLM, MaskedLM, Score
from modernbert.training.pretraining.texts import Cutter
from modernbert.training.pretraining.train_tokenizer import SPECIALS, train_tokenizer
from tests.conftest import SMALL


def small(kind=ModernBertForMaskedLM):
    config = ModernBertDecoderConfig if kind is ModernBertDecoderForCausalLM else ModernBertConfig
    return kind(config(**{**SMALL, "vocab_size": 320, "initializer_range": 0.1}))


def test_the_tokenizer_has_modernberts_tokens_and_template(tokenizer):
    assert tokenizer.get_vocab_size() == 320
    assert [tokenizer.id_to_token(320 - 16 + i) for i in range(5)] == list(SPECIALS)
    assert tokenizer.encode("the cat", "a dog").tokens[0] == "[CLS]"
    assert tokenizer.encode("the cat", "a dog").tokens.count("[SEP]") == 2
    assert tokenizer.decode(tokenizer.encode("naïve 👍 the cat").ids) == "naïve 👍 the cat"
    masked = tokenizer.encode("the [MASK]").ids
    mask = tokenizer.token_to_id("[MASK]")
    assert masked == [*tokenizer.encode("the").ids[:-1], mask, masked[-1]]  # it takes the space
    with pytest.raises(ValueError, match="vocab_size is 100"):
        train_tokenizer(["x"], 100)


def test_masks_hide_the_rate_of_the_tokens_and_nothing_special(tokenizer):
    masking = MaskedLM(tokenizer, 0.3)
    special = torch.tensor(list(masking.special_ids.values()))
    ids = torch.randint(0, 320, (20_000,))
    masked, labels = masking.label(ids, 7)
    hidden = labels != -100
    assert abs(hidden.float().mean() - 0.3 * (320 - len(special)) / 320) < 0.01
    assert (masked[hidden] == tokenizer.token_to_id("[MASK]")).all()
    assert torch.equal(labels[hidden], ids[hidden])
    assert torch.equal(masked[~hidden], ids[~hidden])
    assert not torch.isin(ids[hidden], special).any()
    assert torch.equal(masking.label(ids, 7)[0], masked)
    assert not torch.equal(masking.label(ids, 8)[0], masked)


def test_a_texts_mask_is_its_own_whatever_it_is_packed_with(tokenizer):
    masking = MaskedLM(tokenizer, 0.4)
    texts = [np.random.default_rng(i).integers(0, 300, 5 + 7 * i) for i in range(4)]
    whole = masking.batch(texts, [11, 12, 13, 14])
    parts = [masking.batch(texts[i : i + 2], [11 + i, 12 + i]) for i in (0, 2)]
    for name in ("input_ids", "labels"):
        assert torch.equal(whole[name], torch.cat([part[name] for part in parts]))
    assert whole["cu_seqlens"].tolist() == [0, 5, 17, 36, 62]


def test_a_decoder_says_all_tokens_of_a_text_but_the_first(tokenizer):
    objective = CausalLM(tokenizer)
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    batch = objective.batch([np.array([cls, 5, 6, sep]), np.array([cls, 7, sep])], [0, 0])
    assert batch["input_ids"].tolist() == [cls, 5, 6, sep, cls, 7, sep]
    assert batch["labels"].tolist() == [-100, 5, 6, sep, -100, 7, sep]
    assert objective.targets(batch["labels"]).tolist() == [5, 6, sep, -100, 7, sep, -100]
    assert objective.finish_tokenizer(tokenizer).encode("a").ids == [cls, *tokenizer.encode("a").ids[1:-1]]
    assert tokenizer.encode("a").ids[-1] == sep


def test_evaluation_counts_what_is_right(documents, tokenizer):
    """A model that always gives one token is right as often as that token is hidden."""
    corpus = Cutter(tokenizer, 32).corpus(documents)
    texts = [corpus[i] for i in range(len(corpus))]
    model = small()
    token = int(np.bincount(corpus.tokens).argsort()[-3])
    with torch.no_grad():
        model.decoder.weight.zero_()
        model.decoder.bias.zero_()
        model.decoder.bias[token] = 50.0
    model.train()
    objective = MaskedLM(tokenizer, 0.15)
    score = objective.evaluate(model, texts, seed=1)
    words = corpus.tokens[~np.isin(corpus.tokens, list(objective.special_ids.values()))]
    assert abs(score.top1 - (words == token).mean()) < 0.03
    assert score.top5 >= score.top1
    assert abs(score.tokens / len(words) - 0.15) < 0.02
    assert model.training
    assert not model.config.sparse_prediction
    assert dataclasses.astuple(objective.evaluate(model, texts, seed=1, budget=99)) == pytest.approx(
        dataclasses.astuple(score), rel=1e-5
    )
    part = objective.evaluate(model, texts, max_tokens=200, budget=100)
    assert part.tokens < 80
    with pytest.raises(InputError, match="too short"):
        MaskedLM(tokenizer, 0.001).evaluate(model, texts[:1])
    # A decoder is right whenever the token comes next, and its loss is the forward pass's own.
    decoder = small(ModernBertDecoderForCausalLM).eval()
    score = CausalLM(tokenizer).evaluate(decoder, texts, budget=500)
    starts = torch.from_numpy(corpus.starts).int()
    ids = torch.from_numpy(corpus.tokens).long()
    out = decoder(ids, cu_seqlens=starts, labels=ids)
    assert score.tokens == len(ids) - len(corpus)
    assert abs(score.loss - out.loss.item()) < 1e-4
    ends = torch.isin(torch.arange(len(ids)) + 1, starts)
    right = (out.logits.argmax(-1)[:-1] == ids[1:])[~ends[:-1]]
    assert score.top1 == pytest.approx(right.float().mean().item(), abs=2 / len(ids))


def test_scores_of_several_sources_weigh_every_token_alike():
    mean = Score.mean([Score(1.0, 0.5, 0.6, 30), Score(4.0, 0.2, 0.3, 10)])
    assert mean == Score(1.75, pytest.approx(0.425), pytest.approx(0.525), 40)
