"""Optimized models: the weights they hold, what they give back, and what still works on them."""

import copy

import pytest
import torch

from modernbert import ModernBertDecoderConfig, ModernBertDecoderForCausalLM, ModernBertDecoderModel
from modernbert.errors import FrozenError, InputError
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


def causal_lm(dtype=torch.float32):
    """A decoder with every bias there is, and two layers."""
    torch.manual_seed(0)
    biases = dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"), True)
    config = ModernBertDecoderConfig(**{**SMALL, **biases, "num_hidden_layers": 2, "initializer_range": 0.2})
    model = ModernBertDecoderForCausalLM(config).eval().to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def doubled(weight):
    weight.mul_(2)


def through_data(weight):
    weight.data.copy_(weight.data * 2)


def one_row(weight):
    weight[..., 5] = 3.0


PLACES = {
    "MLP": lambda model: model.model.layers[1].mlp.Wi,
    "projection": lambda model: model.model.layers[0].attn.v_proj,
    "attention's output": lambda model: model.model.layers[0].attn.Wo,
    "norm": lambda model: model.model.layers[1].mlp_norm,
    "last norm": lambda model: model.model.final_norm,
    "first norm": lambda model: model.model.embeddings.norm,
    "head": lambda model: model.lm_head.dense,
    "output": lambda model: model.decoder,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("edit", [doubled, through_data, one_row])
@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_an_edited_weight_acts_after_optimizing(place, part, edit, dtype):
    plain, fast = causal_lm(dtype), causal_lm(dtype).optimize_for_inference()
    x = ids(2, 9)
    before = fast(x).logits
    for model in (plain, fast):
        edit(getattr(PLACES[place](model), part))
    limit = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(fast(x).logits, plain(x).logits, rtol=limit, atol=limit)
    assert not torch.allclose(fast(x).logits, before, rtol=limit, atol=limit)


@torch.no_grad()
def test_an_edited_embedding_reaches_the_tied_output():
    plain, fast = causal_lm(), causal_lm().optimize_for_inference()
    x = ids(2, 9)
    for model in (plain, fast):
        model.get_input_embeddings().weight[7] += 3
    torch.testing.assert_close(fast(x).logits, plain(x).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_new_parameter_takes_the_old_one_s_place_after_optimizing():
    plain, fast = causal_lm(), causal_lm().optimize_for_inference()
    x = ids(2, 9)
    new = torch.nn.Parameter(torch.randn(128, 48))
    for model in (plain, fast):
        model.model.layers[0].mlp.Wi.weight = new
        model.model.layers[1].attn.q_proj.bias = torch.nn.Parameter(torch.ones(48))
    torch.testing.assert_close(fast(x).logits, plain(x).logits, rtol=1e-5, atol=1e-5)


def test_a_parameter_without_numbers_refuses_to_be_used():
    model = causal_lm().optimize_for_inference()
    frozen = [p for p in model.parameters() if p.is_meta]
    if not frozen:
        pytest.skip("nothing here lays weights out")
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in causal_lm().parameters())
    weight = frozen[0]
    for use in (
        lambda: weight.mul_(2),
        lambda: weight.data,
        lambda: weight + 1,
        lambda: weight.cpu(),
        lambda: weight[0],
    ):
        with (
            torch.no_grad(),
            pytest.raises(FrozenError, match=r"its numbers lie in the kernels' layout; call model.unpack"),
        ):
            use()
    assert repr(weight).startswith("FrozenWeight(shape=")


@pytest.mark.parametrize("begin", ["train", "requires_grad_"])
def test_training_an_optimized_model_trains_the_plain_one(begin):
    plain, fast = causal_lm(), causal_lm().optimize_for_inference()
    x = ids(2, 9)
    for model in (plain, fast):
        model.train() if begin == "train" else model.requires_grad_(True)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model(x, labels=x, use_cache=False).loss.backward()
        optimizer.step()
    for (name, a), (_, b) in zip(plain.named_parameters(), fast.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    untouched = causal_lm().state_dict()
    assert not any(torch.equal(value, untouched[name]) for name, value in fast.named_parameters())


def test_what_was_frozen_before_optimizing_is_frozen_after_it():
    model = causal_lm()
    model.model.embeddings.requires_grad_(False)
    model.optimize_for_inference().train()
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
        name for name, _ in model.named_parameters() if "embeddings" in name
    }


@pytest.mark.filterwarnings("ignore")
def test_adapters_on_an_optimized_model_train_as_on_a_plain_one():
    peft = pytest.importorskip("peft")
    x = ids(2, 9)
    losses = []
    for optimized in (False, True):
        model = causal_lm()
        if optimized:
            model.optimize_for_inference()
        torch.manual_seed(1)
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj", "Wi", "Wo"], r=2))
        adapted.train()
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 0.05)
        for _ in range(3):
            loss = adapted(x, labels=x, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        merged = adapted.merge_and_unload().eval()
        losses.append((loss.detach(), merged(x, labels=x).loss.detach()))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_on_a_tied_output_is_refused(small_model):
    peft = pytest.importorskip("peft")
    for model in (causal_lm(), small_model):
        everything = peft.LoraConfig(target_modules="all-linear", r=2)
        with pytest.raises(InputError, match=r"tie_word_embeddings.*exclude_modules=\['decoder'\]"):
            peft.get_peft_model(copy.deepcopy(model), everything)(input_ids=ids(1, 5))
        left_out = peft.LoraConfig(target_modules="all-linear", exclude_modules=["decoder"], r=2)
        adapted = peft.get_peft_model(model, left_out)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
            adapted.eval()
            x = ids(1, 5)
            before = adapted(input_ids=x).logits
            torch.testing.assert_close(adapted.merge_and_unload()(x).logits, before, rtol=1e-4, atol=1e-4)
