"""The decoder gives transformers' numbers in float32: states, logits, losses, gradients; and where we differ, why."""

import pytest
import torch
import transformers

import modernbert
from tests.parity.configs import pair, random_batch, random_config, same_loss_and_gradients
from tests.parity.test_heads import text_labels


def positions(mask):
    """What a caller of transformers must say under left padding; ours count real tokens by themselves."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def close(a, b, mask=None):
    if mask is not None:
        a, b = a[mask.bool()], b[mask.bool()]
    assert (a - b).abs().max().item() <= 1e-5 * max(1.0, b.abs().max().item() / 8)


@pytest.mark.parametrize("seed", range(16))
def test_states_logits_loss_and_gradients(seed, tmp_path):
    side, implementation = ("left", "right")[seed % 2], ("eager", "sdpa")[seed // 2 % 2]
    values, theirs, ours = pair("ModernBertDecoderForCausalLM", seed, tmp_path, implementation)
    ids, mask, labels = random_batch(values, seed, side)
    # transformers scores a text's first real token too where padding stands before it, from the padding's state.
    first = mask.argmax(1)
    labels[torch.arange(len(ids)), first] = -100
    labels[torch.arange(len(ids)), first.where(mask.sum(1) < 2, first + 1)] = ids[:, -1] if side == "left" else -100
    labels = labels.where(mask.bool(), -100)
    labels[mask.sum(1) < 2] = -100
    labels[0, :] = ids[0].where((mask[0].cumsum(0) > 1) & mask[0].bool(), -100)
    given = {"attention_mask": mask, "labels": labels, "output_hidden_states": True}
    a = theirs(ids, position_ids=positions(mask), use_cache=False, **given)
    b = ours(ids, use_cache=False, **given)
    close(b.logits, a.logits, mask)
    for x, y in zip(b.hidden_states, a.hidden_states, strict=True):
        close(x, y, mask)
    if (labels != -100).any():
        same_loss_and_gradients(a, b, theirs, ours)


def test_a_text_of_one_token_and_labels_that_count_nothing(tmp_path):
    _, theirs, ours = pair("ModernBertDecoderForCausalLM", 1, tmp_path)
    ids = torch.tensor([[5]])
    close(ours(ids).logits, theirs(ids).logits)
    assert ours(ids, labels=ids).loss.isnan()
    assert theirs(ids, labels=ids).loss.isnan()


def test_the_first_real_token_after_padding_is_not_scored(tmp_path):
    """transformers predicts it from padding where a caller's labels have it; no token stands before it."""
    values, theirs, ours = pair("ModernBertDecoderForCausalLM", 2, tmp_path)
    ids = torch.randint(3, values["vocab_size"], (1, 9))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]])
    labels = ids.masked_fill(mask == 0, -100)
    alone = ours(ids[:, 2:], labels=ids[:, 2:]).loss
    assert torch.equal(ours(ids, attention_mask=mask, labels=labels).loss, alone)
    given = {"attention_mask": mask, "position_ids": positions(mask), "labels": labels}
    assert (theirs(ids, **given).loss - alone).abs() > 1e-3
    labels[0, 2] = -100
    torch.testing.assert_close(theirs(ids, **given).loss, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_the_bare_model(seed, tmp_path):
    values, theirs, ours = pair("ModernBertDecoderModel", seed, tmp_path)
    ids, mask, _ = random_batch(values, seed)
    close(ours(ids, mask).last_hidden_state, theirs(ids, mask).last_hidden_state, mask)


@pytest.mark.parametrize("sizes", [(1,) * 12, (40, 1, 1, 30, 1), (70, 70, 1, 1), (3, 64, 1, 65)])
def test_with_a_cache(sizes, tmp_path):
    values, theirs, ours = pair("ModernBertDecoderForCausalLM", 4, tmp_path)
    ids = torch.randint(3, values["vocab_size"], (2, sum(sizes)))
    a, b, start = None, None, 0
    with torch.no_grad():
        for size in sizes:
            given = {"input_ids": ids[:, start : start + size], "use_cache": True}
            given["cache_position"] = torch.arange(start, start + size)
            x, y = theirs(**given, past_key_values=a), ours(**given, past_key_values=b)
            close(y.logits, x.logits)
            a, b, start = x.past_key_values, y.past_key_values, start + size
            assert b.get_seq_length() == a.get_seq_length() == start


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("seed", range(8))
def test_sequence_classification(seed, side, implementation, tmp_path):
    problem = (None, "single_label_classification", "multi_label_classification", "regression")[seed % 4]
    labels = 1 if seed == 3 else 2 + seed % 3
    cls = "ModernBertDecoderForSequenceClassification"
    values, theirs, ours = pair(cls, seed, tmp_path, implementation, num_labels=labels, problem_type=problem)
    ids, mask, _ = random_batch(values, seed, side)
    given = {"attention_mask": mask, "labels": text_labels(problem, len(ids), labels, seed)}
    a = theirs(ids, position_ids=positions(mask), use_cache=False, **given)
    b = ours(ids, **given)
    close(b.logits, a.logits)
    assert (ours.classifier.bias is None) == (not values["classifier_bias"])
    same_loss_and_gradients(a, b, theirs, ours)
    assert ours.config.problem_type == problem


def test_the_last_token_without_a_mask(tmp_path):
    cls = "ModernBertDecoderForSequenceClassification"
    values, theirs, ours = pair(cls, 6, tmp_path)
    ids = torch.randint(3, values["vocab_size"], (3, 20))
    ids[1, 12:] = 0  # padding by its id, which no mask says
    ids[2, :5] = 0
    close(ours(ids).logits, theirs(ids).logits)
    embeds = torch.randn(3, 9, values["hidden_size"])  # the last column
    close(ours(inputs_embeds=embeds).logits, theirs(inputs_embeds=embeds).logits)
    nothing = torch.zeros_like(ids)
    close(ours(nothing).logits, theirs(nothing).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_where_one_id_pads_and_ends_texts_the_token_before_counts(side, tmp_path):
    """With a mask, without one, packed and alone."""
    cls = "ModernBertDecoderForSequenceClassification"
    _, theirs, ours = pair(cls, 6, tmp_path, pad_token_id=2, eos_token_id=2)
    texts = [torch.tensor([5, 6, 7, 2]), torch.tensor([8, 2]), torch.tensor([9, 2, 10, 11, 12])]
    ids, mask = torch.full((3, 6), 2), torch.zeros(3, 6).long()
    for row, text in enumerate(texts):
        where = slice(0, len(text)) if side == "right" else slice(6 - len(text), 6)
        ids[row, where], mask[row, where] = text, 1
    expected = theirs(ids, attention_mask=mask, position_ids=positions(mask)).logits
    close(ours(ids, attention_mask=mask).logits, expected)
    starts = torch.tensor([0, *map(len, texts)]).cumsum(0)
    close(ours(torch.cat(texts), cu_seqlens=starts).logits, expected)
    for text, logits in zip(texts, expected, strict=True):
        close(ours(text[None]).logits, logits[None])


def test_without_a_padding_id_the_last_column_counts(tmp_path):
    """As the reference says; transformers itself refuses more than one text then."""
    cls = "ModernBertDecoderForSequenceClassification"
    values, theirs, ours = pair(cls, 6, tmp_path)
    vars(theirs.config)["pad_token_id"] = None  # which its own check no longer lets through
    ours.config = ours.config.replace(pad_token_id=None)
    ids = torch.randint(3, values["vocab_size"], (3, 20))
    with pytest.raises(ValueError, match="batch sizes > 1"):
        theirs(ids)
    for row, logits in zip(ids, ours(ids).logits, strict=True):
        close(logits[None], theirs(row[None]).logits)


def test_thetas_where_a_file_is_silent(tmp_path):
    """160,000 for both kinds of layers by the reference; transformers 5 takes 10,000 for the local ones."""
    assert transformers.ModernBertDecoderConfig().rope_parameters["sliding_attention"]["rope_theta"] == 10_000
    thetas = {k: v["rope_theta"] for k, v in modernbert.ModernBertDecoderConfig().rope_parameters.items()}
    assert thetas == {"full_attention": 160_000, "sliding_attention": 160_000}


def test_what_we_save_loads_there(tmp_path):
    values = random_config(7)
    model = modernbert.ModernBertDecoderForCausalLM(modernbert.ModernBertDecoderConfig(**values)).eval()
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(3, values["vocab_size"], (2, 90))
    close(model(ids).logits, theirs(ids).logits)
    assert isinstance(
        modernbert.AutoModelForCausalLM.from_pretrained(tmp_path), modernbert.ModernBertDecoderForCausalLM
    )
