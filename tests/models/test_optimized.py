"""Optimized models: the weights they hold, what they give back, and what still works on them."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from modernbert import (
    ModernBertConfig,
    ModernBertDecoderConfig,
    ModernBertDecoderModel,
    ModernBertForSequenceClassification,
    ModernBertModel,
    QuantizationConfig,
    SentenceEncoder,
    Tokenizer,
    pipeline,
    quantize,
)
from modernbert.engines.guard import FrozenWeight
from modernbert.errors import FrozenError, InputError
from modernbert.models.loading import mapped_weights
from modernbert.models.sentence_encoder import Dense
from modernbert.nn.layers import Linear
from modernbert.pipelines import small_model as small_model_folder
from tests.conftest import SMALL, model_of, with_biases


def ids(*shape):
    return torch.randint(3, SMALL["vocab_size"], shape)


def test_resizing_after_optimizing(small_model):
    x = ids(1, 7)
    before = small_model.optimize_for_inference()(x).logits
    small_model.resize_token_embeddings(104)
    torch.testing.assert_close(small_model(x).logits[..., :96], before)


@pytest.mark.parametrize("ready", [True, False])
def test_what_a_pipeline_loaded_no_longer_lies_in_its_file(ready, tmp_path, monkeypatch):
    """Weights are laid out from where the file is mapped to; a file that changes later changes nothing."""
    model, tokenizer = model_of("ModernBertModel", vocab_size=2048), Tokenizer.from_pretrained(small_model_folder())
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    if not ready:  # as where there are no kernels
        monkeypatch.setattr("modernbert.models.base.freeze", lambda *parts: None)
    embed = pipeline("sentence-embedding", tmp_path)
    assert bool(embed.model.model._frozen) == ready
    before = embed("A text.")
    with (tmp_path / "model.safetensors").open("r+b") as file:  # the same file, unlike one that is renamed to its name
        size = file.seek(0, 2)
        file.seek(size // 2)
        file.write(b"\x3f" * (size - size // 2))
    assert np.array_equal(embed("A text."), before)
    embed.model.thaw()
    state = embed.model.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_weights_are_not_copied_before_they_are_laid_out(tmp_path):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("the system does not show what is mapped")
    model_of("ModernBertModel").save_pretrained(tmp_path)
    name = str(tmp_path / "model.safetensors")
    with mapped_weights():
        loaded = ModernBertModel.from_pretrained(tmp_path)
        lines = [line.split() for line in maps.read_text().splitlines() if line.endswith(name)]
        parts = [[int(end, 16) for end in line[0].split("-")] for line in lines]
        where = {n: any(a <= p.data_ptr() < b for a, b in parts) for n, p in loaded.named_parameters()}
    matrices = {name for name, p in loaded.named_parameters() if p.dim() == 2 and "layers" in name}
    assert {name for name, is_mapped in where.items() if is_mapped} == matrices != set()
    assert name not in maps.read_text()


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
    weights = dict(small_model.named_parameters(remove_duplicate=False))
    if small_model.model.runner is not None:
        assert type(weights["head.dense.weight"]) is FrozenWeight
        assert weights["decoder.weight"] is weights["model.embeddings.tok_embeddings.weight"]
        assert {type(weights[name]) for name in weights if name.startswith("model.")} == {FrozenWeight}
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


def causal_lm(dtype=torch.float32):
    """A decoder with every bias there is, and two layers."""
    biases = dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"), True)
    name = "ModernBertDecoderForCausalLM"
    return with_biases(model_of(name, num_hidden_layers=2, initializer_range=0.2, **biases).to(dtype))


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


@pytest.mark.parametrize(
    ("edit", "dtype"), [(doubled, torch.float32), (through_data, torch.bfloat16), (one_row, torch.float32)]
)
@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_an_edited_weight_acts_after_optimizing(place, part, edit, dtype):
    plain, fast = causal_lm(dtype), causal_lm(dtype).optimize_for_inference()
    x = ids(2, 9)
    before = fast(x).logits
    for model in (plain, fast):
        edit(getattr(PLACES[place](model), part))
    limit = 3e-4 if dtype == torch.float32 else 0.1  # columns of threes make large numbers
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
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in causal_lm().parameters())
    weight = FrozenWeight.freeze(torch.nn.Parameter(torch.randn(4, 5)), torch.Tensor, lambda: None)
    for use in (
        lambda: weight.mul_(2),
        lambda: weight.data,
        lambda: weight + 1,
        lambda: weight.cpu(),
        lambda: weight[0],
    ):
        with (
            torch.no_grad(),
            pytest.raises(FrozenError, match=r"its numbers lie in the kernels' layout; call model.thaw"),
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
            peft.get_peft_model(copy.deepcopy(model), everything)
        of_embedding = peft.LoraConfig(target_modules=["tok_embeddings"], r=2)
        with pytest.raises(InputError, match=r"on 'tok_embeddings', whose weight is the output's too"):
            peft.get_peft_model(copy.deepcopy(model), of_embedding)
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


def test_a_run_that_optimizes_for_each_evaluation_trains_as_one_that_does_not():
    """The optimizer was made before, and keeps its parameters."""
    runs = []
    for optimized in (False, True):
        model, x = causal_lm(), torch.arange(3, 21).view(2, 9)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for _ in range(3):
            model.train()
            model(x, labels=x, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
            if optimized:
                model.optimize_for_inference()
                assert torch.isfinite(model(x).logits).all()
        runs.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(run.values() for run in runs), strict=True))


@pytest.mark.parametrize("way", ["model", "each", "parent"])
def test_an_encoder_that_was_frozen_for_probing_stays_so(way):
    model = causal_lm().model.optimize_for_inference()
    probe = torch.nn.ModuleList([model, torch.nn.Linear(48, 2)])
    if way == "model":
        model.requires_grad_(False)
    elif way == "parent":
        probe.requires_grad_(False)
    else:
        for parameter in model.parameters():
            parameter.requires_grad = False
    probe.train()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(type(parameter) is FrozenWeight for parameter in model.parameters())


@pytest.mark.parametrize("before", [True, False])
def test_one_weight_that_is_to_be_trained_changes_nothing_about_the_others(before):
    model = causal_lm().model.requires_grad_(before).optimize_for_inference()
    model.layers[0].mlp.Wi.weight.requires_grad_(True)
    model(ids(1, 5))
    model.train()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ([name for name, _ in model.named_parameters()] if before else ["layers.0.mlp.Wi.weight"])


NEW_HEADS = {
    "classifier": lambda model: setattr(model, "classifier", torch.nn.Linear(48, 5)),
    "part of the head": lambda model: setattr(model.head, "dense", torch.nn.Linear(48, 48)),
    "read weight": lambda model: model.model.layers[0].mlp.Wi.weight,
    "new weight": lambda model: setattr(model.head.dense, "weight", torch.nn.Parameter(torch.randn(48, 48))),
    "mode of each module": lambda model: [setattr(module, "training", True) for module in list(model.modules())],
    "gradients of a wrapper": lambda model: torch.nn.ModuleList([model]).requires_grad_(True),
}


@pytest.mark.parametrize("change", NEW_HEADS)
def test_a_model_that_served_trains_as_one_that_did_not(change):
    torch.manual_seed(0)
    model = ModernBertForSequenceClassification(ModernBertConfig(**SMALL, num_labels=5)).eval()
    NEW_HEADS[change](model.optimize_for_inference())
    model.train()
    model(ids(2, 9)).logits.sum().backward()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.model.layers[2].mlp.Wo.weight.grad is not None


def test_a_part_that_was_switched_off_while_the_model_served_stays_off():
    model = ModernBertForSequenceClassification(ModernBertConfig(**SMALL)).optimize_for_inference()
    model.model.embeddings.requires_grad_(False)
    model.train()
    off = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert off == {"model.embeddings.tok_embeddings.weight", "model.embeddings.norm.weight"}


def swap_norm(model):
    model.model.final_norm = torch.nn.Identity()


def fewer_layers(model):
    model.model.layers = model.model.layers[:2]


def turned(model):
    model.model.layers = torch.nn.ModuleList(list(model.model.layers)[::-1])


def other_window(model):
    model.model.config = model.config.replace(local_attention=4)


def added_module(model):
    model.model.add_module("final_norm", torch.nn.Identity())


def by_the_dict(model):
    model.model._modules.update(final_norm=torch.nn.Identity())


def through_the_set(model):
    model.set_submodule("model.final_norm", torch.nn.Identity())


def own_method(model):
    model.model.run_layers = lambda x_TM, shared, show=None: x_TM


def own_forward(model):
    model.model.layers[1].mlp.forward = lambda x: x * 0


def wrapped_output(model):
    model.model.layers[0].attn.Wo = torch.nn.Sequential(model.model.layers[0].attn.Wo, torch.nn.Tanh())


def added_bias(model):
    model.model.final_norm.bias = torch.nn.Parameter(torch.ones(48), requires_grad=False)


@pytest.mark.parametrize(
    "change",
    [swap_norm, fewer_layers, turned, other_window, added_module, by_the_dict, through_the_set, own_method, own_forward,
     wrapped_output, added_bias],
    ids=lambda change: change.__name__,
)  # fmt: skip
@torch.no_grad()
def test_a_change_of_the_backbone_itself_counts(small_model, change):
    x = ids(2, 40)
    plain, fast = copy.deepcopy(small_model), small_model.optimize_for_inference()
    before = fast(x).logits
    for model in (plain, fast):
        change(model)
    torch.testing.assert_close(fast(x).logits, plain(x).logits)
    assert not torch.allclose(fast(x).logits, before)
    assert fast.model.runner is None


def wider(model):
    model.layers[1].mlp.Wi, model.layers[1].mlp.Wo = Linear(48, 200), Linear(100, 48)


def other_parts(model):
    model.layers[1].mlp.drop, model.layers[0].attn.out_drop = torch.nn.LayerNorm(64), torch.nn.Linear(48, 48)


def other_activation(model):
    model.layers[1].mlp.act = torch.relu


def own_projection(model):
    project = model.layers[1].attn.project
    model.layers[1].attn.project = lambda x_TM: 2 * project(x_TM)


def one_layer_twice(model):
    model.layers[3] = model.layers[1]


def no_norm(model):
    model.final_norm = torch.nn.Identity()


def bare_norm(model):
    model.final_norm = torch.nn.LayerNorm(48, elementwise_affine=False)


def one_bias_missing(model):
    for layer in model.layers:
        layer.attn.k_proj.bias = None


def clipped_embedding(model):
    clipped = torch.nn.Embedding(96, 48, max_norm=0.1)
    clipped.weight.data.copy_(model.embeddings.tok_embeddings.weight)
    model.embeddings.tok_embeddings = clipped


@pytest.mark.parametrize(
    "change",
    [wider, other_parts, other_activation, own_projection, one_layer_twice, no_norm, bare_norm, one_bias_missing,
     clipped_embedding],
    ids=lambda change: change.__name__,
)  # fmt: skip
@torch.no_grad()
def test_a_model_that_somebody_changed_is_served_as_it_is(change):
    torch.manual_seed(0)
    model = ModernBertDecoderModel(ModernBertDecoderConfig(**SMALL, attention_bias=True, initializer_range=0.2)).eval()
    change(model)
    x = ids(2, 40)
    expected = model(x, use_cache=False)[0]
    torch.testing.assert_close(model.optimize_for_inference()(x, use_cache=False)[0], expected, rtol=1e-4, atol=1e-4)
    model.thaw()
    torch.testing.assert_close(model(x, use_cache=False)[0], expected)


@pytest.mark.parametrize("scheme", [None, "int8"])
def test_a_freeze_that_is_interrupted_leaves_the_model_as_it_was(small_model, scheme, monkeypatch):
    model = small_model if scheme is None else quantize(small_model, QuantizationConfig(scheme=scheme, min_cosine=0.5))
    x = ids(1, 9)
    expected = model(x).logits
    monkeypatch.setattr("modernbert.engines.guard.Frozen.switch_off", lambda self, parameters: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.optimize_for_inference()
    assert torch.equal(model(x).logits, expected)
    assert not any(type(parameter) is FrozenWeight for parameter in model.parameters())


def test_a_graph_from_before_freezing_ends_in_an_error_not_in_wrong_gradients():
    model = ModernBertModel(ModernBertConfig(**SMALL)).eval().requires_grad_(False)
    vectors = torch.randn(7, 48, requires_grad=True)
    loss = model.final_norm(vectors).pow(3).mean()
    model.optimize_for_inference()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_reads_the_memory_of_a_frozen_weight_finds_no_numbers():
    weight = torch.nn.Parameter(torch.randn(3, 4))
    frozen = FrozenWeight.freeze(weight, lambda: torch.ones(3, 4), lambda: None)
    with pytest.warns(UserWarning, match="copy construct"):
        assert torch.tensor(frozen).isnan().all()
    frozen.thaw()
    assert weight is frozen
    assert torch.equal(weight, torch.ones(3, 4))


@pytest.mark.parametrize("part", ["model", "model.layers", "model.layers.1", "model.layers.1.mlp.Wi", "decoder"])
def test_a_part_of_a_frozen_model_is_pickled_plain(small_model, part):
    plain = copy.deepcopy(small_model)
    small_model.optimize_for_inference()
    taken = pickle.loads(pickle.dumps(small_model.get_submodule(part)))
    assert type(taken) is type(plain.get_submodule(part))
    state = plain.get_submodule(part).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in taken.state_dict().items())
    assert small_model._frozen is not None


def test_a_frozen_encoder_in_a_model_whose_output_shares_its_embedding(small_model):
    x = ids(1, 9)
    expected = small_model(x).logits
    small_model.model.optimize_for_inference()
    torch.testing.assert_close(small_model(x).logits, expected)
    small_model.optimize_for_inference()
    torch.testing.assert_close(small_model(x).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(small_model))(x).logits, expected)


@torch.no_grad()
def test_an_output_of_another_class_may_share_the_embedding(small_model):
    x, output = ids(1, 9), torch.nn.Linear(48, 96)
    output.weight = small_model.get_input_embeddings().weight
    small_model.decoder = output
    expected = small_model(x).logits
    logits = small_model.optimize_for_inference()(x).logits  # of about 10
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=5e-5)


@torch.no_grad()
def test_calls_by_keyword_and_inputs_that_do_not_fit_are_as_of_plain_layers(small_model):
    x, vectors = ids(1, 5), torch.randn(2, 48)
    plain = copy.deepcopy(small_model)
    for call in (
        lambda model: model.model.embeddings.tok_embeddings(input=x),
        lambda model: model.model.final_norm(input=vectors),
        lambda model: model.head.dense(x=vectors),
    ):
        torch.testing.assert_close(call(small_model.optimize_for_inference()), call(plain))
    for wrong in (vectors[:, :40], vectors.double(), vectors.half()):
        for model in (plain, small_model.optimize_for_inference()):
            with pytest.raises(RuntimeError):
                model.head.dense(wrong)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_forward_derivatives_and_tracers_take_the_modules(small_model):
    vectors, tangent = torch.randn(1, 7, 48), torch.randn(1, 7, 48)
    model = ModernBertModel(small_model.config, "eager").eval().requires_grad_(False)
    expected = torch.func.jvp(lambda v: model(inputs_embeds=v)[0], (vectors,), (tangent,))[1]
    model.optimize_for_inference()
    got = torch.func.jvp(lambda v: model(inputs_embeds=v)[0], (vectors,), (tangent,))[1]
    torch.testing.assert_close(got, expected)
    small_model.optimize_for_inference()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert small_model.head(torch.ones(2, 48)).shape == (2, 48)


def test_a_tied_embedding_that_is_trained_gets_the_output_s_gradient_too():
    x = ids(2, 9)
    gradients = []
    for optimized in (False, True):
        model = causal_lm()
        model = model.optimize_for_inference() if optimized else model.requires_grad_(False)
        model.get_input_embeddings().requires_grad_(True)
        model(x, labels=x).loss.backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["lm_head.dense.weight", "model.layers.0.mlp.Wo.weight", "model.layers.1.mlp.Wi.weight"]
)
def test_a_functional_call_uses_its_own_weights_and_leaves_the_model_as_it_was(name):
    plain, fast = causal_lm(), causal_lm().optimize_for_inference()
    x = ids(2, 9)
    new = {name: torch.randn_like(plain.get_parameter(name))}
    wanted = torch.func.functional_call(plain, new, (x,)).logits
    torch.testing.assert_close(torch.func.functional_call(fast, new, (x,)).logits, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast(x).logits, plain(x).logits, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), fast.thaw() or fast.parameters(), strict=True))


@torch.no_grad()
def test_weights_that_were_tied_by_hand_stay_tied():
    model = causal_lm()
    model.model.layers[1].mlp.Wi.weight = model.model.layers[0].mlp.Wi.weight
    plain, x = copy.deepcopy(model), ids(2, 9)
    model.optimize_for_inference()
    torch.testing.assert_close(model(x).logits, plain(x).logits, rtol=1e-5, atol=1e-5)
    for each in (model, plain):
        each.model.layers[0].mlp.Wi.weight.mul_(2)
    torch.testing.assert_close(model(x).logits, plain(x).logits, rtol=1e-5, atol=1e-5)
    model.train()
    assert model.model.layers[1].mlp.Wi.weight is model.model.layers[0].mlp.Wi.weight


@torch.no_grad()
def test_what_is_written_into_a_state_acts():
    plain, fast = causal_lm(), causal_lm().optimize_for_inference()
    x = ids(2, 9)
    for model in (plain, fast):
        state = model.state_dict()
        state["model.layers.0.attn.Wo.weight"].mul_(2)
        state["lm_head.dense.weight"].add_(1)
    torch.testing.assert_close(fast(x).logits, plain(x).logits, rtol=1e-4, atol=1e-4)


def test_loading_and_thawing_in_inference_mode_leave_a_model_that_trains():
    model, x = causal_lm(), ids(2, 9)
    state = copy.deepcopy(model.state_dict())
    model.optimize_for_inference().load_state_dict(state)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.optimize_for_inference()
    with torch.inference_mode():
        model(x)
        assert model.lm_head.dense.weight.shape == (48, 48)
        model.model.layers[0].mlp.Wo.bias.add_(1)
        model(x)
    model.train()
    model(x, labels=x, use_cache=False).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("wrap", [weight_norm, lambda module: prune.identity(module, "weight")])
def test_layers_whose_weight_is_computed_serve_plain_and_optimized(wrap):
    model, x = causal_lm(), ids(2, 9)
    expected = model(x).logits
    wrap(model.lm_head.dense)
    torch.testing.assert_close(model(x).logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.optimize_for_inference()(x).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_sentence_encoder_trains_again():
    model = ModernBertModel(ModernBertConfig(**{**SMALL, "num_hidden_layers": 2}))
    encoder = SentenceEncoder(model, after_pooling=[Dense(48, 8)])
    x, before = ids(2, 9), encoder(ids(1, 5)).requires_grad
    encoder.optimize_for_inference().train()
    encoder(x).sum().backward()
    assert before
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    encoder.optimize_for_inference().requires_grad_(True)
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_harmless_questions_about_a_frozen_weight_are_answered():
    model = causal_lm().optimize_for_inference()
    for parameter in model.parameters():
        assert parameter.get_device() == -1
        assert len(parameter) == parameter.shape[0]
        assert f"{parameter.dtype}" in f"{parameter!r}" or type(parameter) is not FrozenWeight
        parameter.grad = None
        parameter.requires_grad_(requires_grad=False)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
