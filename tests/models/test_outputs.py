"""Outputs as mappings, as attributes, and as what PyTorch takes apart; forwards that show their arguments."""

import copy
import inspect
import pickle
from collections import OrderedDict

import pytest
import torch
from torch.utils import _pytree as pytree

import modernbert
from modernbert import GenerateOutput
from modernbert.models.outputs import (
    BaseModelOutput,
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    HeadOutput,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from modernbert.nn.outputs import ModelOutput
from tests.conftest import model_of, random_decoder
from tests.heads import CLASSES

STATES, PAST = ("hidden_states", "attentions"), ("past_key_values", "hidden_states", "attentions")
FIELDS = {
    BaseModelOutput: ("last_hidden_state", *STATES),
    BaseModelOutputWithPast: ("last_hidden_state", *PAST),
    MaskedLMOutput: ("loss", "logits", *STATES),
    SequenceClassifierOutput: ("loss", "logits", *STATES),
    TokenClassifierOutput: ("loss", "logits", *STATES),
    MultipleChoiceModelOutput: ("loss", "logits", *STATES),
    QuestionAnsweringModelOutput: ("loss", "start_logits", "end_logits", *STATES),
    CausalLMOutputWithPast: ("loss", "logits", *PAST),
    SequenceClassifierOutputWithPast: ("loss", "logits", *PAST),
    GenerateOutput: (
        "sequences",
        "sequences_scores",
        "scores",
        "logits",
        "beam_indices",
        "attentions",
        "hidden_states",
        "past_key_values",
    ),
}

PACKED = "indices cu_seqlens max_seqlen batch_size seq_len output_attentions output_hidden_states return_dict"
ENCODER = "input_ids attention_mask sliding_window_mask position_ids"
DECODER = "input_ids attention_mask position_ids past_key_values inputs_embeds"
ITEMS = "num_items_in_batch"
ARGUMENTS = {
    "ModernBertModel": f"{ENCODER} inputs_embeds {PACKED}",
    "ModernBertForMaskedLM": f"{ENCODER} inputs_embeds labels {PACKED} {ITEMS} sparse_prediction",
    "ModernBertForSequenceClassification": f"{ENCODER} inputs_embeds labels {PACKED} {ITEMS}",
    "ModernBertForTokenClassification": f"{ENCODER} inputs_embeds labels {PACKED} {ITEMS}",
    "ModernBertForQuestionAnswering": f"{ENCODER} start_positions end_positions {PACKED} inputs_embeds {ITEMS}",
    "ModernBertForMultipleChoice": f"{ENCODER} inputs_embeds labels {PACKED} {ITEMS} num_choices",
    "ModernBertDecoderModel": f"{DECODER} use_cache cache_position {PACKED}",
    "ModernBertDecoderForCausalLM": f"{DECODER} labels use_cache cache_position logits_to_keep {PACKED} {ITEMS}",
    "ModernBertDecoderForSequenceClassification": f"{DECODER} labels use_cache cache_position {PACKED} {ITEMS}",
}


def filled(cls):
    """An output with every field, each of its own value; states are tuples."""
    values = [torch.full((2,), float(i)) for i in range(len(FIELDS[cls]))]
    states = {"hidden_states", "attentions", "scores"}
    return cls(*[(v, v + 10) if name in states else v for name, v in zip(FIELDS[cls], values, strict=True)])


@pytest.mark.parametrize("cls", FIELDS, ids=lambda cls: cls.__name__)
def test_fields_are_keys_attributes_and_places_in_the_reference_s_order(cls):
    output = filled(cls)
    assert isinstance(output, OrderedDict)
    assert tuple(output) == tuple(output.keys()) == FIELDS[cls]
    assert output.to_tuple() == tuple(output.values()) == output[:]
    for place, (name, value) in enumerate(output.items()):
        assert output[name] is output[place] is getattr(output, name) is output.get(name) is value
    assert dict(**output) == {**output} == dict(output)
    assert repr(output).startswith(f"{cls.__name__}({FIELDS[cls][0]}=tensor(")


@pytest.mark.parametrize("cls", FIELDS, ids=lambda cls: cls.__name__)
def test_an_output_is_made_of_fields_a_mapping_or_pairs(cls):
    output = filled(cls)
    for same in (cls(**output), cls(output), cls(dict(output)), cls((name, output[name]) for name in output)):
        assert type(same) is cls
        assert all(a is b for a, b in zip(same.to_tuple(), output.to_tuple(), strict=True))
    assert len(cls()) == 0
    with pytest.raises(
        TypeError, match=rf"{cls.__name__} takes {len(FIELDS[cls])} fields; {len(FIELDS[cls]) + 1} were"
    ):
        cls(*range(len(FIELDS[cls]) + 1))


def test_keys_and_attributes_stay_in_step_and_in_order():
    output = MaskedLMOutput(logits=torch.zeros(2))
    assert output.loss is None
    assert "loss" not in output
    output.loss = torch.tensor(1.0)
    assert list(output) == ["loss", "logits"]
    assert output["loss"] is output.loss is output[0]
    output["loss"] = torch.tensor(2.0)
    assert output.loss == 2
    output["attentions"], output.hidden_states = (torch.zeros(1),), (torch.zeros(1),)
    assert list(output) == ["loss", "logits", "hidden_states", "attentions"]
    output.loss = output["attentions"] = None
    assert list(output) == ["logits", "hidden_states"]
    assert output.pop("logits") is not None
    assert output.logits is None
    output.update(logits=torch.ones(1))
    assert list(output) == ["logits", "hidden_states"]
    del output["logits"]
    assert output.logits is None
    with pytest.raises(KeyError, match="has no field 'nonsense'; it has loss, logits, hidden_states, attentions"):
        output["nonsense"] = 1
    with pytest.raises(AttributeError, match="'MaskedLMOutput' object has no attribute 'nonsense'"):
        _ = output.nonsense


@pytest.mark.parametrize("cls", FIELDS, ids=lambda cls: cls.__name__)
def test_pytorch_takes_outputs_apart_and_makes_them_anew(cls):
    output = filled(cls)
    output.hidden_states = output.past_key_values = None
    leaves, spec = pytree.tree_flatten(output)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    again = pytree.tree_unflatten(leaves, spec)
    assert type(again) is cls
    assert list(again) == list(output)
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    assert next(str(path[0]) for path, _ in pytree.tree_flatten_with_path(output)[0]) == f"['{FIELDS[cls][0]}']"
    doubled = pytree.tree_map(lambda x: 2 * x, output)
    assert type(doubled) is cls
    assert torch.equal(doubled[0], 2 * output[0])


@pytest.mark.parametrize("cls", FIELDS, ids=lambda cls: cls.__name__)
def test_outputs_are_copied_and_pickled(cls):
    output = filled(cls)
    for same in (copy.copy(output), output.copy(), copy.deepcopy(output), pickle.loads(pickle.dumps(output))):
        assert type(same) is cls
        assert list(same) == list(output)
        assert torch.equal(same[0], output[0])
    assert copy.copy(output)[0] is output[0]
    assert copy.deepcopy(output)[0] is not output[0]


def test_a_class_of_one_s_own_adds_fields():
    class Graded(HeadOutput):
        grade: int | None

    output = Graded(logits=torch.zeros(1), grade=3)
    assert list(output) == ["grade", "logits"]
    assert type(pytree.tree_map(lambda x: x, output)) is Graded


def test_export_sees_the_outputs_of_a_module():
    class Head(torch.nn.Module):
        def forward(self, x):
            return SequenceClassifierOutput(x.sum(), x * 2, hidden_states=(x,))

    x = torch.randn(3)
    output = torch.export.export(Head(), (x,)).module()(x)
    assert type(output) is SequenceClassifierOutput
    assert list(output) == ["loss", "logits", "hidden_states"]
    assert torch.equal(output.logits, x * 2)


def test_every_class_is_known_here():
    assert set(ARGUMENTS) == set(CLASSES)
    named = {
        cls for cls in vars(modernbert.models.outputs).values() if inspect.isclass(cls) and issubclass(cls, ModelOutput)
    }
    assert named | {GenerateOutput} >= set(FIELDS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_forward_shows_its_arguments_in_the_reference_s_order(name):
    cls = getattr(modernbert, name)
    shown = inspect.signature(cls.forward).parameters
    assert list(shown) == ["self", *ARGUMENTS[name].split(), "kwargs"]
    assert list(inspect.signature(model_of(name).forward).parameters) == list(shown)[1:]
    for argument in ARGUMENTS[name].split():
        assert shown[argument].default == (0 if argument == "logits_to_keep" else None)
        assert f"\n    {argument}: " in cls.forward.__doc__
    assert shown["input_ids"].annotation == torch.Tensor | None
    assert shown["max_seqlen"].annotation == int | None
    assert "Raises:\n    InputError: " in inspect.getdoc(cls.forward)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_are_taken_by_position_as_by_name(name):
    model = model_of(name)
    ids = torch.randint(3, 96, (2, 1, 5) if "MultipleChoice" in name else (2, 5))
    mask, count = torch.ones_like(ids), len(ARGUMENTS[name].split())
    given = {"input_ids": ids, "attention_mask": mask, "output_hidden_states": True, "return_dict": False}
    by_name = model(**given)
    by_place = model(*(given.get(argument, inspect.signature(model.forward).parameters[argument].default)
                       for argument in ARGUMENTS[name].split()))  # fmt: skip
    for a, b in zip(pytree.tree_leaves(by_name), pytree.tree_leaves(by_place), strict=True):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b)
    with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
        model(ids, input_ids=ids)
    with pytest.raises(TypeError, match="too many positional arguments"):
        model(*[None] * (count + 1))
    with pytest.raises(TypeError, match="forward got unknown arguments: nonsense"):
        model(ids, nonsense=1)


def test_a_cache_of_a_model_counts_as_one_leaf():
    output = random_decoder()(torch.tensor([[5, 6]]))
    leaves, spec = pytree.tree_flatten(output)
    assert leaves == [output.logits, output.past_key_values]
    assert pytree.tree_unflatten(leaves, spec).past_key_values is output.past_key_values
