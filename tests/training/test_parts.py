"""The parts of a run, apart: options, steps, batches, schedules, groups, freezing, and loops of one's own."""

import inspect
import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import modernbert
from modernbert import ModernBertConfig, ModernBertForSequenceClassification, training
from modernbert.engines.cpu.library import denormals_flushed
from modernbert.errors import InputError
from modernbert.training.adapters import add_adapters, merged
from modernbert.training.examples import StepPlan, by_tokens, pack_rows
from modernbert.training.model import autocast, products, save_memory, train_in_float32
from modernbert.training.optimizers import StableAdamW, freeze, make_optimizer, parameter_groups
from modernbert.training.options import SCHEDULES, TrainingOptions
from modernbert.training.pretraining.options import PretrainOptions
from modernbert.training.schedules import make_schedule
from tests.conftest import SMALL
from tests.heads import CLASSES

lengths = st.lists(st.integers(1, 90), min_size=1, max_size=60)


@given(lengths, st.integers(1, 100))
def test_groups_keep_the_order_and_the_budget(lengths, budget):
    groups = by_tokens(lengths, budget)
    assert [i for group in groups for i in group] == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in group) <= budget or len(group) == 1 for group in groups)
    for before, behind in itertools.pairwise(groups):
        assert sum(lengths[i] for i in before) + lengths[behind[0]] > budget


@given(lengths, st.integers(1, 20), st.one_of(st.none(), st.integers(1, 200)), st.integers(0, 9), st.integers(0, 3))
def test_an_epoch_has_every_example_once(lengths, batch_size, batch_tokens, seed, epoch):
    plan = StepPlan(np.array(lengths), batch_size, batch_tokens, seed)
    steps = plan.epoch(epoch)
    assert sorted(i for step in steps for i in step) == list(range(len(lengths)))
    assert plan.epoch(epoch) == steps
    assert plan.steps(1) == len(plan.epoch(0))
    assert plan.steps(3) == sum(len(plan.epoch(i)) for i in range(3))
    if batch_tokens is None:
        assert {len(step) for step in steps[:-1]} <= {batch_size}


def test_packed_rows():
    packed = pack_rows([[5, 6, 7], [8]])
    assert packed["input_ids"].tolist() == [5, 6, 7, 8]
    assert packed["cu_seqlens"].tolist() == [0, 3, 4]
    assert packed["cu_seqlens"].dtype == torch.int32


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name):
    schedule = make_schedule(name, 100, 0.1, 0.2)
    factors = [schedule(i) for i in range(100)]
    assert all(0 < a < b <= 1 for a, b in itertools.pairwise(factors[:10]))
    assert max(factors) == 1.0
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))
    expected = {"linear": 50 / 90, "cosine": (1 + math.cos(math.pi * 40 / 90)) / 2, "wsd": 1.0, "constant": 1.0}
    assert factors[50] == pytest.approx(expected[name])
    assert factors[-1] < 0.15 or name == "constant"
    assert name != "wsd" or factors[89] == pytest.approx(1 - math.sqrt(10 / 21))


def model_of(**changes):
    torch.manual_seed(0)
    return ModernBertForSequenceClassification(ModernBertConfig(**{**SMALL, **changes}))


def test_layers_further_down_learn_more_slowly():
    model = model_of()
    rates = {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in parameter_groups(model, 0.1, 1.0, 0.5):
        for parameter in group["params"]:
            rates[names[parameter]] = (group["lr"], group["weight_decay"])
    assert set(rates) == set(names.values())
    assert rates["classifier.weight"] == (1.0, 0.1)
    assert rates["model.layers.3.attn.Wqkv.weight"] == (0.5, 0.1)
    assert rates["model.layers.0.mlp.Wi.weight"] == (0.5**4, 0.1)
    assert rates["model.embeddings.tok_embeddings.weight"] == (0.5**5, 0.1)
    assert rates["model.final_norm.weight"] == (1.0, 0.0)
    assert rates["model.layers.2.mlp_norm.weight"] == (0.25, 0.0)


def test_what_is_frozen_does_not_move():
    model = model_of()
    freeze(model, embeddings=False, layers=2)
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = make_optimizer(model, TrainingOptions(lr=0.1))
    model.train()
    model(torch.randint(3, 90, (2, 9)), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    still = {name for name in before if name not in moved}
    assert {n for n in still if "embeddings" in n or "layers.0." in n or "layers.1." in n} == still
    assert any("layers.2." in name for name in moved)
    with pytest.raises(InputError, match="the model has 4 layers"):
        freeze(model, False, 5)
    model.requires_grad_(False)
    with pytest.raises(InputError, match="every parameter is frozen"):
        make_optimizer(model, TrainingOptions())


def test_options_of_a_file_take_their_types():
    options = TrainingOptions.of({"lr": "3e-4", "epochs": 2, "max_steps": 7.0, "tracker": "tensorboard"}, "run.yaml")
    assert (options.lr, options.epochs, options.max_steps, options.tracker) == (3e-4, 2.0, 7, ["tensorboard"])
    for values, said in [
        ({"learning_rate": 1}, "run.yaml has no option learning_rate"),
        ({"seed": "x"}, "seed is 'x'; it must be a whole number"),
        ({"epochs": True}, "epochs is True; it must be a number"),
        ({"lr": [1]}, r"lr is \[1\]"),
        ({"layer_decay": 0}, "layer_decay is 0; it must be a number above 0 and at most 1"),
    ]:
        with pytest.raises(InputError, match=said):
            TrainingOptions.of(values, "run.yaml")


def test_numbers_and_paths_stand_for_texts():
    options = PretrainOptions.of({"mask_rate": 0.15, "data": Path("data"), "config": Path("small")}, "pretrain")
    assert (options.mask_rates, options.data, options.config) == ([(0.0, 0.15)], ["data"], "small")


def test_what_docs_import_is_exported():
    assert not any(inspect.ismodule(getattr(training, name)) for name in training.__all__ * 2)
    assert training.StableAdamW is StableAdamW
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = training.nothing


def test_a_loop_of_ones_own_under_accelerate():
    """Packed batches, num_items_in_batch, and Accelerate's own words; nothing of this package but the model."""
    from accelerate import Accelerator

    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model.train(), optimizer)
    batch = pack_rows([[1, 5, 6, 2], [1, 7, 2]])
    losses = []
    for _ in range(12):
        with accelerator.accumulate(model):
            loss = model(**batch, labels=torch.tensor([0, 1]), num_items_in_batch=2).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_denormals_count_as_zero_on_every_thread_and_then_no_more():
    code = """
import torch
from modernbert.engines.cpu.library import denormals_flushed, library
torch.set_num_threads(4)
x = torch.full((1 << 18,), 1e-30)
(x * 1e-3).sum()  # the threads are there before the switch
tiny = torch.tensor(1e-10)
with denormals_flushed():
    inside = int((x * tiny != 0).sum())
outside = int((x * tiny != 0).sum())
print(library() is not None, inside, outside)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert int(said[2]) == 1 << 18
    assert int(said[1]) == 0 or said[0] == "False"
    with denormals_flushed():
        pass
    assert float(torch.tensor(1e-30) * 1e-10) > 0


def test_memory_is_saved_where_the_options_say_so(small_model):
    save_memory(small_model, TrainingOptions())
    assert not small_model.is_gradient_checkpointing
    save_memory(small_model, TrainingOptions(activation_memory=0.5))
    assert small_model.model.is_gradient_checkpointing
    assert small_model.model.recompute.budget == 2**29
    save_memory(small_model, TrainingOptions(gradient_checkpointing=True))
    assert small_model.model.recompute.budget is None
    with pytest.raises(InputError, match="activation_memory is -1"):
        TrainingOptions(activation_memory=-1)


@pytest.mark.parametrize("kind", CLASSES)
def test_adapters_leave_embeddings_alone_and_merge_to_the_same_outputs(kind):
    made = getattr(modernbert, kind)
    model = made(made.config_class(**SMALL))
    adapted = add_adapters(model, 3, None)
    names = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert names
    assert not any("embed" in name or ".decoder." in name for name in names)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            parameter += 0.05 * torch.randn_like(parameter) * (name in names)
        ids = torch.randint(3, 90, (1, 2, 9) if kind.endswith("MultipleChoice") else (2, 9))
        before = adapted.eval()(input_ids=ids)[0]
        whole = merged(adapted)
        torch.testing.assert_close(whole(input_ids=ids)[0], before, rtol=1e-4, atol=1e-5)
    output = whole.get_output_embeddings()
    assert output is None or output.weight is whole.get_input_embeddings().weight


def test_weights_of_16_bits_are_converted_with_one_warning(caplog):
    model = model_of().bfloat16()
    model.model.embeddings.half()
    train_in_float32(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    train_in_float32(model)
    (warned,) = [record.getMessage() for record in caplog.records]
    assert warned == "the weights are bfloat16 and float16; they are trained in float32"
    still = model_of().bfloat16().requires_grad_(False)  # nothing of it is trained
    train_in_float32(still)
    assert still.dtype == torch.bfloat16


@pytest.mark.parametrize("native", [True, False])
def test_auto_is_what_the_processor_multiplies_and_the_rest_is_what_was_asked_for(native, monkeypatch):
    monkeypatch.setattr("modernbert.training.model.multiplies_bfloat16", lambda: native)
    cpu = torch.device("cpu")
    assert products("auto", cpu) == ("bfloat16" if native else "float32")
    assert (products("float32", cpu), products("bfloat16", cpu)) == ("float32", "bfloat16")
    with autocast("auto", cpu):
        assert torch.is_autocast_enabled("cpu") == native
