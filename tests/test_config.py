"""Both generations of config.json, in and out; impossible values refused by name; unknown keys kept."""

import copy
import dataclasses
import gc
import json

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from modernbert import (
    AutoConfig,
    ModernBertConfig,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    ModernBertForSequenceClassification,
)
from modernbert.config import Reach
from modernbert.errors import CheckpointError, ConfigError, InputError, NotFoundError
from tests.conftest import SMALL
from tests.parity.configs import random_config

# What the pages of both generations document.
DEFAULTS = {
    "vocab_size": 50368, "hidden_size": 768, "intermediate_size": 1152, "num_hidden_layers": 22,
    "num_attention_heads": 12, "hidden_activation": "gelu", "max_position_embeddings": 8192, "initializer_range": 0.02,
    "initializer_cutoff_factor": 2.0, "norm_eps": 1e-05, "norm_bias": False, "pad_token_id": 50283,
    "eos_token_id": 50282, "bos_token_id": 50281, "cls_token_id": 50281, "sep_token_id": 50282,
    "attention_bias": False, "attention_dropout": 0.0, "local_attention": 128, "embedding_dropout": 0.0,
    "mlp_bias": False, "mlp_dropout": 0.0, "decoder_bias": True, "classifier_pooling": "cls",
    "classifier_dropout": 0.0, "classifier_bias": False, "classifier_activation": "gelu",
    "deterministic_flash_attn": False, "sparse_prediction": False, "sparse_pred_ignore_index": -100,
    "reference_compile": None, "repad_logits_with_grad": False, "global_rope_theta": 160000.0,
    "local_rope_theta": 10000.0, "global_attn_every_n_layers": 3,
}  # fmt: skip


def test_the_documented_defaults():
    config = ModernBertConfig()
    for name, value in DEFAULTS.items():
        assert getattr(config, name) == value, name
    assert config.layer_types == ["sliding_attention" if i % 3 else "full_attention" for i in range(22)]
    assert config.rope_parameters == {
        "full_attention": {"rope_type": "default", "rope_theta": 160000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    assert config.num_labels == 2
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert config.label2id == {"LABEL_0": 0, "LABEL_1": 1}
    assert config.head_dim == 64
    assert config.sliding_window == 64
    assert config.reach("sliding_attention") == Reach(64, 64)
    assert config.reach("full_attention") == Reach(None, None)


def test_the_older_generation():
    values = {"num_hidden_layers": 5, "global_attn_every_n_layers": 2, "torch_dtype": "bfloat16"}
    values |= {"global_rope_theta": 7.0e4, "local_rope_theta": 5.0e3, "model_type": "modernbert"}
    others = {"position_embedding_type": "absolute", "gradient_checkpointing": False}
    config = ModernBertConfig.from_dict({**values, **others})
    full, local = "full_attention", "sliding_attention"
    assert config.layer_types == [full, local, full, local, full]
    assert config.rope_parameters[full]["rope_theta"] == 7.0e4
    assert config.rope_parameters[local]["rope_theta"] == 5.0e3
    assert config.dtype == config.torch_dtype == torch.bfloat16
    assert config.extra == others


def test_layer_types_and_rope_parameters_win():
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    rope = {"full_attention": {"rope_theta": 9e4}, "sliding_attention": {"rope_type": "linear", "factor": 2}}
    values = {"num_hidden_layers": 3, "layer_types": kinds, "rope_parameters": rope}
    config = ModernBertConfig(**values, global_attn_every_n_layers=3, global_rope_theta=1e3)
    assert config.layer_types == kinds
    assert config.global_attn_every_n_layers is None
    assert config.global_rope_theta == 9e4
    local = {"rope_type": "linear", "factor": 2, "rope_theta": 10000.0}
    assert config.rope_parameters["sliding_attention"] == local
    alternate = ["full_attention", "sliding_attention"] * 2
    assert ModernBertConfig(num_hidden_layers=4, layer_types=alternate).global_attn_every_n_layers == 2


def test_rope_scaling_of_older_files_means_both_layer_types():
    config = ModernBertConfig(rope_scaling={"type": "yarn", "factor": 4.0})
    theirs = transformers.ModernBertConfig(rope_scaling={"rope_type": "yarn", "factor": 4.0})
    assert config.rope_parameters == theirs.rope_parameters
    flat = ModernBertConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5e4})
    local = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5e4}
    assert flat.rope_parameters["sliding_attention"] == local
    texts = ModernBertConfig(rope_parameters={"rope_type": "linear", "factor": "2", "rope_theta": "5e4"})
    assert texts.rope_parameters["full_attention"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4}


IMPOSSIBLE = {
    "hidden_size is 100, which is not a multiple of num_attention_heads": {"hidden_size": 100},
    "gives heads of 3; rotary": {"hidden_size": 36},
    "hidden_size is -768": {"hidden_size": -768},
    "vocab_size is 0": {"vocab_size": 0},
    "num_hidden_layers is -1": {"num_hidden_layers": -1},
    "intermediate_size is 1.5": {"intermediate_size": 1.5},
    "local_attention is -2": {"local_attention": -2},
    r"layer_types\[1\] is 'chunked'": {"num_hidden_layers": 2, "layer_types": ["full_attention", "chunked"]},
    "layer_types names 1 layers; num_hidden_layers is 22": {"layer_types": ["full_attention"]},
    "global_attn_every_n_layers is 0": {"global_attn_every_n_layers": 0},
    "pad_token_id is 50368; the vocabulary has ids 0 to 50367": {"pad_token_id": 50368},
    "sep_token_id is 'x'": {"sep_token_id": "x"},
    "mlp_dropout is 1.5; it must be a number of at least 0 and below 1": {"mlp_dropout": 1.5},
    "norm_eps is 0": {"norm_eps": 0},
    "hidden_activation is 'gleu'": {"hidden_activation": "gleu"},
    "classifier_pooling is 'max'": {"classifier_pooling": "max"},
    "problem_type is 'ranking'": {"problem_type": "ranking"},
    "rope_type 'longrope'": {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
    r"\['factor'\] is None; it must be a number of at least 1": {"rope_scaling": {"rope_type": "linear"}},
    r"\['factor'\] is 0.5": {"rope_scaling": {"rope_type": "yarn", "factor": 0.5}},
    "global_rope_theta is 'big'; it must be a number": {"global_rope_theta": "big"},
    "rope_parameters has": {"rope_parameters": {"full_attention": {}, "other": {}}},
    "num_labels is 0": {"num_labels": 0},
    r"id2label has the ids \[0, 2\]": {"id2label": {0: "a", 2: "b"}},
    r"label2id has the ids \[0, 5\]": {"label2id": {"a": 0, "b": 5}},
    "pruned_heads names layer 30": {"pruned_heads": {30: [0]}},
    "pruned_heads names heads": {"pruned_heads": {0: [12]}},
    "extra is 'a'; it must hold values by name": {"extra": "a"},
    "norm_eps is inf; it must be a number": {"norm_eps": float("inf")},
    "norm_eps is nan": {"norm_eps": float("nan")},
    "norm_eps is True": {"norm_eps": True},
    "dtype is 'float3'; choose one of float64, float32": {"dtype": "float3"},
    "dtype is 'int8'": {"torch_dtype": "int8"},
    "num_hidden_layers is 1000000000; it must be a whole number of at least 0 and at most 4096": {
        "num_hidden_layers": 10**9
    },
    "num_labels is 1000000000; it must be a whole number of at least 1 and at most": {"num_labels": 10**9},
    "hidden_size is 1000000000000; it must be a whole number of at least 1 and at most": {"hidden_size": 10**12},
    "norm_bias is 'yes'; choose True or False": {"norm_bias": "yes"},
    "tie_word_embeddings is 2; choose True or False": {"tie_word_embeddings": 2},
    "reference_compile is 'auto'; choose True or False": {"reference_compile": "auto"},
    r"pad_token_id is \[0\]": {"pad_token_id": [0]},
    "pad_token_id is True": {"pad_token_id": True},
    "eos_token_id is 'x'": {"eos_token_id": [2, "x"]},
    "layer_types is 'full_attention'; it must be a list": {"layer_types": "full_attention"},
    "rope_parameters is 'yarn'": {"rope_parameters": "yarn"},
    r"rope_parameters\['full_attention'\] is 5": {"rope_parameters": {"full_attention": 5, "sliding_attention": {}}},
    r"\['factor'\] is True": {"rope_scaling": {"rope_type": "linear", "factor": True}},
    r"\['rope_theta'\] is 1; it must be a number above 1": {
        "rope_scaling": {"type": "yarn", "factor": 2, "rope_theta": 1}
    },
    r"\['beta_fast'\] is \[\]": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": []}},
    r"\['rope_theta'\] is 1e\+30": {"global_rope_theta": 10**30},
    "cls_token_id is 1000000000000": {"cls_token_id": 10**12},
    "sparse_pred_ignore_index is 1000000000000": {"sparse_pred_ignore_index": 10**12},
    r"\['truncate'\] is 'no'; choose True or False": {
        "rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": "no"}
    },
    "id2label is 'positive'": {"id2label": "positive"},
    "id2label has the ids": {"id2label": {"-1": "a"}},
    r"id2label names label 1 \['b'\]": {"id2label": {"0": "a", "1": ["b"]}},
    "label2id has the ids": {"label2id": {"a": "zero", "b": 1}},
    "pruned_heads names layer 'x'": {"pruned_heads": {"x": [0]}},
    "pruned_heads names heads 3 of layer 0": {"pruned_heads": {"0": 3}},
    "sliding_window is -4; it must be a whole number of at least 0": {"sliding_window": -4},
}


def made(values):
    return ModernBertConfig(**values)


@pytest.mark.parametrize("message", IMPOSSIBLE)
def test_impossible_values_are_refused_by_name(message):
    values = IMPOSSIBLE[message]
    make = ModernBertConfig.from_dict if {"sliding_window", "torch_dtype"} & {*values} else made  # of files alone
    with pytest.raises(ConfigError, match=message):
        make(values).check_fits()


def test_what_files_may_hold_is_refused_from_a_caller():
    with pytest.raises(ConfigError, match="pad_token_id is -1"):
        ModernBertConfig(pad_token_id=-1)
    with pytest.raises(ConfigError, match="num_labels is 3 and id2label names 2"):
        ModernBertConfig(num_labels=3, id2label={0: "a", 1: "b"})


def test_unknown_arguments_are_kept_as_in_transformers(tmp_path, caplog):
    values = {"foo": {"a": [1]}, "hiden_size": 4}
    config, theirs = ModernBertConfig(**values), transformers.ModernBertConfig(**values)
    assert "no hiden_size: it is kept, and changes nothing; did you mean hidden_size?" in caplog.text
    assert (config.foo, config.hiden_size) == (theirs.foo, theirs.hiden_size)
    config.bar = 2
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again == config
    assert (again.foo, again.bar) == ({"a": [1]}, 2)
    del again.bar
    assert not hasattr(again, "bar")
    with pytest.raises(AttributeError, match="no attribute 'bar'"):
        again.bar  # noqa: B018
    with pytest.raises(TypeError):
        ModernBertConfig(1000)
    config.bar = object()
    with pytest.raises(ConfigError, match="cannot be saved"):
        config.to_json_string()


@pytest.mark.parametrize("is_first", [True, False])
def test_a_configuration_class_of_ones_own(is_first, tmp_path):
    class Own(ModernBertConfig):
        def __init__(self, foo=1, **kwargs):
            if is_first:
                self.foo = foo
            super().__init__(**kwargs)
            if not is_first:
                self.foo = foo

    config = Own(foo=5, num_labels=3)
    config.hidden_size = 96
    assert (config.foo, config.replace(num_labels=4).foo) == (5, 5)
    config.save_pretrained(tmp_path)
    again = Own.from_pretrained(tmp_path)
    assert again == config
    assert (again.foo, again.num_labels) == (5, 3)


# How a caller says it in transformers, and the fields that are meant.
OTHER_NAMES = [
    ({"hidden_act": "relu"}, {"hidden_activation": "relu"}),
    ({"torch_dtype": torch.bfloat16}, {"dtype": "bfloat16"}),
    ({"sliding_window": 32}, {"local_attention": 64}),
    ({"is_decoder": False, "is_encoder_decoder": False, "model_type": "modernbert"}, {}),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
]


@pytest.mark.parametrize(("given", "meant"), OTHER_NAMES, ids=str)
def test_fields_are_taken_by_transformers_names(given, meant):
    expected = ModernBertConfig(**meant)
    assert ModernBertConfig(**given) == expected
    config = ModernBertConfig()
    config.update(given)
    assert config == expected
    for name, value in given.items():
        if name != "rope_scaling":
            assert getattr(config, name) == value


def test_what_every_model_has_cannot_be_set_otherwise():
    config, decoder = ModernBertConfig(), ModernBertDecoderConfig()
    facts = {
        "is_encoder_decoder": False, "is_composition": False, "is_decoder": False, "use_return_dict": True,
        "num_key_value_heads": 12, "rope_theta": 160_000.0, "head_dim": 64, "type_vocab_size": 0,
    }  # fmt: skip
    for name, value in facts.items():
        assert getattr(config, name) == value
        setattr(config, name, value)
        with pytest.raises(ConfigError, match=rf"{name} is 7; it (is always|follows from)"):
            setattr(config, name, 7)
    assert config == ModernBertConfig()
    assert (decoder.is_decoder, decoder.use_cache, config.use_cache) == (True, True, False)
    with pytest.raises(ConfigError, match="model_type is 'bert'; it is always 'modernbert' here"):
        ModernBertConfig(model_type="bert")


def test_the_usual_surface(tmp_path):
    config = ModernBertConfig(num_labels=3, problem_type="regression")
    config.to_json_file(tmp_path / "c.json")
    read = (ModernBertConfig.from_json_file, ModernBertConfig.from_pretrained, AutoConfig.from_pretrained)
    assert all(function(tmp_path / "c.json") == config for function in read)
    config.to_json_file(tmp_path / "diff.json", use_diff=True)
    assert ModernBertConfig.from_json_file(tmp_path / "diff.json") == config
    assert {*config.to_diff_dict()} == {"model_type", "id2label", "label2id", "problem_type"}
    assert config.save_pretrained(save_directory=tmp_path) == (str(tmp_path / "config.json"),)
    values, rest = ModernBertConfig.get_config_dict(
        pretrained_model_name_or_path=tmp_path, foo=1, trust_remote_code=True
    )
    assert (values, rest) == (config.to_dict(), {"foo": 1})
    again, unused = AutoConfig.from_pretrained(tmp_path, foo=1, num_labels=5, return_unused_kwargs=True)
    assert (again.num_labels, unused) == (5, {"foo": 1})
    assert again.name_or_path == again._name_or_path == str(tmp_path)
    assert "name_or_path" not in json.dumps(again.to_dict())
    assert config.get_text_config(decoder=True) is config
    assert ("hidden_size" in config, "foo" in config) == (True, False)
    assert list(config) == config.keys() == list(config.to_dict())
    assert {**config} == dict(config) == config.to_dict()
    assert (config.architectures, config.transformers_version, config.torch_dtype) == (None, None, None)
    assert ModernBertConfig(dtype="bfloat16").torch_dtype == torch.bfloat16
    assert ModernBertConfig(**config.to_dict()) == config
    assert AutoConfig.for_model("modernbert", num_labels=3, problem_type="regression") == config
    with pytest.raises(ConfigError, match="for_model has model_type 'bert'"):
        AutoConfig.for_model("bert")
    with pytest.raises(TypeError, match="has no hidden_dropout_prob; did you mean embedding_dropout"):
        AutoConfig.from_pretrained(tmp_path, hidden_dropout_prob=0.1)
    assert AutoConfig.from_pretrained(tmp_path, finetuning_task="cola").finetuning_task == "cola"


def test_a_field_that_is_set_is_checked_and_what_follows_from_it_made_anew():
    config = ModernBertConfig()
    config.num_hidden_layers = 4
    config.num_labels = 3
    assert config == ModernBertConfig(num_hidden_layers=4, num_labels=3)
    assert (len(config.layer_types), config.id2label[2]) == (4, "LABEL_2")
    before = config.to_json_string()
    for name, value in (("hidden_size", 0), ("classifier_pooling", "max"), ("num_labels", 0)):
        with pytest.raises(ConfigError, match=name):
            setattr(config, name, value)
    config.label2id = {"no": 0, "yes": 1}
    assert (config.id2label, config.num_labels) == ({0: "no", 1: "yes"}, 2)
    config.num_labels = 2
    assert config.id2label == {0: "no", 1: "yes"}
    config.num_labels = 3
    assert config.to_json_string() == before


def test_fields_that_shaped_a_model_change_in_a_copy_alone(caplog):
    config = ModernBertConfig(**SMALL, num_labels=2)
    model = ModernBertForSequenceClassification(config).eval()
    x = torch.tensor([[5, 6, 7]])
    for name, value in (("hidden_size", 96), ("vocab_size", 97), ("local_attention", 4), ("norm_eps", 0.1)):
        with pytest.raises(ConfigError, match=rf"{name} is set to .*config.replace\({name}=...\)"):
            setattr(model.config, name, value)
    model.config.hidden_size = 48  # as it is
    first = model(x).logits
    model.config.classifier_pooling = "mean"
    assert not torch.equal(model(x).logits, first)
    model.config.problem_type = "multi_label_classification"
    assert model(x, labels=torch.tensor([[1.0, 0.0]])).loss > 0
    model.config.return_dict = False
    assert isinstance(model(x), tuple)
    model.config.output_hidden_states = True
    assert len(model(x)[1]) == SMALL["num_hidden_layers"] + 1
    model.config.id2label = {0: "no", 1: "yes"}
    assert model.config.label2id == {"no": 0, "yes": 1}
    model.resize_token_embeddings(100)
    with pytest.raises(ConfigError, match="vocab_size is set to 96"):  # in the configuration that it has now, too
        model.config.vocab_size = 96
    model.config.use_cache = False
    assert not model.config.use_cache
    model.config.return_dict = True
    model.config.num_labels = 5
    assert "num_labels is 5, and the classifier of this ModernBertForSequenceClassification gives 2" in caplog.text
    model.config.problem_type = None
    with pytest.raises(InputError, match="num_labels is 5, and the classifier gives 2 scores"):
        model(x, labels=torch.tensor([3]))
    model.classifier = torch.nn.Linear(48, 5)
    assert model(x, labels=torch.tensor([3])).loss > 0
    other = copy.deepcopy(model.config)
    other.hidden_size = 96
    assert ModernBertForSequenceClassification(other).config.hidden_size == 96


def test_the_attention_of_a_built_model_follows_the_configuration():
    config = ModernBertConfig(**SMALL, attn_implementation="eager")
    assert config._attn_implementation == "eager"
    model = ModernBertForSequenceClassification(config).eval()
    x = torch.tensor([[5, 6, 7]])
    for name in ("sdpa", "eager", "auto"):
        model.config._attn_implementation = name
        assert model.attn_implementation == model.model.attn_implementation == name
        assert model.config._attn_implementation == {"auto": "sdpa"}.get(name, name)
        model.optimize_for_inference()
        with torch.no_grad():
            first = model(x).logits
        model.config._attn_implementation = "eager"
        with torch.no_grad():
            torch.testing.assert_close(model(x).logits, first, rtol=0, atol=1e-5)
    other = ModernBertForSequenceClassification(config, attn_implementation="sdpa")
    other.config.return_dict = False
    assert other.attn_implementation == other.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="nonsense"):
        model.config._attn_implementation = "nonsense"
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="nonsense"):
        ModernBertForSequenceClassification(ModernBertConfig(**SMALL, attn_implementation="nonsense"))


def test_a_model_has_a_configuration_of_its_own_which_is_free_when_it_is_gone(caplog):
    config = ModernBertConfig(**SMALL)
    model = ModernBertForSequenceClassification(config)
    assert model.config == config
    own = model.config
    assert model.model.config is own
    config.update({"hidden_size": 96})  # another model's
    assert own.hidden_size == 48
    config.use_cache = True
    config.output_attentions = True
    assert (
        "output_attentions is set for models that are built from now on; others have it in model.config" in caplog.text
    )
    assert not own.output_attentions
    del model
    gc.collect()
    own.hidden_size = 96


def test_fields_that_fit_only_together_are_set_one_after_another():
    config = ModernBertConfig(num_hidden_layers=1)
    config.hidden_size = 32
    config.num_attention_heads = 2
    config.vocab_size = 99
    with pytest.raises(ConfigError, match="pad_token_id is 50283; the vocabulary has ids 0 to 98"):
        ModernBertForSequenceClassification(config)
    config.pad_token_id = 98
    model = ModernBertForSequenceClassification(config)
    model.config.pad_token_id = 99
    model.resize_token_embeddings(100)
    assert model.config.vocab_size == 100


def test_replacing_makes_derived_values_anew():
    config = ModernBertConfig(id2label={0: "no", 1: "yes"})
    assert config.label2id == {"no": 0, "yes": 1}
    assert config.replace(num_labels=3).id2label[2] == "LABEL_2"
    assert config.replace(id2label={0: "x"}).num_labels == 1
    assert len(config.replace(num_hidden_layers=4).layer_types) == 4
    assert config.replace(global_attn_every_n_layers=11).layer_types.count("full_attention") == 2
    assert config.replace(local_rope_theta=5.0).rope_parameters["sliding_attention"]["rope_theta"] == 5.0
    yarn = ModernBertConfig(rope_scaling={"rope_type": "yarn", "factor": 4.0}).replace(global_rope_theta=1e6)
    assert yarn.rope_parameters["full_attention"]["rope_type"] == "yarn"
    assert yarn.rope_parameters["full_attention"]["rope_theta"] == yarn.global_rope_theta == 1e6
    irregular = ModernBertConfig(num_hidden_layers=3, layer_types=["full_attention"] * 2 + ["sliding_attention"])
    with pytest.raises(ConfigError, match="follow no rule"):
        irregular.replace(num_hidden_layers=2)
    assert irregular.replace(num_hidden_layers=1, layer_types=["full_attention"]).num_hidden_layers == 1
    assert config.replace(hidden_size=384).id2label == {0: "no", 1: "yes"}


@given(st.integers(0, 10_000))
def test_a_round_trip_changes_nothing(seed):
    values = random_config(seed)
    config = ModernBertConfig.from_dict({**values, "my_own_key": {"nested": [1, 2]}, "problem_type": "regression"})
    again = ModernBertConfig.from_dict(json.loads(config.to_json_string()))
    assert again == config
    assert again.extra == {"my_own_key": {"nested": [1, 2]}}
    assert again.to_json_string() == config.to_json_string()


@pytest.mark.parametrize("seed", range(4))
def test_transformers_reads_what_we_save_and_we_read_what_it_saves(seed, tmp_path):
    values = random_config(seed)
    ours = ModernBertConfig(**values, id2label={0: "a", 1: "b", 2: "c"}, dtype="float32")
    ours.save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    for name in (*values, "id2label", "label2id"):
        assert getattr(theirs, name) == getattr(ours, name), name
    theirs.save_pretrained(tmp_path / "theirs")
    back = AutoConfig.from_pretrained(tmp_path / "theirs")
    for field in dataclasses.fields(ModernBertConfig):
        if field.name != "extra":
            assert getattr(back, field.name) == getattr(ours, field.name), field.name


def test_reading_what_is_not_there(tmp_path):
    with pytest.raises(NotFoundError, match=r"holds no config\.json"):
        ModernBertConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        ModernBertConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="'llama'"):
        ModernBertConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "modernbert", "hidden_size": 96}')
    assert AutoConfig.from_pretrained(tmp_path, num_labels=9).num_labels == 9


# What JSON can hold where something else belongs.
STRANGE = ["5", [1], {"a": 1}, True, 1.5, -3, float("nan"), float("inf"), 10**400, [[[]]], None]
FIELDS = sorted(f.name for f in dataclasses.fields(ModernBertConfig) if f.name != "extra")


@pytest.mark.parametrize("field", [*FIELDS, "rope_scaling", "sliding_window", "torch_dtype", "model_type"])
def test_a_field_of_any_type_is_read_or_refused_in_one_line(field):
    refused = []
    for value in STRANGE:
        try:
            config = ModernBertConfig.from_dict(json.loads(json.dumps({field: value})))
        except ConfigError as error:
            refused.append(str(error))
        else:
            config.to_json_string()
    name = {"torch_dtype": "dtype", "label2id": "label"}.get(field, field)
    name = "rope_theta" if name.endswith("rope_theta") else name
    assert len(refused) >= 5
    assert all(name in message and len(message) < 300 and "\n" not in message for message in refused)


def test_labels_may_be_a_list_and_a_null_label_has_its_number():
    assert ModernBertConfig(id2label={0: "a"}, label2id={"a": "0"}).label2id == {"a": "0"}  # as in transformers
    assert ModernBertConfig(id2label=["no", "yes"]).id2label == {0: "no", 1: "yes"}
    assert ModernBertConfig.from_dict({"id2label": ["no", "yes", "maybe"]}).label2id == {"no": 0, "yes": 1, "maybe": 2}
    assert ModernBertConfig.from_dict({"id2label": {"0": None, "1": "yes"}}).id2label == {0: "LABEL_0", 1: "yes"}


@pytest.mark.parametrize("values", [{"sliding_window": 32}, {"sliding_window": 9, "local_attention": 100}], ids=str)
def test_a_sliding_window_alone_is_the_window_as_in_transformers(values):
    config = ModernBertConfig.from_dict(values)
    theirs = transformers.ModernBertConfig.from_dict(values)
    assert config.local_attention == theirs.local_attention
    assert config.sliding_window == theirs.sliding_window
    assert "sliding_window" not in config.to_dict()  # a later change of `local_attention` would not reach it
    decoder = ModernBertDecoderConfig.from_dict(values)
    assert decoder.sliding_window == transformers.ModernBertDecoderConfig.from_dict(values).sliding_window
    assert decoder.reach("sliding_attention") == Reach(decoder.sliding_window - 1, 0)
    assert ModernBertConfig.from_dict({"sliding_window": 50, "local_attention": 101}).local_attention == 101
    assert ModernBertConfig.from_dict({"sliding_window": None}).local_attention == 128


def test_a_decoder_without_special_ids_is_read_here_and_in_transformers(tmp_path):
    names = [f"{name}_token_id" for name in ("pad", "bos", "cls", "sep", "eos")]
    config = ModernBertDecoderConfig(
        **dict.fromkeys(names), vocab_size=64, hidden_size=16, intermediate_size=16, num_attention_heads=1,
        num_hidden_layers=2,
    )  # fmt: skip
    model = ModernBertDecoderForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).replace(dtype=None, extra={}) == config
    theirs = transformers.ModernBertDecoderForCausalLM.from_pretrained(
        tmp_path, rope_parameters=config.rope_parameters
    ).eval()
    ids = torch.tensor([[3, 63, 5, 6]])
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "theirs")
    assert AutoConfig.from_pretrained(tmp_path / "theirs").pad_token_id is None


def test_whole_numbers_where_fractions_belong_load_in_transformers(tmp_path):
    ModernBertConfig(initializer_cutoff_factor=2, norm_eps=1, initializer_range=1).save_pretrained(tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).initializer_cutoff_factor == 2.0


def nested(depth):
    return ('{"model_type": "modernbert", "x": ' + "[" * depth + "]" * depth + "}").encode()


NO_JSON = [b"\xff\xfe\xfa", b'{"hidden_size": 1' + b"0" * 5000 + b"}", b"", b"nul\0"]


@pytest.mark.parametrize("content", [*NO_JSON, nested(65), nested(300), nested(100_000)], ids=len)
def test_what_is_no_json_is_one_error(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    reason = ": it is nested more than 64 levels deep" if b"[" in content else ""
    with pytest.raises(CheckpointError, match=f"is not valid JSON{reason}"):
        AutoConfig.from_pretrained(tmp_path)
