"""The decoder's own rules: what comes in packed or padded, what is kept, what is refused, and generation's door."""

import copy
import json

import pytest
import torch

from modernbert import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerateOutput,
    ModernBertDecoderForCausalLM,
    ModernBertDecoderForSequenceClassification,
    TextStreamer,
)
from modernbert.errors import InputError
from tests.conftest import padded_batch, random_decoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimized", [False, True])
def test_padded_packed_and_alone_are_equal_bit_for_bit(dtype, optimized):
    model = random_decoder("sdpa", dtype, optimized)
    lengths = [1, 9, 40, 8, 70]
    with torch.no_grad():
        outs = {}
        for side in ("left", "right"):
            ids, mask = padded_batch(lengths, side)
            outs[side] = model(ids, attention_mask=mask).logits[mask.bool()]
        packed = ids[mask.bool()]
        starts = torch.tensor([0, *lengths]).cumsum(0).int()
        together = model(packed, cu_seqlens=starts).logits
        assert torch.equal(outs["left"], together)
        assert torch.equal(outs["right"], together)
        for text, logits in zip(packed.split(lengths), together.split(lengths), strict=True):
            assert torch.equal(model(text[None]).logits[0], logits)


def test_a_local_layer_sees_itself_and_the_window_before():
    model = random_decoder("eager", layer_types=["sliding_attention"] * 4, local_attention=16)
    ids, _ = padded_batch([20])
    weights = model(ids, output_attentions=True).attentions[0][0, 0]
    distance = torch.arange(20)[:, None] - torch.arange(20)
    assert torch.equal(weights > 0, (distance >= 0) & (distance < 8))


def test_logits_to_keep(small_decoder):
    ids, mask = padded_batch([3, 12, 7], "left")
    starts = torch.tensor([0, 3, 15, 22]).int()
    with torch.no_grad():
        whole = small_decoder(ids, attention_mask=mask).logits
        for keep in (1, 4, 30):
            assert torch.equal(small_decoder(ids, attention_mask=mask, logits_to_keep=keep).logits, whole[:, -keep:])
        chosen = torch.tensor([11, 0])
        assert torch.equal(small_decoder(ids, attention_mask=mask, logits_to_keep=chosen).logits, whole[:, chosen])
        packed = small_decoder(ids[mask.bool()], cu_seqlens=starts, logits_to_keep=2).logits
        assert torch.equal(packed, torch.cat([row[-2:] for row in whole]))
        one = small_decoder(ids[mask.bool()], cu_seqlens=starts, logits_to_keep=torch.tensor([4])).logits
        assert torch.equal(one[0], whole[mask.bool()][4])
    for wrong in (-3, 1.5, torch.tensor([12]), torch.tensor([0.5])):
        with pytest.raises(InputError, match="logits_to_keep is"):
            small_decoder(ids, logits_to_keep=wrong)
    with pytest.raises(InputError, match="leave logits_to_keep out"):
        small_decoder(ids, labels=ids, logits_to_keep=1)


def test_the_classifier_s_last_token_is_the_mask_s(small_decoder):
    torch.manual_seed(0)
    model = ModernBertDecoderForSequenceClassification(small_decoder.config.replace(num_labels=3)).eval()
    ids, mask = padded_batch([3, 12, 7])
    left, left_mask = padded_batch([3, 12, 7], "left")
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        assert torch.equal(model(left, attention_mask=left_mask).logits, logits)
        assert torch.equal(model(ids).logits, logits)  # by the padding id
        starts = torch.tensor([0, 3, 15, 22]).int()
        assert torch.equal(model(ids[mask.bool()], cu_seqlens=starts).logits, logits)
        nothing = model(ids, attention_mask=torch.zeros_like(mask)).logits
        assert nothing.isfinite().all()


def test_an_optimized_decoder_saves_copies_and_goes_back(tmp_path):
    ids, _ = padded_batch([20])
    for bias in (False, True):
        model = random_decoder("sdpa", attention_bias=bias)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            expected = model(ids).logits
            model.optimize_for_inference()
            torch.testing.assert_close(model(ids).logits, expected)
            assert torch.equal(copy.deepcopy(model)(ids).logits, expected)
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)
        model.save_pretrained(tmp_path / str(bias))
        again = ModernBertDecoderForCausalLM.from_pretrained(tmp_path / str(bias))
        with torch.no_grad():
            assert torch.equal(again(ids).logits, expected)
            model.prune_heads({1: [0]})
            again.prune_heads({1: [0]})
            assert torch.equal(model(ids).logits, again(ids).logits)


def test_a_decoder_trains_with_and_without_checkpointing():
    ids, mask = padded_batch([5, 20])
    gradients = []
    for recompute in (False, True):
        model = random_decoder().train()
        if recompute:
            model.gradient_checkpointing_enable()
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# Generation


def test_finished_texts_leave_the_batch_and_are_filled_up(small_decoder):
    ids, mask = padded_batch([3, 12, 7], "left")
    free = small_decoder.generate(ids, attention_mask=mask, max_new_tokens=15, eos_token_id=[])
    assert free.shape == (3, 27)
    end = int(free[1, 12 + 4])
    out = small_decoder.generate(ids, attention_mask=mask, max_new_tokens=15, eos_token_id=end)
    for row, before in zip(out, free, strict=True):
        new = row[12:].tolist()
        cut = new.index(end) + 1 if end in new else len(new)
        assert new[:cut] == before[12 : 12 + cut].tolist()
        assert set(new[cut:]) <= {0}
    right, right_mask = padded_batch([3, 12, 7])
    again = small_decoder.generate(right, attention_mask=right_mask, max_new_tokens=15, eos_token_id=end)
    assert torch.equal(again[:, 12:], out[:, 12:])
    assert torch.equal(again[:, :12], right)  # prompts come back as they were given
    assert torch.equal(small_decoder.generate(right, max_new_tokens=15, eos_token_id=end), again)  # mask by padding id


@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"do_sample": True}, {"repetition_penalty": 1.5}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_text_s_tokens_do_not_depend_on_its_batch(way, dtype):
    model = random_decoder("sdpa").to(dtype).optimize_for_inference()
    lengths = [3, 12, 7, 8, 1]
    ids, mask = padded_batch(lengths, "left")

    def generators(texts):
        sampled = way.get("do_sample")
        return {"generator": [torch.Generator().manual_seed(t) for t in texts]} if sampled else {}

    whole = model.generate(ids, attention_mask=mask, max_new_tokens=20, **way, **generators(range(5)))[:, 12:]
    for text, length in enumerate(lengths):
        prompt = ids[text : text + 1, 12 - length :]
        alone = model.generate(prompt, max_new_tokens=20, **way, **generators([text]))[0, length:]
        assert whole[text, : len(alone)].tolist() == alone.tolist()


def test_the_cache_comes_back_with_all_but_the_last_token(small_decoder):
    ids, mask = padded_batch([3, 12], "left")
    out = small_decoder.generate(ids, attention_mask=mask, max_new_tokens=6, return_dict_in_generate=True)
    assert isinstance(out, GenerateOutput)
    ends = [[0, *row[12:].tolist()].index(2) if 2 in row[12:].tolist() else 6 for row in out.sequences]
    assert out.past_key_values.lengths == [n + e - 1 for n, e in zip([3, 12], ends, strict=True)]
    told = small_decoder.generate(
        ids, attention_mask=mask, max_new_tokens=3, return_dict_in_generate=True, output_scores=True, eos_token_id=[]
    )
    assert len(told.scores) == 3
    assert torch.equal(torch.stack([s.argmax(-1) for s in told.scores], 1), told.sequences[:, 12:])


@pytest.mark.parametrize("way", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}])
def test_a_cache_is_gone_on_with_in_several_ways_and_left_as_it_is(way, small_decoder):
    ids, _ = padded_batch([20])
    with torch.no_grad():
        cache = small_decoder(ids[:, :15]).past_key_values
    before = cache.to_bytes()
    outs = []
    for past in (cache, None):
        generator = torch.Generator().manual_seed(0)
        outs.append(small_decoder.generate(ids, past_key_values=past, max_new_tokens=9, generator=generator, **way))
    assert torch.equal(*outs)
    assert cache.to_bytes() == before


def test_a_streamer_gets_the_prompt_and_each_token(heads):
    model = AutoModelForCausalLM.from_pretrained(heads / "CausalLM")
    tokenizer = AutoTokenizer.from_pretrained(heads / "CausalLM")
    prompt = tokenizer("The dog", return_tensors="pt").input_ids
    got = []
    streamer = TextStreamer(tokenizer, on_text=lambda piece, last: got.append(piece))
    out = model.generate(prompt, max_new_tokens=9, streamer=streamer)
    assert "".join(got) == tokenizer.decode(out[0], skip_special_tokens=True)
    pieces = list(model.stream(prompt, tokenizer=tokenizer, max_new_tokens=9))
    assert "".join(pieces) == tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
    with pytest.raises(InputError, match="max_length is 2 and the prompt has"):
        model.stream(prompt, tokenizer=tokenizer, max_length=2)  # at once, not at the first piece


def test_the_checkpoint_s_defaults(small_decoder, tmp_path):
    small_decoder.generation_config = {"max_new_tokens": 3, "eos_token_id": [5, 6], "transformers_version": "5"}
    small_decoder.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["max_new_tokens"] == 3
    model = ModernBertDecoderForCausalLM.from_pretrained(tmp_path)
    ids, _ = padded_batch([4])
    assert torch.equal(model.generate(ids), small_decoder.generate(ids, max_new_tokens=3, eos_token_id=[5, 6]))


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 0.01}, {"min_p": 1.0}, {"no_repeat_ngram_size": 1}])
def test_drawn_beams_are_never_impossible(options, small_decoder):
    ids, _ = padded_batch([6])
    given = {"do_sample": True, "num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 5, **options}
    out = small_decoder.generate(ids, return_dict_in_generate=True, **given)
    assert out.sequences_scores.isfinite().all()
    assert out.sequences.shape == (2, 11)


def test_a_text_can_begin_with_nothing(small_decoder):
    out = small_decoder.generate(max_new_tokens=4)
    assert torch.equal(out, small_decoder.generate(torch.tensor([[1]]), max_new_tokens=4))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": torch.tensor([5])}, r"input_ids has shape \(1,\)"),
        ({"input_ids": torch.tensor([[5.0]])}, "prompts are whole numbers"),
        ({"input_ids": torch.tensor([[5, 96]])}, "input_ids holds 96; the vocabulary has ids 0 to 95"),
        ({"input_ids": torch.tensor([[0, 0]])}, "a prompt has no token"),
        ({"input_ids": torch.tensor([[5]]), "attention_mask": torch.ones(1, 2)}, r"attention_mask has shape \(1, 2\)"),
        ({"input_ids": torch.tensor([[5, 6]]), "max_length": 2}, "max_length is 2 and the prompt has 2 tokens"),
        ({"input_ids": torch.tensor([[5]]), "loudness": 1}, "generate has no option loudness"),
        ({"input_ids": torch.tensor([[5]]), "stop_strings": "a"}, "stop_strings need tokenizer="),
        ({"input_ids": torch.tensor([[5], [6]]), "streamer": object()}, "streamer takes one text"),
        ({"input_ids": torch.tensor([[5]]), "generator": []}, "generator holds 0"),
        ({"input_ids": torch.tensor([[5]]), "generator": 5}, "generator is a int"),
        ({"input_ids": [[5]]}, "input_ids is a list; it must be a tensor"),
        ({"input_ids": torch.tensor([[5]]), "past_key_values": 5}, "past_key_values is a int"),
        ({"input_ids": torch.tensor([[True]])}, "prompts are whole numbers"),
    ],
)
def test_mistakes_at_the_door_of_generation(given, message, small_decoder):
    with pytest.raises(InputError, match=message):
        small_decoder.generate(**given)
    small_decoder.train()
    with pytest.raises(InputError, match="evaluation mode"):
        small_decoder.generate(torch.tensor([[5]]))
