"""Checkpoints of the original trainer: a state built by hand under its names, and what must be refused."""

import datetime
import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import modernbert
from modernbert import AutoTokenizer, ModernBertConfig, ModernBertForMaskedLM, ModernBertForSequenceClassification
from modernbert.errors import CheckpointError
from modernbert.training.pretraining.convert import configuration, convert
from tests.commands import called
from tests.conftest import SMALL

# A configuration as the original trainer writes it, of a small model with ModernBERT's architecture.
THEIRS = {
    "architectures": ["FlexBertForMaskedLM"], "model_type": "flex_bert", "hidden_size": 48, "intermediate_size": 64,
    "num_hidden_layers": 4, "num_attention_heads": 3, "hidden_act": "gelu", "vocab_size": 90, "bert_layer": "prenorm",
    "attention_layer": "rope", "mlp_layer": "glu", "embedding_layer": "sans_pos", "normalization": "layernorm",
    "norm_kwargs": {"eps": 1e-5, "bias": False}, "final_norm": True, "embed_norm": True, "skip_first_prenorm": True,
    "attn_qkv_bias": False, "attn_out_bias": False, "mlp_in_bias": False, "mlp_out_bias": False, "decoder_bias": True,
    "head_pred_act": "gelu", "head_pred_bias": False, "head_pred_norm": True, "rotary_emb_base": 160000.0,
    "local_attn_rotary_emb_base": 10000.0, "rotary_emb_interleaved": False, "sliding_window": 16,
    "global_attn_every_n_layers": 3, "init_std": 0.02, "init_cutoff_factor": 2.0, "max_position_embeddings": 128,
    "pad_token_id": 0, "tie_word_embeddings": True,
}  # fmt: skip


def random_model(kind=ModernBertForMaskedLM, **changes):
    sizes = {**SMALL, "vocab_size": 328, "max_position_embeddings": 128, "initializer_range": 0.3}
    config = ModernBertConfig(**{**sizes, **changes})
    return kind(config).eval()


def their_names(model):
    """The weights under the original trainer's names; the output is saved beside the embedding that it is tied to."""
    names = {}
    for name, value in model.state_dict().items():
        if name.startswith("model."):
            rest = name.removeprefix("model.")
            name = f"bert.encoder.{rest}" if rest.startswith("layers.") else f"bert.{rest}"
        names[f"model.{name}"] = value.clone()
    return names


def composer(model, config=THEIRS, tokenizer=None):
    """What Composer's checkpoints hold beside the weights, in small."""
    rng = np.random.RandomState(0).get_state()
    integrations = {"model": {"config": {"file_extension": ".json", "content": config}}, "tokenizer": {}}
    if tokenizer is not None:
        integrations["tokenizer"]["tokenizer"] = {"file_extension": ".json", "content": json.loads(tokenizer)}
    return {
        "state": {
            "model": their_names(model),
            "optimizers": {"StableAdamW": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
            "timestamp": {"Timestamp": {"batch": 100, "total_wct": datetime.timedelta(seconds=5)}},
            "integrations": {"huggingface": integrations},
        },
        "rng": [{"python": (3, (1, 2), None), "numpy": rng, "torch": torch.get_rng_state()}],
    }


@pytest.fixture
def saved(tmp_path, tokenizer):
    model = random_model()
    torch.save(composer(model, tokenizer=tokenizer.to_str()), tmp_path / "ep0-ba100-rank0.pt")
    return model, tmp_path / "ep0-ba100-rank0.pt"


def test_a_composer_checkpoint_becomes_a_folder(saved, tokenizer, tmp_path, capsys):
    model, path = saved
    code, _, err = called(capsys, "convert", path, "--output", tmp_path / "made")
    assert code == 2
    assert "is a pickle" in err
    assert not (tmp_path / "made").exists()
    assert called(capsys, "convert", path, "--output", tmp_path / "made", "--allow-pickle")[0] == 0
    made = ModernBertForMaskedLM.from_pretrained(tmp_path / "made")
    ids = torch.randint(3, 90, (2, 60))
    assert torch.equal(made(ids).logits, model(ids).logits)
    config = made.config
    assert config.layer_types == ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    assert (config.global_rope_theta, config.local_rope_theta, config.local_attention) == (160_000.0, 10_000.0, 16)
    assert config.vocab_size == 328  # the weights', which the original trainer pads
    assert AutoTokenizer.from_pretrained(tmp_path / "made").mask_token == "[MASK]"
    assert config.sep_token_id == tokenizer.token_to_id("[SEP]")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "made").eval()
    torch.testing.assert_close(theirs(input_ids=ids).logits, made(ids).logits, rtol=0, atol=2e-5)


def test_plain_states_classifiers_and_decoders(tmp_path, raw):
    model = random_model(ModernBertForSequenceClassification, num_labels=5)
    save_file(their_names(model), tmp_path / "weights.safetensors")
    (tmp_path / "theirs.json").write_text(json.dumps(THEIRS))
    with pytest.raises(CheckpointError, match="holds no configuration"):
        convert(tmp_path / "weights.safetensors", tmp_path / "made")
    made = convert(
        tmp_path / "weights.safetensors",
        tmp_path / "made",
        config=tmp_path / "theirs.json",
        tokenizer=raw / "tokenizer",
    )
    loaded = ModernBertForSequenceClassification.from_pretrained(made)
    ids = torch.randint(3, 90, (2, 20))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert (made / "tokenizer.json").is_file()
    config = loaded.config  # with the tokenizer's special tokens
    config.save_pretrained(tmp_path / "ours")
    torch.save({f"module._orig_mod.{k}": v for k, v in their_names(model).items()}, tmp_path / "weights.pt")
    again = convert(tmp_path / "weights.pt", tmp_path / "again", config=tmp_path / "ours" / "config.json",
                    allow_pickle=True)  # fmt: skip
    assert (again / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()
    encoder = random_model()
    torch.save(composer(encoder, {**THEIRS, "causal_mask": True}), tmp_path / "decoder.pt")
    decoder = modernbert.AutoModelForCausalLM.from_pretrained(
        convert(tmp_path / "decoder.pt", tmp_path / "decoder", allow_pickle=True)
    )
    assert isinstance(decoder, modernbert.ModernBertDecoderForCausalLM)
    rows = encoder.model.layers[1].attn.Wqkv.weight[48:96]
    assert torch.equal(decoder.model.layers[1].attn.k_proj.weight, rows)


def test_what_is_no_such_checkpoint_is_refused(saved, tmp_path):
    model, _ = saved

    class Other:
        def __reduce__(self):
            return (print, ("ran",))

    (tmp_path / "bad.pt").write_bytes(pickle.dumps({"state": Other()}))
    with pytest.raises(CheckpointError, match="cannot be read as plain data"):
        convert(tmp_path / "bad.pt", tmp_path / "made", allow_pickle=True)
    torch.save({"state": {"model": {"weight": torch.zeros(2)}}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="no name has tok_embeddings"):
        convert(tmp_path / "other.pt", tmp_path / "made", allow_pickle=True)
    torch.save(torch.zeros(2), tmp_path / "tensor.pt")
    with pytest.raises(CheckpointError, match="holds a Tensor; it must be a dictionary"):
        convert(tmp_path / "tensor.pt", tmp_path / "made", allow_pickle=True)
    with pytest.raises(CheckpointError, match="there is no file"):
        convert(tmp_path / "none.pt", tmp_path / "made")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        convert(tmp_path / "cut.safetensors", tmp_path / "made")
    save_file(dict(model.model.state_dict()), tmp_path / "ours.safetensors")
    (tmp_path / "theirs.json").write_text(json.dumps(THEIRS))
    with pytest.raises(CheckpointError, match="not under the original trainer's names"):
        convert(tmp_path / "ours.safetensors", tmp_path / "made", config=tmp_path / "theirs.json")
    for changes, message in (
        ({"rotary_emb_dim": 8}, "has rotary_emb_dim 8"),
        ({"num_hidden_layers": 5}, r"lacks model\.layers\.4"),
        ({"num_hidden_layers": 3}, r"does not know model\.layers\.3"),
        ({"intermediate_size": 32}, "has another shape of"),
        ({"normalization": "rmsnorm"}, "has normalization 'rmsnorm', and ModernBERT has 'layernorm'"),
        ({"attn_out_bias": True}, "they must agree"),
    ):
        torch.save(composer(model, {**THEIRS, **changes}), tmp_path / "bad.pt")
        with pytest.raises(CheckpointError, match=message):
            convert(tmp_path / "bad.pt", tmp_path / "made", allow_pickle=True)
    assert not (tmp_path / "made").exists()


def test_windows_and_thetas_of_the_original_trainer():
    weights = {"model.embeddings.tok_embeddings.weight": torch.zeros(96, 48)}
    without = configuration({**THEIRS, "sliding_window": -1, "local_attn_rotary_emb_base": -1}, weights, "x")
    assert set(without.layer_types) == {"full_attention"}
    assert without.local_rope_theta == without.global_rope_theta == 160_000.0
    everywhere = configuration({**THEIRS, "global_attn_every_n_layers": -1}, weights, "x")
    assert set(everywhere.layer_types) == {"sliding_attention"}


@pytest.mark.parametrize("allowed", [False, True])
def test_a_file_that_is_no_checkpoint_is_said(tmp_path, allowed):
    path = tmp_path / "bank.csv"
    path.write_text("text,label\na,b\n")
    with pytest.raises(CheckpointError, match=r"bank\.csv is no checkpoint: neither a \.safetensors"):
        convert(path, tmp_path / "out", allow_pickle=allowed)
    assert not (tmp_path / "out").exists()
