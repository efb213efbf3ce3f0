"""Folders: written here and by transformers, whole and in shards, old and new; damaged ones refused by name."""

import json
import logging
import re

import pytest
import safetensors.torch
import torch
import transformers

import modernbert
from modernbert import ModernBertForMaskedLM, ModernBertModel
from modernbert.checkpoint import _bytes
from modernbert.errors import CheckpointError, ConfigError
from modernbert.files import replacing, write_text
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
    older = {
        "global_attn_every_n_layers": 2,
        "global_rope_theta": 5e4,
        "local_rope_theta": 1e4,
        "torch_dtype": "float32",
    }
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


def test_unexpected_and_misshapen_tensors_are_named(small_model, tmp_path):
    folder = damaged(tmp_path, small_model, lambda t: t.update({"model.layers.9.extra": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"unexpected: model\.layers\.9\.extra"):
        ModernBertForMaskedLM.from_pretrained(folder)
    folder = damaged(tmp_path, small_model, lambda t: t.update({"head.norm.weight": torch.zeros(5)}))
    with pytest.raises(CheckpointError, match=re.escape("head.norm.weight is (5,), the model wants (48,)")):
        ModernBertForMaskedLM.from_pretrained(folder)


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
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="no weight_map"):
        ModernBertForMaskedLM.from_pretrained(tmp_path)
    index.unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        ModernBertForMaskedLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="must be an object"):
        ModernBertForMaskedLM.from_pretrained(tmp_path)


def test_a_pickle_is_refused_and_never_opened(small_model, tmp_path):
    small_model.config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.")
    with pytest.raises(CheckpointError, match="a pickle, which can run code"):
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
    for load in (
        modernbert.AutoConfig.from_pretrained,
        modernbert.AutoModel.from_pretrained,
        ModernBertModel.from_pretrained,
    ):
        with pytest.raises(ConfigError, match="'bert'"):
            load(tmp_path)


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
