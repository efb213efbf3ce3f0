"""Optimized models: the weights they hold, what they give back, and what still works on them."""

import copy

import torch

from modernbert import ModernBertDecoderConfig, ModernBertDecoderModel
from tests.conftest import SMALL


def ids(*shape):
    return torch.randint(3, SMALL["vocab_size"], shape)


def test_resizing_after_optimizing(small_model):
    x = ids(1, 7)
    before = small_model.optimize_for_inference()(x).logits
    small_model.resize_token_embeddings(104)
    torch.testing.assert_close(small_model(x).logits[..., :96], before)


def test_optimizing_ends_training_and_survives_a_cast(small_model):
    x = ids(1, 9)
    before = small_model(x).logits
    assert small_model.train().optimize_for_inference() is small_model
    assert not small_model.training
    assert small_model.num_parameters(only_trainable=True) == 0
    torch.testing.assert_close(small_model(x).logits, before)
    assert small_model.bfloat16()(x).logits.dtype == torch.bfloat16
    assert torch.equal(small_model.optimize_for_inference()(x).logits, small_model(x).logits)


def test_an_optimized_model_holds_its_weights_once_and_gives_them_back(small_model, tmp_path):
    x = ids(1, 9)
    small_model.save_pretrained(tmp_path / "plain")
    before = small_model(x).logits
    state = {name: value.clone() for name, value in small_model.state_dict().items()}
    size = small_model.num_parameters()
    small_model.optimize_for_inference().optimize_for_inference()
    if small_model.head.dense.packed is not None:
        weights = dict(small_model.named_parameters(remove_duplicate=False))
        assert weights["head.dense.weight"].is_meta
        assert not weights["decoder.weight"].is_meta  # shared with the embedding
    assert small_model.num_parameters() == size
    small_model.save_pretrained(tmp_path / "optimized")
    assert (tmp_path / "optimized" / "model.safetensors").read_bytes() == (
        tmp_path / "plain" / "model.safetensors"
    ).read_bytes()
    copied = copy.deepcopy(small_model)
    assert torch.equal(copied(x).logits, before)
    torch.testing.assert_close(small_model(x).logits, before)
    for other in (copied, small_model):
        assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    small_model.load_state_dict({name: value * 2 for name, value in state.items()})
    assert torch.equal(small_model.head.dense.weight, state["head.dense.weight"] * 2)
    copied.optimize_for_inference().prune_heads({0: [1]})
    assert copied(x).logits.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert copied.optimize_for_inference()(x).logits.dtype == torch.bfloat16


def test_an_optimized_model_still_differentiates_by_its_input(small_model):
    embeds = torch.randn(1, 7, 48, requires_grad=True)
    plain = small_model(inputs_embeds=embeds).logits
    (expected,) = torch.autograd.grad(plain.square().sum(), embeds)
    fast = small_model.optimize_for_inference()(inputs_embeds=embeds).logits
    torch.testing.assert_close(fast, plain)
    torch.testing.assert_close(torch.autograd.grad(fast.square().sum(), embeds)[0], expected)


def test_new_embeddings_reach_the_output_of_an_optimized_model(small_model):
    new = torch.nn.Embedding(96, 48)
    small_model.optimize_for_inference().set_input_embeddings(new)
    x = ids(1, 5)
    hidden = small_model.head(small_model.model(x).last_hidden_state)
    expected = hidden @ new.weight.T + small_model.decoder.bias
    torch.testing.assert_close(small_model(x).logits, expected, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_a_written_bias_of_one_decoder_projection_counts():
    config = ModernBertDecoderConfig(**{**SMALL, "attention_bias": True})
    model = ModernBertDecoderModel(config, "sdpa").eval()
    plain = copy.deepcopy(model)
    model.optimize_for_inference()
    x = ids(1, 9)
    before = model(x)[0]
    for each in (model, plain):
        each.layers[1].attn.v_proj.bias.add_(1)
    torch.testing.assert_close(model(x)[0], plain(x)[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(x)[0], before)
