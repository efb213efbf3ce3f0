"""Rows of packed texts that only their positions tell apart, as collators without padding hand them over."""

import pytest
import torch

from modernbert.errors import InputError
from tests.conftest import model_of

LENGTHS = (1, 7, 20, 1, 30)
ENCODER, DECODER = "ModernBertForMaskedLM", "ModernBertDecoderForCausalLM"
WIDE = {"initializer_range": 0.3}  # whose outputs differ clearly


def packed(lengths=LENGTHS, rows=1):
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(3, 96, (n,), generator=generator) for n in lengths]
    ids, positions = torch.cat(texts)[None], torch.cat([torch.arange(n) for n in lengths])[None]
    return texts, ids.expand(rows, -1), positions.expand(rows, -1)


@pytest.mark.parametrize("implementation", ["auto", "eager", "sdpa"])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("name", [ENCODER, DECODER])
def test_texts_do_not_see_each_other(name, optimized, rows, implementation):
    model = model_of(name, implementation, **WIDE)
    if optimized:
        model.optimize_for_inference()
    texts, ids, positions = packed(rows=rows)
    with torch.no_grad():
        out = model(ids, position_ids=positions).logits
        assert out.shape == (rows, sum(LENGTHS), 96)
        for row in out:
            for text, logits in zip(texts, row.split(LENGTHS), strict=True):
                assert torch.equal(model(text[None]).logits[0], logits)


def test_a_training_step_equals_one_over_the_texts_by_themselves():
    model = model_of(DECODER, **WIDE).train()
    texts, ids, positions = packed()
    loss = model(ids, position_ids=positions, labels=ids).loss
    parts = [(model(t[None], labels=t[None]).loss, len(t) - 1) for t in texts if len(t) > 1]
    expected = sum(part * n for part, n in parts) / sum(n for _, n in parts)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    ours = torch.autograd.grad(loss, model.parameters())
    theirs = torch.autograd.grad(expected, model.parameters())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_the_decoder_separates_texts_as_transformers_does(tmp_path):
    from transformers import ModernBertDecoderForCausalLM as Theirs

    ours = model_of(DECODER, **WIDE)
    ours.save_pretrained(tmp_path)
    theirs = Theirs.from_pretrained(tmp_path).eval()
    _, ids, positions = packed()
    gaps = positions.clone()
    gaps[:, 40:] += 3  # positions left out separate texts as well
    for place in (positions, gaps):
        with torch.no_grad():
            expected = theirs(ids, position_ids=place, use_cache=False).logits
            torch.testing.assert_close(
                ours(ids, position_ids=place, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5
            )


def test_a_classifier_gives_a_row_of_scores_for_each_text():
    model = model_of("ModernBertForSequenceClassification", **WIDE)
    texts, ids, positions = packed()
    with torch.no_grad():
        out = model(ids, position_ids=positions, labels=torch.zeros(len(texts)).long())
        assert torch.equal(out.logits, torch.cat([model(text[None]).logits for text in texts]))


def test_positions_that_rise_are_one_text_and_a_mask_says_more_than_positions():
    model = model_of(ENCODER, **WIDE)
    _, ids, positions = packed()
    with torch.no_grad():
        whole = model(ids).logits
        assert torch.equal(model(ids, position_ids=torch.arange(ids.shape[1])).logits, whole)
        expected = model(ids, position_ids=positions).logits
        for dtype in (torch.uint8, torch.int32, torch.int16):
            assert torch.equal(model(ids, position_ids=positions.to(dtype)).logits, expected)
        masked = model(ids, attention_mask=torch.ones_like(ids), position_ids=positions).logits
        apart = model(ids, position_ids=positions).logits
        others = ids.clone()
        others[0, -30:] = 5
        assert not torch.equal(model(others, torch.ones_like(ids), position_ids=positions).logits[0, :8], masked[0, :8])
        assert torch.equal(model(others, position_ids=positions).logits[0, :8], apart[0, :8])
    with pytest.raises(InputError, match=r"position_ids has dtype torch.float32; it must be whole numbers"):
        model(ids, position_ids=positions.float())
    with pytest.raises(InputError, match=r"position_ids has shape \(1, 4\); with this input it must be \(1, 59\)"):
        model(ids, position_ids=positions[:, :4])


def test_positions_of_new_tokens_do_not_cut_a_text_that_a_cache_holds():
    model = model_of(DECODER, **WIDE)
    ids = torch.randint(3, 96, (2, 12))
    with torch.no_grad():
        cache = model(ids[:, :8]).past_key_values
        positions = torch.arange(8, 12).expand(2, -1)
        out = model(ids[:, 8:], past_key_values=cache, position_ids=positions).logits
        torch.testing.assert_close(out, model(ids, use_cache=False).logits[:, 8:], rtol=0, atol=1e-5)


def test_a_collator_that_packs_gives_the_loss_of_its_texts():
    """Its labels begin each text with -100, which no token predicts anyway."""
    from transformers import DataCollatorWithFlattening

    model = model_of(DECODER, **WIDE)
    texts, _, _ = packed((7, 20, 5))
    batch = DataCollatorWithFlattening()([{"input_ids": text.tolist()} for text in texts])
    assert "attention_mask" not in batch
    with torch.no_grad():
        loss = model(**batch).loss
        parts = [model(t[None], labels=t[None]).loss * (len(t) - 1) for t in texts]
    torch.testing.assert_close(loss, sum(parts) / (sum(map(len, texts)) - 3), rtol=1e-6, atol=0)
