"""Folders: written here and by transformers, whole and in shards, old and new; damaged ones refused by name."""

import copy
import json
import logging
import re

import pytest
import safetensors.torch
import torch
import transformers

import modernbert
from modernbert import ModernBertForMaskedLM, ModernBertModel
from modernbert.errors import CheckpointError, ConfigError, InputError, NotFoundError
from modernbert.io.checkpoint import _bytes
from modernbert.io.files import replace_folder, replacing, write_text
from modernbert.models.placement import warn_once
from tests.conftest import model_of
from tests.parity.configs import peer, random_batch, random_config


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_save_load_save_gives_the_same_bytes(small_model, tmp_path, size):
    small_model.save_pretrained(tmp_path / "a", max_shard_size=size)
    again = ModernBertForMaskedLM.from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b", max_shard_size=size)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert ("model.safetensors.index.json" in content(tmp_path / "a")) == (size == "20KB")
    x = torch.randint(3, 96, (2, 20))
    assert torch.equal(again(x).logits, small_model(x).logits)


def test_saving_over_shards_leaves_none_behind_and_other_files_alone(small_model, tmp_path):
    (tmp_path / "model-card.md").write_text("mine")
    small_model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-0*.safetensors"))) > 2
    small_model.save_pretrained(tmp_path)
    assert sorted(content(tmp_path)) == ["config.json", "model-card.md", "model.safetensors"]
    small_model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert "model.safetensors" not in content(tmp_path)


@pytest.mark.parametrize("seed", range(6))
def test_what_we_save_loads_in_transformers(seed, tmp_path):
    values = random_config(seed)
    model = ModernBertForMaskedLM(modernbert.ModernBertConfig(**values)).eval()
    model.save_pretrained(tmp_path, max_shard_size="30KB" if seed % 2 else "5GB")
    theirs, report = transformers.ModernBertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids, mask, _ = random_batch(values, seed)
    a, b = theirs.eval()(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits
    assert (a - b)[mask.bool()].abs().max() <= 1e-5


def test_a_folder_of_the_older_generation(tmp_path):
    """What transformers 4.48 writes: intervals and thetas instead of layer types and parameters."""
    values = {**random_config(0), "num_hidden_layers": 5}
    del values["rope_parameters"], values["layer_types"]
    theirs = peer("ModernBertForMaskedLM", values, 3, global_attn_every_n_layers=2, global_rope_theta=5e4)
    theirs.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    for name in ("layer_types", "rope_parameters", "dtype", "tie_word_embeddings"):
        written.pop(name)
    older = {"global_attn_every_n_layers": 2, "global_rope_theta": 5e4, "local_rope_theta": 1e4}
    older["torch_dtype"] = "float32"
    (tmp_path / "config.json").write_text(json.dumps({**written, **older}))
    ours = ModernBertForMaskedLM.from_pretrained(tmp_path)
    ids, mask, _ = random_batch(values, 1)
    difference = (ours(ids, attention_mask=mask).logits - theirs(ids, attention_mask=mask).logits)[mask.bool()]
    assert difference.abs().max() <= 1e-5
    ours.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert all(saved[name] == value for name, value in older.items())


def test_bare_and_headed_checkpoints_load_into_each_other(small_model, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="modernbert")
    x = torch.randint(3, 96, (1, 9))
    small_model.save_pretrained(tmp_path / "headed")
    bare = ModernBertModel.from_pretrained(tmp_path / "headed")
    assert torch.equal(bare(x).last_hidden_state, small_model.model(x).last_hidden_state)
    assert "weights of another head are left out: decoder.bias" in caplog.text
    bare.save_pretrained(tmp_path / "bare")
    names = safetensors.torch.load_file(tmp_path / "bare" / "model.safetensors")
    assert "layers.1.attn.Wqkv.weight" in names
    caplog.clear()
    headed = ModernBertForMaskedLM.from_pretrained(tmp_path / "bare")
    assert torch.equal(headed.model(x).last_hidden_state, bare(x).last_hidden_state)
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "decoder.bias, head.dense.weight, head.norm.weight" in warnings[0]
    assert headed.decoder.weight is headed.get_input_embeddings().weight
    assert headed.head.dense.weight.std() > 0


def test_a_tied_weight_stored_twice_is_taken_once(small_model, tmp_path):
    small_model.save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    tensors["decoder.weight"] = tensors["model.embeddings.tok_embeddings.weight"].clone()
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = ModernBertForMaskedLM.from_pretrained(tmp_path)
    assert again.decoder.weight is again.get_input_embeddings().weight


def damaged(tmp_path, small_model, change):
    small_model.save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_unexpected_and_misshapen_tensors_are_named(small_model, tmp_path, caplog):
    folder = damaged(tmp_path, small_model, lambda t: t.update({"model.layers.9.extra": torch.zeros(1)}))
    ModernBertForMaskedLM.from_pretrained(folder)
    assert "no place in ModernBertForMaskedLM and are left out: model.layers.9.extra" in caplog.text
    folder = damaged(tmp_path, small_model, lambda t: t.update({"head.norm.weight": torch.zeros(5)}))
    with pytest.raises(CheckpointError, match=re.escape("head.norm.weight is (5,), the model wants (48,)")):
        ModernBertForMaskedLM.from_pretrained(folder)


def test_a_refusal_of_many_tensors_is_short_and_shows_no_control_characters(small_model, tmp_path, caplog):
    extra = {f"model.layers.{i}.\x1b[31m\n{'x' * 300}": torch.zeros(1) for i in range(200)}
    folder = damaged(tmp_path, small_model, lambda t: t.update(extra))
    ModernBertForMaskedLM.from_pretrained(folder)
    message = caplog.records[-1].getMessage()
    assert re.search(r"left out: model\.layers\.0\.\\x1b.* and 195 more", message)
    assert len(message) < 600 + len(str(folder))
    assert message.isprintable()
    folder = damaged(tmp_path / "b", small_model, lambda t: [t.update({k: torch.zeros(3)}) for k in list(t)])
    with pytest.raises(CheckpointError, match=r"is \(3,\), the model wants .* and \d+ more") as caught:
        ModernBertForMaskedLM.from_pretrained(folder)
    assert len(str(caught.value)) < 600 + len(str(folder))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.complex64])
def test_weights_that_are_no_floats_are_refused(small_model, tmp_path, dtype):
    folder = damaged(
        tmp_path, small_model, lambda t: t.update({"model.final_norm.weight": torch.ones(48, dtype=dtype)})
    )
    with pytest.raises(CheckpointError, match=r"does not fit .*; model\.final_norm\.weight holds [A-Z]+\d*"):
        ModernBertForMaskedLM.from_pretrained(folder)


@pytest.mark.parametrize("head", ["ModernBertForMaskedLM", "ModernBertDecoderForCausalLM"])
def test_a_tied_weight_under_the_outputs_name_alone_is_the_embedding_too(tmp_path, head):
    """What `safetensors.torch.save_model` writes: of tensors that share memory it keeps one name."""
    cls = getattr(modernbert, head)
    model = model_of(head)
    model.config.save_pretrained(tmp_path)
    safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))
    names = set(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    assert "decoder.weight" in names
    assert "model.embeddings.tok_embeddings.weight" not in names
    x = torch.randint(3, 96, (1, 9))
    again = cls.from_pretrained(tmp_path)
    assert torch.equal(again(x).logits, model(x).logits)
    assert again.decoder.weight is again.get_input_embeddings().weight
    bare = modernbert.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(bare(x).last_hidden_state, model.model(x).last_hidden_state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("model.layers.1.", "model._orig_mod.layers.1._checkpoint_wrapped_module."),
        lambda name: f"_fsdp_wrapped_module.{name}",
    ],
)
@pytest.mark.parametrize("bare", [False, True])
def test_names_that_wrappers_of_pytorch_changed_are_read(small_model, tmp_path, wrap, bare):
    model = small_model.model if bare else small_model
    model.save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    safetensors.torch.save_file({wrap(name): t for name, t in tensors.items()}, tmp_path / "model.safetensors")
    x = torch.randint(3, 96, (1, 9))
    again = ModernBertForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(again.model(x).last_hidden_state, small_model.model(x).last_hidden_state)
    assert torch.equal(
        ModernBertModel.from_pretrained(tmp_path)(x).last_hidden_state, small_model.model(x).last_hidden_state
    )


def test_a_tensor_with_and_without_a_wrappers_name_is_refused(small_model, tmp_path):
    folder = damaged(tmp_path, small_model, lambda t: t.update({"module.head.norm.weight": torch.zeros(48)}))
    with pytest.raises(CheckpointError, match=r"holds tensors twice.*: module\.head\.norm\.weight"):
        ModernBertForMaskedLM.from_pretrained(folder)


def rewritten(folder, **changes):
    values = json.loads((folder / "config.json").read_text())
    for name in ("layer_types", "id2label", "label2id") if changes else ():
        values.pop(name, None)
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


def test_what_a_file_asks_for_is_checked_against_its_weights_before_it_is_made(small_model, tmp_path):
    small_model.save_pretrained(tmp_path)
    rewritten(tmp_path, num_hidden_layers=4000)
    with pytest.raises(CheckpointError, match="num_hidden_layers is 4000, and its weights hold 4 layers"):
        ModernBertForMaskedLM.from_pretrained(tmp_path)
    for name in ("vocab_size", "intermediate_size", "hidden_size"):
        small_model.save_pretrained(tmp_path)
        rewritten(tmp_path, **{name: 48 * 2**22})
        with pytest.raises(CheckpointError, match=r"does not fit .* the model wants \(\d+"):
            ModernBertForMaskedLM.from_pretrained(tmp_path)
    small_model.save_pretrained(tmp_path)
    rewritten(tmp_path, num_hidden_layers=4, num_labels=2**20 * 2)
    with pytest.raises(ConfigError, match="num_labels is 2097152"):
        modernbert.AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_a_classifier_that_a_file_asks_for_and_does_not_hold_is_bounded(small_model, tmp_path, monkeypatch):
    monkeypatch.setattr("modernbert.models.loading._FRESH", 1000)
    small_model.model.save_pretrained(tmp_path)
    rewritten(tmp_path, num_labels=10_000)
    with pytest.raises(
        CheckpointError, match=r"asks for \d{3},\d{3} numbers that it does not hold, for classifier\.bi"
    ):
        modernbert.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    loaded = modernbert.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=20_000)
    assert loaded.config.num_labels == 20_000


def test_float16_on_a_cpu_is_float32_and_said_once(small_model, tmp_path, caplog):
    warn_once.cache_clear()
    small_model.half().save_pretrained(tmp_path)
    exact = {name: p.float() for name, p in small_model.state_dict().items()}
    model = ModernBertForMaskedLM.from_pretrained(tmp_path)
    assert model.dtype == torch.float32
    assert all(torch.equal(p, exact[name]) for name, p in model.state_dict().items())
    for dtype in ("float16", torch.float16, "auto"):
        assert ModernBertForMaskedLM.from_pretrained(tmp_path, dtype=dtype).dtype == torch.float32
    said = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert len(said) == 1
    assert said[0].startswith("float16 is for GPUs: on this CPU the weights are float32")
    assert ModernBertForMaskedLM.from_pretrained(tmp_path, dtype="bfloat16").dtype == torch.bfloat16
    for dtype in ("float3", "int8", 16, ["float32"]):
        with pytest.raises(ValueError, match="dtype is"):
            ModernBertForMaskedLM.from_pretrained(tmp_path, dtype=dtype)


def test_training_weights_of_half_precision_is_warned_of_once(small_model, tmp_path, caplog):
    warn_once.cache_clear()
    small_model.save_pretrained(tmp_path)
    ModernBertForMaskedLM.from_pretrained(tmp_path).train()
    assert not caplog.records
    model = ModernBertForMaskedLM.from_pretrained(tmp_path, dtype="bfloat16")
    assert not caplog.records
    model.train().eval().train()
    assert [r.message for r in caplog.records] == [
        "training with weights in bfloat16, which lose most small steps; load them with dtype='float32'"
    ]


def test_an_index_that_makes_no_sense_is_one_error(small_model, tmp_path):
    small_model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    for where in ([1], {"a": 3, "b": "x"}, {"a": None}, {"a": ["x"]}, "x", {}):
        index.write_text(json.dumps({"weight_map": where}))
        with pytest.raises(CheckpointError, match="no weight_map of tensors' names and files"):
            ModernBertForMaskedLM.from_pretrained(tmp_path)
    for name in ("x" * 5000, "a\x1bb", "a\nb", "a\0b"):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(CheckpointError, match="which can be no file's name") as caught:
            ModernBertForMaskedLM.from_pretrained(tmp_path)
        assert len(str(caught.value)) < 300
        assert str(caught.value).isprintable()


def test_a_folder_is_replaced_once_the_new_one_is_whole(tmp_path, monkeypatch):
    def filled(name, content):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(content)
        return tmp_path / name

    replace_folder(filled("a", "1"), tmp_path / "final")
    replace_folder(filled("b", "2"), tmp_path / "final")
    assert (tmp_path / "final" / "file").read_text() == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    third = filled("c", "3")
    monkeypatch.setattr("modernbert.io.files._exchanged", lambda one, other: False)  # as on systems that cannot
    monkeypatch.setattr("shutil.rmtree", lambda *args, **kwargs: None)
    replace_folder(third, tmp_path / "final")  # the old one is whole until the new one has its name
    assert (tmp_path / ".final.previous" / "file").read_text() == "2"


def test_a_checkpoint_that_lacks_part_of_the_encoder_is_refused(small_model, tmp_path):
    folder = damaged(tmp_path, small_model, lambda t: t.pop("model.layers.2.mlp.Wi.weight"))
    with pytest.raises(CheckpointError, match=r"is incomplete; it lacks layers\.2\.mlp\.Wi\.weight"):
        ModernBertForMaskedLM.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="is incomplete"):
        ModernBertForMaskedLM.from_pretrained(folder, num_hidden_layers=5)


def test_broken_files_are_named(small_model, tmp_path):
    small_model.save_pretrained(tmp_path, max_shard_size="20KB")
    shard = next(tmp_path.glob("model-00002*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100])
    with pytest.raises(CheckpointError, match=re.escape(shard.name)):
        ModernBertForMaskedLM.from_pretrained(tmp_path)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"holds no {shard.name}"):
        ModernBertForMaskedLM.from_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../outside.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside of it"):
        ModernBertForMaskedLM.from_pretrained(tmp_path)
    index.unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        ModernBertForMaskedLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="must be an object"):
        ModernBertForMaskedLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", torch.bfloat16, "torch.bfloat16"])
def test_dtype_and_overrides_on_load(small_model, tmp_path, dtype):
    small_model.save_pretrained(tmp_path)
    model = ModernBertForMaskedLM.from_pretrained(tmp_path, dtype=dtype, num_labels=4)
    assert str(model.dtype).endswith(str(dtype).removeprefix("torch."))
    assert model.config.num_labels == 4
    assert not model.training
    model.save_pretrained(tmp_path)
    assert ModernBertForMaskedLM.from_pretrained(tmp_path).dtype == model.dtype
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == str(model.dtype).removeprefix("torch.")
    assert ModernBertForMaskedLM.from_pretrained(tmp_path, torch_dtype=torch.float32).dtype == torch.float32
    with pytest.raises(TypeError, match="hiden_size"):
        ModernBertForMaskedLM.from_pretrained(tmp_path, hiden_size=4)
    with pytest.raises(ValueError, match="scheme is 'int3'"):
        ModernBertForMaskedLM.from_pretrained(tmp_path, quantization_config="int3")


def test_a_configuration_of_another_kind_is_refused(small_model, tmp_path):
    small_model.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="ModernBertModel takes ModernBertConfig"):
        ModernBertModel({"hidden_size": 4})
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for cls in (modernbert.AutoConfig, modernbert.AutoModel, ModernBertModel):
        with pytest.raises(ConfigError, match="'bert'"):
            cls.from_pretrained(tmp_path)


def test_a_configuration_that_cannot_be_saved_leaves_nothing_behind(small_config, tmp_path):
    model = ModernBertForMaskedLM(small_config.replace(hidden_activation=torch.relu))
    with pytest.raises(ConfigError, match="hidden_activation is a function"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_files_are_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_sizes():
    assert _bytes("5GB") == 5 * 10**9
    assert _bytes("1.5 MiB") == 3 * 2**19
    assert _bytes(7) == 7
    with pytest.raises(ValueError, match="'big'"):
        _bytes("big")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nlabels": 5}, "ModernBertConfig has no nlabels; did you mean num_labels. there are .*vocab_size"),
        ({"hidden_dropout_prob": 0.1}, "ModernBertConfig has no hidden_dropout_prob; .* there are .*mlp_dropout"),
        ({"from_tf": True}, "from_tf is True; weights are read from safetensors alone, so leave it out"),
        ({"gguf_file": "a.gguf"}, "gguf_file is 'a.gguf'; weights are read"),
        ({"key_mapping": {"a": "b"}}, "key_mapping is .*tensors keep their names"),
        ({"is_decoder": True}, "is_decoder is True; it is always False here"),
        ({"variant": "fp16"}, "holds neither model.fp16.safetensors nor model.safetensors.index.fp16.json"),
        ({"load_in_8bit": True}, "int8 was refused"),  # of random weights
    ],
)
def test_arguments_of_loading_that_cannot_be_served_are_named(small_model, tmp_path, given, message):
    small_model.save_pretrained(tmp_path)
    with pytest.raises((TypeError, ValueError), match=message):
        modernbert.AutoModel.from_pretrained(tmp_path, **given)


# What people write from habit, and what has meaning here of it.
HABITS = [
    {"trust_remote_code": True, "low_cpu_mem_usage": True, "resume_download": None, "use_safetensors": True},
    {"load_in_8bit": False, "load_in_4bit": False, "quantization_config": None, "device_map": None, "config": None},
    {"proxies": None, "force_download": False, "mirror": None, "revision": "main", "subfolder": None},
    {"use_auth_token": None, "token": None, "from_tf": False, "from_flax": False, "gguf_file": None},
    {"max_memory": None, "offload_folder": "offload", "_fast_init": True, "weights_only": True, "tp_plan": None},
    {"use_cache": False, "return_dict": False, "output_attentions": True, "attn_implementation": None},
    {"torch_dtype": "auto", "dtype": None, "adapter_kwargs": {}, "key_mapping": None, "name_or_path": "x"},
]


@pytest.mark.parametrize("given", HABITS, ids=lambda given: " ".join(given))
def test_usual_arguments_of_loading_and_saving_are_taken(small_model, tmp_path, given, caplog):
    caplog.set_level("INFO", "modernbert")
    files = small_model.save_pretrained(save_directory=tmp_path, safe_serialization=True, save_function=torch.save)
    assert {*files} == {str(path) for path in tmp_path.iterdir()}
    model = modernbert.AutoModelForMaskedLM.from_pretrained(pretrained_model_name_or_path=tmp_path, **given)
    x = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(model(x, return_dict=True).logits, small_model.eval()(x).logits, rtol=0, atol=1e-5)
    assert model.config.return_dict == given.get("return_dict", True)
    on = {name for name, value in given.items() if value and f"{name} changes nothing: " in caplog.text}
    assert on == {
        n for n in ("trust_remote_code", "low_cpu_mem_usage", "use_safetensors", "_fast_init") if n in given
    } | {n for n in ("offload_folder", "weights_only") if n in given}


def test_loading_says_what_it_found_as_in_transformers(small_model, tmp_path):
    small_model.save_pretrained(tmp_path)
    for name, given in (
        ("AutoModelForMaskedLM", {}),
        ("AutoModel", {}),
        ("AutoModelForTokenClassification", {"num_labels": 7}),
        ("AutoModelForMaskedLM", {"intermediate_size": 80, "ignore_mismatched_sizes": True}),
        ("AutoModelForMaskedLM", {"num_hidden_layers": 1, "layer_types": ["full_attention"]}),
    ):
        model, ours = getattr(modernbert, name).from_pretrained(tmp_path, output_loading_info=True, **given)
        other, theirs = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True, **given)
        assert ours == {**theirs, "error_msgs": []}
        assert type(model).__name__ == type(other).__name__


def test_mismatched_sizes_are_refused_unless_they_are_to_be_ignored(small_model, tmp_path):
    small_model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"with ignore_mismatched_sizes=True they get random values"):
        ModernBertForMaskedLM.from_pretrained(tmp_path, intermediate_size=80)
    model = ModernBertForMaskedLM.from_pretrained(tmp_path, intermediate_size=80, ignore_mismatched_sizes=True)
    assert all(p.isfinite().all() for p in model.parameters())
    assert model.model.layers[0].mlp.Wo.weight.abs().sum() > 0


def test_weights_given_as_a_dictionary(small_model, tmp_path):
    small_model.save_pretrained(tmp_path)
    state = {name: value + 1 for name, value in small_model.state_dict().items()}
    models = [
        ModernBertForMaskedLM.from_pretrained(tmp_path, state_dict=state),
        ModernBertForMaskedLM.from_pretrained(None, config=small_model.config, state_dict=state),
        modernbert.AutoModelForMaskedLM.from_pretrained(None, config=tmp_path, state_dict=state),
    ]
    for model in models:
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    small_model.save_pretrained(tmp_path, state_dict=state)
    again = ModernBertForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(again.model.final_norm.weight, state["model.final_norm.weight"])
    with pytest.raises(InputError, match="is None; give a name or folder, or config and state_dict"):
        ModernBertForMaskedLM.from_pretrained(None)
    del state["model.final_norm.weight"]
    with pytest.raises(CheckpointError, match=r"state_dict is incomplete; it lacks final_norm\.weight"):
        ModernBertForMaskedLM.from_pretrained(None, config=small_model.config, state_dict=state)


@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_a_variant_lies_beside_the_rest_and_transformers_reads_it(small_model, tmp_path, size):
    small_model.save_pretrained(tmp_path)
    changed = copy.deepcopy(small_model)
    changed.model.final_norm.weight.data += 1
    files = changed.save_pretrained(tmp_path, variant="fp16", max_shard_size=size)
    assert any(file.endswith("model.safetensors.index.fp16.json") for file in files) == (size == "20KB")
    for module in (modernbert, transformers):
        for variant, model in ((None, small_model), ("fp16", changed)):
            again = module.ModernBertForMaskedLM.from_pretrained(tmp_path, variant=variant)
            assert torch.equal(again.model.final_norm.weight, model.model.final_norm.weight)


def test_what_only_another_process_writes_and_what_is_made_of_a_configuration(small_model, tmp_path):
    assert small_model.save_pretrained(tmp_path, is_main_process=False) == ()
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError, match="save_pretrained of a ModernBertForMaskedLM has no argument overwrite"):
        small_model.save_pretrained(tmp_path, overwrite=True)
    config = small_model.config
    model = modernbert.AutoModelForMaskedLM.from_config(config, torch_dtype=torch.bfloat16, trust_remote_code=True)
    assert model.dtype == torch.bfloat16
    model = ModernBertForMaskedLM._from_config(config, attn_implementation="eager", return_dict=False)
    assert (model.attn_implementation, model.config.return_dict, config.return_dict) == ("eager", False, True)
    assert isinstance(modernbert.AutoModelForPreTraining.from_config(config), ModernBertForMaskedLM)


def test_a_file_where_a_folder_is_wanted_is_said(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(NotFoundError, match="is a file; give the folder"):
        modernbert.AutoModel.from_pretrained(path)


def test_a_folder_that_is_missing_is_said_and_not_only_that_the_cache_lacks_it():
    with pytest.raises(NotFoundError, match="there is no folder 'runs/nope' on this disk"):
        modernbert.AutoModel.from_pretrained("runs/nope", local_files_only=True)
