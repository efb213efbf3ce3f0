"""The model surface: inputs refused by name, outputs, surgery, checkpointing, dropout, compiling."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from modernbert import ModernBertForMaskedLM, ModernBertModel, SentenceEncoder
from modernbert.errors import BackendError, ConfigError, InputError
from modernbert.models.placement import resolve_device, resolve_dtype
from modernbert.nn.backbone import _log_once
from modernbert.nn.inputs import Inputs, pack_inputs
from modernbert.nn.layers import Linear
from tests.conftest import SMALL, model_of


def ids(*shape):
    return torch.randint(3, SMALL["vocab_size"], shape)


SPAN = {"cu_seqlens": torch.tensor([0, 5])}  # one packed text of 5 tokens
REFUSED = [
    ({"input_ids": ids(2, 5), "inputs_embeds": torch.randn(2, 5, 48)}, "both of input_ids and inputs_embeds"),
    ({}, "neither of input_ids and inputs_embeds"),
    ({"input_ids": ids(2, 5), "attention_mask": torch.ones(2, 6)}, r"attention_mask has shape \(2, 6\).*\(2, 5\)"),
    ({"input_ids": ids(5)}, r"input_ids has leading shape \(5,\).*cu_seqlens"),
    ({"input_ids": torch.full((1, 3), 96)}, "input_ids holds 96; the vocabulary has ids 0 to 95"),
    ({"input_ids": torch.full((1, 3), -1)}, "input_ids holds -1"),
    ({"input_ids": torch.ones(1, 3)}, "input_ids has dtype torch.float32"),
    ({"inputs_embeds": torch.randn(1, 3, 47)}, "its last dimension must be 48"),
    ({"input_ids": ids(6), **SPAN}, "end at the number of tokens given, 6"),
    ({"input_ids": ids(5), "cu_seqlens": torch.tensor([0, 4, 3, 5])}, "never fall"),
    ({"input_ids": ids(2, 5), **SPAN}, r"\(tokens,\) or \(1, tokens\)"),
    ({"input_ids": ids(5), **SPAN, "max_seqlen": 4}, "max_seqlen is 4"),
    ({"input_ids": ids(5), **SPAN, "batch_size": 2}, "batch_size is 2"),
    ({"input_ids": ids(2, 5), "batch_size": 3}, "batch_size is 3"),
    ({"input_ids": ids(2, 5), "seq_len": 3}, "seq_len is 3"),
    ({"input_ids": ids(2, 5), "indices": torch.arange(5)}, "indices describes packed input"),
    ({"input_ids": ids(5), **SPAN, "indices": torch.arange(5)}, "needs batch_size and seq_len"),
    ({"input_ids": ids(5), **SPAN, "attention_mask": torch.tensor([[1, 1, 0]])}, "cu_seqlens says"),
    ({"input_ids": ids(5), **SPAN, "seq_len": 9}, "seq_len is 9"),
    ({"input_ids": ids(5), **SPAN, "cache_position": torch.arange(5)}, "packed input has none"),
    ({"input_ids": ids(2, 5), "cache_position": torch.arange(1, 6)}, "cache_position is .* it must be 0 to 4"),
    ({"input_ids": ids(2, 5), "sliding_window_mask": torch.ones(5)}, "sliding_window_mask has shape"),
    ({"input_ids": ids(2, 5), "position_ids": torch.zeros(2, 4).long()}, "position_ids has shape"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_contradictory_input_is_refused_by_name(given, message, small_config):
    with pytest.raises(InputError, match=message):
        pack_inputs(Inputs(**given), small_config, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("starts", "indices", "size", "message"),
    [
        ([0, 3], [0, 1, 9], 1, "indices reach to 9"),
        ([0, 2], [1, 1], 1, "indices must rise"),
        ([0, 1, 2], [0, 1], 2, "a row of its own"),
    ],
)
def test_places_in_a_grid_that_cannot_be_are_refused(starts, indices, size, message, small_config):
    where = {"indices": torch.tensor(indices), "batch_size": size, "seq_len": 4}
    with pytest.raises(InputError, match=message):
        ModernBertModel(small_config)(ids(starts[-1]), cu_seqlens=torch.tensor(starts), **where)


def test_labels_of_another_shape_and_unknown_arguments_are_refused(small_model):
    with pytest.raises(InputError, match=r"labels has shape \(2, 4\); with this input it must be \(2, 5\)"):
        small_model(ids(2, 5), labels=ids(2, 4))
    with pytest.raises(TypeError, match="atention_mask"):
        small_model(ids(2, 5), atention_mask=torch.ones(2, 5))


def test_token_type_ids_and_window_masks_change_nothing(small_model):
    x = ids(2, 40)
    plain = small_model(x).logits
    assert torch.equal(small_model(x, token_type_ids=torch.ones_like(x)).logits, plain)
    assert torch.equal(small_model(x, sliding_window_mask=torch.ones(2, 1, 40, 40)).logits, plain)


@pytest.mark.parametrize("name", ["ModernBertForMaskedLM", "ModernBertForTokenClassification"])
def test_packed_input_and_the_way_back_to_a_grid(name):
    model = model_of(name, num_labels=SMALL["vocab_size"], initializer_range=0.3)
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 0, 0]])
    x = ids(3, 4) * mask
    labels = torch.where(mask.bool(), x, -100)
    padded = model(x, attention_mask=mask, labels=labels, output_hidden_states=True)
    indices = mask.flatten().nonzero().squeeze(1)
    flat = x.flatten()[indices]
    cumulative = torch.tensor([0, 3, 6, 8], dtype=torch.int32)
    packed = model(
        flat, cu_seqlens=cumulative, max_seqlen=4, labels=labels.flatten()[indices], output_hidden_states=True
    )
    assert torch.equal(packed.logits, padded.logits[mask.bool()])
    assert torch.equal(packed.loss, padded.loss)
    assert packed.hidden_states[0].shape == (8, 48)
    row = model(flat[None], cu_seqlens=cumulative, labels=labels.flatten()[indices][None])
    assert row.logits.shape == (1, 8, SMALL["vocab_size"])
    for own in (labels, labels.flatten()[indices]):
        where = {"cu_seqlens": cumulative, "indices": indices, "batch_size": 3, "seq_len": 4}
        back = model(flat, **where, labels=own, attention_mask=mask)
        assert torch.equal(back.logits, padded.logits)
        assert torch.equal(back.loss, padded.loss)


def test_logits_with_labels_carry_a_gradient_only_where_asked_for(small_config):
    x = ids(2, 5)
    for keep in (False, True):
        model = ModernBertForMaskedLM(small_config.replace(repad_logits_with_grad=keep))
        out = model(x, labels=x)
        assert out.loss.requires_grad
        assert out.logits.requires_grad == keep
        assert model(x).logits.requires_grad
        assert model(x.flatten(), cu_seqlens=torch.tensor([0, 5, 10]), labels=x.flatten()).logits.requires_grad


def test_sparse_prediction_ignores_its_own_index(small_config):
    model = ModernBertForMaskedLM(small_config.replace(sparse_prediction=True, sparse_pred_ignore_index=-7))
    x = ids(2, 6)
    labels = torch.full_like(x, -7)
    labels[0, 2] = labels[1, 4] = 9
    out = model(x, labels=labels)
    assert out.logits.shape == (2, SMALL["vocab_size"])
    dense = model(x).logits
    torch.testing.assert_close(out.logits, torch.stack([dense[0, 2], dense[1, 4]]))
    assert model(x, labels=labels, sparse_prediction=False).logits.shape == dense.shape
    model.config = small_config
    asked = model(x, labels=labels.masked_fill(labels == -7, -100), sparse_prediction=True)
    assert torch.equal(asked.logits, out.logits)
    assert torch.equal(asked.loss, out.loss)


def test_attention_weights_are_the_eager_backend_s_and_that_is_logged_once(small_config, log):
    x = ids(1, 30)
    _log_once.cache_clear()
    for implementation in ("sdpa", "auto"):
        model = ModernBertModel(small_config, implementation)
        before = model(x).last_hidden_state
        weights = model(x, output_attentions=True).attentions
        assert len(weights) == 4
        torch.testing.assert_close(weights[1].sum(-1), torch.ones(1, 3, 30))
        assert torch.equal(model(x).last_hidden_state, before)
    assert log.text.count("eager for calls that want attention weights") == 1
    packed = ModernBertModel(small_config, "eager")(x[0], cu_seqlens=torch.tensor([0, 10, 30]), output_attentions=True)
    assert packed.attentions[0].shape == (2, 3, 20, 20)


def test_backends_that_cannot_run_say_why(small_config):
    with pytest.raises(BackendError, match="flash_attention_2"):
        ModernBertModel(small_config, "flash_attention_2")


def test_resizing_keeps_old_rows_and_the_tie(small_model):
    x = ids(1, 7)
    before = small_model(x).logits
    assert small_model.resize_token_embeddings(100).num_embeddings == 100
    assert small_model.config.vocab_size == small_model.model.config.vocab_size == 100
    assert small_model.decoder.weight is small_model.get_input_embeddings().weight
    after = small_model(x).logits
    assert after.shape == (1, 7, 100)
    assert torch.equal(after[..., :96], before)
    assert small_model.get_output_embeddings().out_features == 100
    assert small_model(torch.full((1, 3), 99)).logits.isfinite().all()
    small_model.resize_token_embeddings(90, pad_to_multiple_of=8)
    assert small_model.config.vocab_size == 96
    assert torch.equal(small_model(x).logits, before)
    with pytest.raises(ConfigError, match="pad_token_id"):
        ModernBertForMaskedLM(small_model.config.replace(pad_token_id=95)).resize_token_embeddings(50)
    with pytest.raises(ValueError, match="at least 1"):
        small_model.resize_token_embeddings(0)


def test_setting_embeddings_keeps_the_tie(small_model):
    new = torch.nn.Embedding(96, 48)
    small_model.set_input_embeddings(new)
    assert small_model.decoder.weight is new.weight
    with pytest.raises(TypeError, match="no output embeddings"):
        small_model.model.set_output_embeddings(torch.nn.Linear(48, 96))


def test_untied_weights_stay_apart(small_config, tmp_path):
    model = ModernBertForMaskedLM(small_config.replace(tie_word_embeddings=False)).eval()
    assert model.decoder.weight is not model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = ModernBertForMaskedLM.from_pretrained(tmp_path)
    x = ids(1, 5)
    assert torch.equal(again(x).logits, model(x).logits)


def test_pruned_heads_are_those_whose_output_was_zero(small_model, tmp_path):
    """Zeroing a head's part of the output projection and removing the head are the same."""
    x = ids(2, 30)
    with torch.no_grad():
        small_model.model.layers[1].attn.Wo.weight[:, 16:32] = 0
        small_model.model.layers[2].attn.Wo.weight[:, :32] = 0
    before = small_model(x).logits
    small_model.prune_heads({1: [1], 2: [0]})
    small_model.prune_heads({2: [1]})
    small_model.prune_heads({2: [0]})
    assert small_model.model.layers[1].attn.Wqkv.weight.shape == (3 * 32, 48)
    assert small_model.model.layers[2].attn.Wqkv.weight.shape == (3 * 16, 48)
    torch.testing.assert_close(small_model(x).logits, before, rtol=0, atol=1e-5)
    assert small_model.config.pruned_heads == {1: [1], 2: [0, 1]}
    small_model.save_pretrained(tmp_path)
    assert torch.equal(ModernBertForMaskedLM.from_pretrained(tmp_path)(x).logits, small_model(x).logits)
    with pytest.raises(ValueError, match="all 3 heads of layer 2"):
        small_model.prune_heads({2: [2]})
    with pytest.raises(ConfigError, match="layer 9"):
        small_model.prune_heads({9: [0]})


@pytest.mark.parametrize(
    "how",
    [
        {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing_kwargs": {"use_reentrant": True, "preserve_rng_state": False}},
        {"every_n_layers": 2},
        {"offload": True},
    ],
)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_gradient_checkpointing_changes_no_gradient(small_config, implementation, how):
    model = ModernBertForMaskedLM(small_config, implementation).train()
    x = ids(2, 70)
    plain = torch.autograd.grad(model(x, labels=x).loss, list(model.parameters()))
    model.gradient_checkpointing_enable(**how)
    assert model.model.is_gradient_checkpointing
    assert model.model.recompute.plan([0] * 4, x) == [False, "every_n_layers" in how] * 2
    kept = torch.autograd.grad(model(x, labels=x).loss, list(model.parameters()))
    for a, b in zip(plain, kept, strict=True):
        torch.testing.assert_close(a, b)
    model.gradient_checkpointing_disable()
    assert not model.model.is_gradient_checkpointing
    with pytest.raises(ValueError, match=r"gradient_checkpointing_kwargs has nonsense; there are use_reentrant, "):
        model.gradient_checkpointing_enable({"nonsense": True})
    with pytest.raises(ValueError, match=r"every_n_layers is 0; it must be a whole number of at least 1"):
        model.activation_checkpointing_enable(every_n_layers=0)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
def test_activations_are_kept_up_to_a_budget(small_config, share):
    """What the backward pass holds, counted from outside, follows the budget, and no gradient changes."""
    model = ModernBertForMaskedLM(small_config.replace(num_hidden_layers=10), "sdpa").train()
    x = ids(2, 70)
    parameters = list(model.parameters())

    def held_and_gradients():
        storages = {}

        def count(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(x, labels=x).loss
        return sum(storages.values()), torch.autograd.grad(loss, parameters)

    everything, wanted = held_and_gradients()
    model.gradient_checkpointing_enable(keep_bytes=0)
    held_and_gradients()  # measures
    least, _ = held_and_gradients()
    budget = int(share * (everything - least) * 1.01)
    model.gradient_checkpointing_enable(keep_bytes=budget)
    held_and_gradients()
    held, got = held_and_gradients()
    layer = (everything - least) / 10
    assert least + budget - 1.3 * layer <= held <= least + 1.03 * budget + 1
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    with pytest.raises(ValueError, match="keep_bytes is -1"):
        model.gradient_checkpointing_enable(keep_bytes=-1)


@pytest.mark.parametrize("name", ["embedding_dropout", "attention_dropout", "mlp_dropout"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_dropouts_act_in_training_alone(small_config, name, implementation):
    model = ModernBertModel(small_config.replace(**{name: 0.5}), implementation)
    x = ids(1, 60)
    model.train()
    assert not torch.equal(model(x)[0], model(x)[0])
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])


def test_a_cpu_without_native_bfloat16_products():
    code = """
import torch
from modernbert.engines.cpu.onednn import OneDnnWeight
from modernbert.nn.linear import linear
x, w = torch.randn(70, 48).bfloat16(), torch.randn(32, 48).bfloat16()
whole = OneDnnWeight(w, None).product(x)
assert all(torch.equal(linear(x[i:i + n], w), whole[i:i + n]) for i in (0, 3) for n in (1, 5, 64))
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"})


def test_counting_parameters(small_model):
    tied = small_model.get_input_embeddings().weight.numel()
    assert small_model.num_parameters() == sum(p.numel() for p in small_model.parameters())
    assert small_model.num_parameters() - small_model.num_parameters(exclude_embeddings=True) == tied
    assert small_model.dtype == torch.float32
    assert small_model.device == torch.device("cpu")


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_reference_compile_gives_the_same_numbers(small_config):
    torch.manual_seed(0)
    plain = ModernBertModel(small_config).eval()
    compiled = ModernBertModel(small_config.replace(reference_compile=True)).eval()
    compiled.load_state_dict(plain.state_dict())
    with torch.no_grad():
        for length in (5, 9, 33):
            x = ids(1, length)
            torch.testing.assert_close(compiled(x)[0], plain(x)[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(compiled.optimize_for_inference()(x)[0], plain(x)[0], rtol=0, atol=1e-5)


def test_deterministic_attention_reaches_the_backend(small_config):
    assert ModernBertModel(small_config.replace(deterministic_flash_attn=True)).backend.deterministic


def test_fresh_weights_have_the_documented_spread(small_config):
    config = small_config.replace(hidden_size=192, intermediate_size=256, num_attention_heads=3, vocab_size=500)
    model = ModernBertForMaskedLM(config)
    out = 0.02 / (2 * config.num_hidden_layers) ** 0.5
    trimmed = 0.88  # what cutting a normal at two standard deviations leaves of its spread
    expected = {
        "model.embeddings.tok_embeddings.weight": 0.02,
        "model.layers.0.attn.Wqkv.weight": 0.02,
        "model.layers.0.mlp.Wi.weight": 0.02,
        "model.layers.0.attn.Wo.weight": out,
        "model.layers.0.mlp.Wo.weight": out,
        "head.dense.weight": out,
    }
    parameters = dict(model.named_parameters())
    for name, std in expected.items():
        assert abs(parameters[name].std() / (std * trimmed) - 1) < 0.03, name
        assert parameters[name].abs().max() <= 2 * std + 1e-7
    assert not model.decoder.bias.any()
    assert (model.model.final_norm.weight == 1).all()


def test_devices_and_dtypes(log, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    cpu = torch.device("cpu")
    for name in (None, "cpu", -1, "auto", 0, "0", {"": "cpu"}):
        assert resolve_device(name) == cpu
    assert "no GPU; the CPU is used" in log.text
    for name in ("cuda", "cuda:1", "nonsense", {"layer.0": 0}):
        with pytest.raises(ValueError, match="device"):
            resolve_device(name)
    assert resolve_dtype(None, torch.bfloat16, cpu) == torch.bfloat16
    assert resolve_dtype("auto", None, cpu) == torch.float32
    assert resolve_dtype("torch.float32", torch.bfloat16, cpu) == torch.float32
    assert resolve_dtype(torch.float16, None, cpu) in (torch.float32, torch.bfloat16)
    for name in ("int8", "nonsense", "optim"):
        with pytest.raises(ValueError, match="dtype"):
            resolve_dtype(name, None, cpu)


def test_an_output_of_its_own_is_saved(small_model, tmp_path):
    x = ids(1, 7)
    small_model.set_output_embeddings(Linear(48, 96))
    expected = small_model(x).logits
    assert not small_model.config.tie_word_embeddings
    small_model.save_pretrained(tmp_path)
    assert torch.equal(ModernBertForMaskedLM.from_pretrained(tmp_path)(x).logits, expected)


def test_pruning_leaves_what_has_no_gradient_without(small_config):
    model = ModernBertModel(small_config.replace(attention_bias=True)).requires_grad_(False)
    model.prune_heads({0: [1]})
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_one_vector_passes_a_linear_layer():
    layer, x = Linear(12, 5), torch.randn(3, 12)
    assert torch.equal(layer(x[1]), layer(x)[1])


def test_a_sentence_encoder_takes_what_quantizing_gives(small_config, tmp_path, monkeypatch):
    ModernBertModel(small_config).save_pretrained(tmp_path)
    other = ModernBertModel(small_config)
    monkeypatch.setattr("modernbert.quantization.format.Quantized.quantize", lambda self, model, how, source: other)
    assert SentenceEncoder.from_pretrained(tmp_path, quantization_config="int8").model is other
