"""The encoder and the masked LM give transformers' numbers in float32: states, logits, losses, gradients, weights."""

import pytest
import torch

import modernbert
from tests.parity.configs import pair, peer, random_batch, random_config, same_loss_and_gradients


def close(ours, theirs, real, limit=1e-5):
    assert ours.shape == theirs.shape
    difference = (ours - theirs)[real].abs().max().item()
    assert difference <= limit, difference


@pytest.mark.parametrize("seed", range(36))
def test_masked_lm(seed, tmp_path):
    side, weights = ("left", "right")[seed % 2], seed // 2 % 2 == 0
    values, theirs, ours = pair("ModernBertForMaskedLM", seed, tmp_path, "eager" if weights else "sdpa")
    ids, mask, labels = random_batch(values, seed, side)
    given = {"attention_mask": mask, "labels": labels, "output_hidden_states": True, "output_attentions": weights}
    a, b = theirs(ids, **given), ours(ids, **given)
    real = mask.bool()
    # Logits of these weights are in the tens, where float32 has steps of 4e-6.
    size = max(1.0, a.logits[real].abs().max().item() / 8)
    close(b.logits, a.logits, real, 1e-5 * size)
    assert len(b.hidden_states) == len(a.hidden_states)
    for x, y in zip(b.hidden_states, a.hidden_states, strict=True):
        close(x, y, real, 1e-5 * max(1.0, y[real].abs().max().item() / 8))
    if weights:
        for x, y in zip(b.attentions, a.attentions, strict=True):
            both = (real[:, None, :, None] & real[:, None, None, :]).expand_as(y)
            close(x, y, both)
            assert not x[~both].any()
    same_loss_and_gradients(a, b, theirs, ours)


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("side", ["left", "right"])
def test_bare_model_with_embeddings_instead_of_ids(seed, side, tmp_path):
    values, theirs, ours = pair("ModernBertModel", seed, tmp_path, "sdpa")
    ids, mask, _ = random_batch(values, seed + 50, side)
    embeds = torch.randn(*ids.shape, values["hidden_size"])
    a = theirs(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    b = ours(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    close(b, a, mask.bool())


def test_position_ids(tmp_path):
    values, theirs, ours = pair("ModernBertModel", 4, tmp_path, "sdpa")
    ids, mask, _ = random_batch(values, 7)
    positions = torch.randint(0, 500, ids.shape)
    a = theirs(ids, attention_mask=mask, position_ids=positions).last_hidden_state
    close(ours(ids, attention_mask=mask, position_ids=positions).last_hidden_state, a, mask.bool())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_padding_between_real_tokens_keeps_their_distances(implementation, tmp_path):
    values, theirs, ours = pair("ModernBertModel", 8, tmp_path, implementation)
    ids = torch.randint(3, values["vocab_size"], (3, 150))
    mask = (torch.rand(ids.shape) < 0.6).long()
    mask[:, 10] = 1
    a = theirs(ids, attention_mask=mask).last_hidden_state
    close(ours(ids, attention_mask=mask).last_hidden_state, a, mask.bool())


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.4, "beta_fast": 20, "beta_slow": 2},
        {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.3, "original_max_position_embeddings": 32},
    ],
    ids=lambda r: "-".join(str(v) for v in r.values()),
)
def test_scaled_rope(rope, tmp_path):
    values = random_config(4)
    parameters = {
        "full_attention": {**rope, "rope_theta": 160_000.0},
        "sliding_attention": {**rope, "rope_theta": 10_000.0},
    }
    theirs = peer("ModernBertModel", values, 1, rope_parameters=parameters, max_position_embeddings=64)
    theirs.save_pretrained(tmp_path)
    ours = modernbert.ModernBertModel.from_pretrained(tmp_path)
    assert ours.config.rope_parameters["full_attention"]["rope_type"] == rope["rope_type"]
    for length in (40, 64, 150):
        ids = torch.randint(3, values["vocab_size"], (1, length))
        close(ours(ids).last_hidden_state, theirs(ids).last_hidden_state, torch.ones_like(ids).bool())


def test_sparse_prediction(tmp_path):
    values, theirs, ours = pair("ModernBertForMaskedLM", 0, tmp_path, sparse_prediction=True)
    assert ours.config.sparse_prediction
    ids, mask, labels = random_batch(values, 11)
    a, b = theirs(ids, attention_mask=mask, labels=labels), ours(ids, attention_mask=mask, labels=labels)
    assert b.logits.shape == a.logits.shape == (int((labels != -100).sum()), values["vocab_size"])
    torch.testing.assert_close(b.logits, a.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(b.loss, a.loss, rtol=1e-6, atol=1e-6)
    assert ours(ids, attention_mask=mask).logits.shape == (*ids.shape, values["vocab_size"])


def test_loss_over_a_given_number_of_items(tmp_path):
    values, theirs, ours = pair("ModernBertForMaskedLM", 1, tmp_path)
    ids, mask, labels = random_batch(values, 12)
    given = {"attention_mask": mask, "labels": labels, "num_items_in_batch": torch.tensor(77)}
    torch.testing.assert_close(ours(ids, **given).loss, theirs(ids, **given).loss, rtol=1e-6, atol=1e-6)
