"""Both generations of config.json, in and out; impossible values refused by name; unknown keys kept."""

import dataclasses
import json

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from modernbert import AutoConfig, ModernBertConfig
from modernbert.config import Reach
from modernbert.errors import CheckpointError, ConfigError, NotFoundError
from tests.parity.configs import random_config

# What the pages of both generations document.
DEFAULTS = {
    "vocab_size": 50368,
    "hidden_size": 768,
    "intermediate_size": 1152,
    "num_hidden_layers": 22,
    "num_attention_heads": 12,
    "hidden_activation": "gelu",
    "max_position_embeddings": 8192,
    "initializer_range": 0.02,
    "initializer_cutoff_factor": 2.0,
    "norm_eps": 1e-05,
    "norm_bias": False,
    "pad_token_id": 50283,
    "eos_token_id": 50282,
    "bos_token_id": 50281,
    "cls_token_id": 50281,
    "sep_token_id": 50282,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "local_attention": 128,
    "embedding_dropout": 0.0,
    "mlp_bias": False,
    "mlp_dropout": 0.0,
    "decoder_bias": True,
    "classifier_pooling": "cls",
    "classifier_dropout": 0.0,
    "classifier_bias": False,
    "classifier_activation": "gelu",
    "deterministic_flash_attn": False,
    "sparse_prediction": False,
    "sparse_pred_ignore_index": -100,
    "reference_compile": None,
    "repad_logits_with_grad": False,
    "global_rope_theta": 160000.0,
    "local_rope_theta": 10000.0,
    "global_attn_every_n_layers": 3,
}


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
    config = ModernBertConfig.from_dict(
        {
            "model_type": "modernbert",
            "num_hidden_layers": 5,
            "global_attn_every_n_layers": 2,
            "global_rope_theta": 7.0e4,
            "local_rope_theta": 5.0e3,
            "position_embedding_type": "absolute",
            "gradient_checkpointing": False,
            "torch_dtype": "bfloat16",
        }
    )
    full, local = "full_attention", "sliding_attention"
    assert config.layer_types == [full, local, full, local, full]
    assert config.rope_parameters[full]["rope_theta"] == 7.0e4
    assert config.rope_parameters[local]["rope_theta"] == 5.0e3
    assert config.dtype == "bfloat16"
    assert config.extra == {"position_embedding_type": "absolute", "gradient_checkpointing": False}


def test_layer_types_and_rope_parameters_win():
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    rope = {"full_attention": {"rope_theta": 9e4}, "sliding_attention": {"rope_type": "linear", "factor": 2}}
    config = ModernBertConfig(
        num_hidden_layers=3,
        layer_types=kinds,
        global_attn_every_n_layers=3,
        rope_parameters=rope,
        global_rope_theta=1e3,
    )
    assert config.layer_types == kinds
    assert config.global_attn_every_n_layers is None
    assert config.global_rope_theta == 9e4
    assert config.rope_parameters["sliding_attention"] == {
        "rope_type": "linear",
        "factor": 2,
        "rope_theta": 10000.0,
    }
    alternate = ["full_attention", "sliding_attention"] * 2
    assert ModernBertConfig(num_hidden_layers=4, layer_types=alternate).global_attn_every_n_layers == 2


def test_rope_scaling_of_older_files_means_both_layer_types():
    config = ModernBertConfig(rope_scaling={"type": "yarn", "factor": 4.0})
    theirs = transformers.ModernBertConfig(rope_scaling={"rope_type": "yarn", "factor": 4.0})
    assert config.rope_parameters == theirs.rope_parameters
    flat = ModernBertConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5e4})
    assert flat.rope_parameters["sliding_attention"] == {
        "rope_type": "dynamic",
        "factor": 2.0,
        "rope_theta": 5e4,
    }


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
    "pad_token_id is -1": {"pad_token_id": -1},
    "sep_token_id is 'x'": {"sep_token_id": "x"},
    r"mlp_dropout is 1.5; it must lie in \[0, 1\)": {"mlp_dropout": 1.5},
    "norm_eps is 0": {"norm_eps": 0},
    "hidden_activation is 'gleu'": {"hidden_activation": "gleu"},
    "classifier_pooling is 'max'": {"classifier_pooling": "max"},
    "problem_type is 'ranking'": {"problem_type": "ranking"},
    "rope_type 'longrope'": {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
    "has factor None": {"rope_scaling": {"rope_type": "linear"}},
    "has factor 0.5": {"rope_scaling": {"rope_type": "yarn", "factor": 0.5}},
    "has rope_theta 'big'": {"global_rope_theta": "big"},
    "rope_parameters has": {"rope_parameters": {"full_attention": {}, "other": {}}},
    "num_labels is 3 and id2label names 2": {"num_labels": 3, "id2label": {0: "a", 1: "b"}},
    "num_labels is 0": {"num_labels": 0},
    r"id2label has the ids \[0, 2\]": {"id2label": {0: "a", 2: "b"}},
    r"label2id has the ids \[0, 5\]": {"label2id": {"a": 0, "b": 5}},
    "pruned_heads names layer 30": {"pruned_heads": {30: [0]}},
    "pruned_heads names heads": {"pruned_heads": {0: [12]}},
}


@pytest.mark.parametrize("message", IMPOSSIBLE)
def test_impossible_values_are_refused_by_name(message):
    with pytest.raises(ConfigError, match=message):
        ModernBertConfig(**IMPOSSIBLE[message])


def test_nothing_changes_after_construction_and_unknown_arguments_are_refused():
    config = ModernBertConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 4
    with pytest.raises(TypeError, match="hiden_size"):
        ModernBertConfig(hiden_size=4)
    with pytest.raises(TypeError):
        ModernBertConfig(1000)


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


@pytest.mark.parametrize("seed", range(8))
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


def test_functions_serve_as_activations_but_cannot_be_saved(tmp_path):
    config = ModernBertConfig(hidden_activation=abs)
    with pytest.raises(ConfigError, match="hidden_activation is a function"):
        config.save_pretrained(tmp_path)


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
