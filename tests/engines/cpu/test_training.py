"""A layer in training by the kernels beside its own modules in double precision; optimizers beside PyTorch's."""

import copy
import platform
import resource
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modernbert import (
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertForMultipleChoice,
    ModernBertForSequenceClassification,
    ModernBertModel,
)
from modernbert.engines.cpu import library as native
from modernbert.engines.cpu import training
from modernbert.nn.layers import Layer
from modernbert.training.memory import memory_kept
from modernbert.training.optimizers import AdamW, StableAdamW, clip
from tests.conftest import SMALL, threads

pytestmark = pytest.mark.skipif(native.library() is None, reason="installed without the kernels")
LENGTHS = [70, 3, 1, 33, 150]


def model_of(**changes):
    torch.manual_seed(1)
    return ModernBertModel(ModernBertConfig(**{**SMALL, "initializer_range": 0.1, **changes})).train()


def batch_of(lengths):
    return torch.randint(3, 90, (sum(lengths),)), torch.tensor([0, *lengths]).cumsum(0).int()


def passed(model, lengths=LENGTHS):
    """The states of a batch, and the gradients of all parameters and of the embeddings."""
    torch.manual_seed(2)
    ids, starts = batch_of(lengths)
    dtype = next(model.parameters()).dtype
    embeds = torch.randn(len(ids), model.config.hidden_size, dtype=torch.float32).to(dtype).requires_grad_()
    states = model(inputs_embeds=embeds, cu_seqlens=starts).last_hidden_state
    wanted = torch.randn(states.shape).to(dtype)
    parameters = [p for p in model.parameters() if p.requires_grad and p is not model.embeddings.tok_embeddings.weight]
    return states, torch.autograd.grad((states * wanted).sum(), [embeds, *parameters])


@pytest.fixture
def served(monkeypatch):
    """How many layers the kernels have run."""
    counted = []
    before = training._Layer.apply
    monkeypatch.setattr(training._Layer, "apply", lambda *given: (counted.append(1), before(*given))[1])
    return counted


def relative(one, other):
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).norm() / other.norm().clamp_min(1e-30))


@settings(max_examples=15)
@given(
    st.lists(st.sampled_from([1, 2, 9, 31, 32, 33, 64, 65, 129, 300]), min_size=1, max_size=4),
    st.sampled_from([(1, 16), (2, 6), (3, 32), (1, 66), (4, 64)]),
    st.sampled_from([5, 33, 64, 130]),
    st.sampled_from([4, 16, 128]),
    st.integers(1, 3),
)
def test_a_layer_and_its_gradients_are_those_of_its_modules_in_double(lengths, heads, inside, window, number):
    sizes = {"hidden_size": heads[0] * heads[1], "num_attention_heads": heads[0], "intermediate_size": inside}
    model = model_of(**sizes, local_attention=window)
    exact = model_of(**sizes, local_attention=window).double()
    exact.load_state_dict(model.state_dict())
    exact.attend_by("eager")
    with threads(number):
        states, gradients = passed(model, lengths)
    true_states, true_gradients = passed(exact, lengths)
    assert relative(states, true_states) < 1e-5
    for one, other in zip(gradients, true_gradients, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5 * float(other.abs().max()) + 1e-9)


def test_every_layer_of_a_usual_encoder_is_served(served):
    passed(model_of())
    assert len(served) == SMALL["num_hidden_layers"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_number_of_threads_changes_no_bit_of_a_gradient(precision):
    if precision == "bfloat16" and not native.library().multiplies_bfloat16:
        pytest.skip("this processor does not multiply bfloat16")
    found = []
    for number in (1, 2, 5):
        with threads(number), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            model = model_of()
            model.embeddings.norm = model.final_norm = torch.nn.Identity()  # PyTorch's own
            found.append(passed(model))
    for states, gradients in found[1:]:
        assert torch.equal(states, found[0][0])
        assert all(torch.equal(one, other) for one, other in zip(gradients, found[0][1], strict=True))


def test_a_text_has_the_same_states_alone_and_in_a_batch():
    model, (ids, starts) = model_of(), batch_of(LENGTHS)
    together = model(ids, cu_seqlens=starts).last_hidden_state.split(LENGTHS)
    for text, states in zip(ids.split(LENGTHS), together, strict=True):
        alone = model(text, cu_seqlens=torch.tensor([0, len(text)], dtype=torch.int32)).last_hidden_state
        assert torch.equal(alone, states)


def test_under_autocast_products_are_of_bfloat16_numbers_and_states_stay_float32(served):
    if not native.library().multiplies_bfloat16:
        pytest.skip("this processor does not multiply bfloat16")
    exact, exact_gradients = passed(model_of())
    with torch.autocast("cpu", torch.bfloat16):
        states, gradients = passed(model_of())
    assert len(served) == 2 * SMALL["num_hidden_layers"]
    assert states.dtype == torch.float32
    assert 1e-4 < relative(states, exact) < 2e-2
    assert all(relative(one, other) < 5e-2 for one, other in zip(gradients, exact_gradients, strict=True))


def listens(model):
    model.layers[1].mlp.Wi.register_forward_hook(lambda *given: None)


def adapts(model):
    model.layers[1].attn.Wo.forward = type(model.layers[1].attn.Wo).forward.__get__(model.layers[1].attn.Wo)


@pytest.mark.parametrize(
    ("changes", "change", "left"),
    [
        ({"mlp_dropout": 0.1}, None, 0),
        ({"attention_dropout": 0.1}, None, 0),
        ({"hidden_activation": "silu"}, None, 0),
        ({"norm_bias": True}, None, 0),
        ({"mlp_bias": True}, None, 0),
        ({"attention_bias": True}, None, 0),
        ({}, listens, 3),
        ({}, adapts, 3),
        ({}, lambda model: model.attend_by("eager"), 0),
        ({}, lambda model: model.attend_by("sdpa"), 0),
        ({}, lambda model: model.eval(), 0),
    ],
)
def test_what_the_kernels_do_not_know_is_left_to_the_modules(changes, change, left, served):
    model = model_of(**changes)
    if change is not None:
        change(model)
    passed(model)
    assert len(served) == left


def test_frozen_layers_take_no_gradient(served):
    model = model_of()
    model.layers[0].requires_grad_(False)
    model.layers[2].attn.Wo.requires_grad_(False)
    _, gradients = passed(model)
    whole = model_of()
    _, expected = passed(whole)
    names = [name for name, _ in whole.named_parameters() if "tok_embeddings" not in name]
    kept = [g for name, g in zip(["embeds", *names], expected, strict=True)
            if not name.startswith("layers.0.") and name != "layers.2.attn.Wo.weight"]  # fmt: skip
    assert len(served) == 2 * SMALL["num_hidden_layers"]
    assert all(torch.equal(one, other) for one, other in zip(gradients, kept, strict=True))


def test_gradients_of_gradients_are_those_of_the_modules(served):
    def penalty(model):
        torch.manual_seed(3)
        ids, starts = batch_of([5, 9])
        embeds = torch.randn(len(ids), model.config.hidden_size).requires_grad_()
        out = model(inputs_embeds=embeds, cu_seqlens=starts).last_hidden_state
        (first,) = torch.autograd.grad(out.sin().sum(), embeds, create_graph=True)
        return torch.autograd.grad(first.square().sum(), list(model.layers.parameters()))

    ours, plain = model_of(), model_of()
    plain.attend_by("eager")
    for one, other in zip(penalty(ours), penalty(plain), strict=True):
        assert relative(one, other) < 1e-4
    assert len(served) == SMALL["num_hidden_layers"]


def test_layers_that_are_computed_again_give_the_same_gradients(served):
    plain, again = model_of(), model_of()
    again.is_gradient_checkpointing = True
    for one, other in zip(passed(plain)[1], passed(again)[1], strict=True):
        assert torch.equal(one, other)
    assert len(served) == 3 * SMALL["num_hidden_layers"]


@pytest.mark.parametrize("activation", ["gelu", "silu"])  # by the kernels, and module by module
@pytest.mark.parametrize("cls", [ModernBertForSequenceClassification, ModernBertForMultipleChoice])
def test_a_head_that_reads_first_tokens_alone_trains_as_one_that_sees_all(cls, activation, served):
    torch.manual_seed(6)
    ids, starts = batch_of([70, 3, 33, 9])
    labels = torch.tensor([0]) if cls is ModernBertForMultipleChoice else torch.tensor([1, 0, 1, 1])
    changes = {"classifier_pooling": "cls", "initializer_range": 0.1, "hidden_activation": activation}
    model = cls(ModernBertConfig(**{**SMALL, **changes})).train()
    found, rows = [], []
    for seen in (False, True):
        if seen:  # somebody wants every token's state
            model.model.final_norm.register_forward_hook(lambda module, given, out: rows.append(len(out)))
        out = model(ids, cu_seqlens=starts, labels=labels)
        found.append((out.loss, torch.autograd.grad(out.loss, list(model.parameters()))))
    assert rows == [len(ids)]
    assert len(served) == (2 * SMALL["num_hidden_layers"] if activation == "gelu" else 0)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=0)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_free_memory_stays_with_a_run_and_goes_back_after_it():
    block = 30 * 2**20
    with memory_kept():
        for _ in range(2):
            x = torch.ones(block // 4)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            del x
            x = torch.ones(block // 4)
            pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
            del x
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        assert pages < 1000  # of 7,680


def test_a_tied_model_learns_as_by_its_modules():
    torch.manual_seed(4)
    ids, starts = batch_of(LENGTHS)
    one = ModernBertForMaskedLM(ModernBertConfig(**SMALL)).train()
    other = copy.deepcopy(one)
    other.model.attend_by("sdpa")
    losses = []
    for model in (one, other):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            loss = model(ids, cu_seqlens=starts, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("number", [1, 3])
def test_a_step_of_an_optimizer_is_that_of_pytorch(stable, number):
    torch.manual_seed(5)
    shapes = [(), (3,), (40, 50), (1, 16384), (3, 16385)]
    ours = [torch.randn(shape, requires_grad=True) for shape in shapes]
    theirs = [p.detach().double().requires_grad_() for p in ours]
    settings = {"lr": 0.01, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}
    optimizer = (StableAdamW if stable else AdamW)(ours, **settings)
    exact = (StableAdamW if stable else torch.optim.AdamW)(theirs, **settings)  # in double PyTorch's operations serve
    with threads(number):
        for i in range(4):
            for one, other in zip(ours, theirs, strict=True):
                one.grad = torch.randn(one.shape) * 3**i
                other.grad = one.grad.double()
            norm = clip(optimizer, 1.5)
            expected = torch.nn.utils.clip_grad_norm_(theirs, 1.5)
            assert norm == pytest.approx(float(expected), rel=1e-6)
            optimizer.step()
            exact.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                optimizer.state[one][name].double(), exact.state[other][name], rtol=1e-5, atol=1e-9
            )
    assert {float(state["step"]) for state in optimizer.state.values()} == {4.0}


def test_gradients_are_clipped_where_the_kernels_do_not_step():
    parameter = torch.ones(4, requires_grad=True)
    parameter.grad = torch.full((4,), 10.0)
    optimizer = AdamW([parameter], lr=0.1, amsgrad=True)
    assert clip(optimizer, 1.0) == pytest.approx(20.0)
    optimizer.step()
    assert float(parameter.grad.norm()) == pytest.approx(1.0, rel=1e-4)


def test_kernels_of_layers_are_refused_where_shapes_do_not_fit(served):
    model = model_of()
    layer = model.layers[0]
    assert type(layer) is Layer
    layer.mlp.Wo.weight = torch.nn.Parameter(torch.zeros(SMALL["hidden_size"] + 1, SMALL["intermediate_size"]))
    with pytest.raises(RuntimeError):
        passed(model)
    assert not served
