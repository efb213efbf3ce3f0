"""Quantized models: near the float ones, a text its own, saved and loaded; the gate that measures and refuses."""

import copy
import importlib.util
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import modernbert
from modernbert import AutoModelForCausalLM, AutoModelForMaskedLM, BitsAndBytesConfig, QuantizationConfig, Tokenizer
from modernbert.errors import CheckpointError, QuantizationError
from modernbert.pipelines import pipeline, small_model
from modernbert.quantization import gate
from modernbert.quantization.calibration import own_texts
from modernbert.quantization.modules import QuantizedEmbedding, QuantizedLinear, quantized_modules
from modernbert.quantization.options import SCHEMES, Record, resolve
from modernbert.quantization.weight import PackedIntegers
from tests.conftest import model_of, padded_batch
from tests.heads import CLASSES


def made(name, **changes):
    return model_of(name, **{"hidden_size": 64, "num_attention_heads": 2, "initializer_range": 0.1, **changes})


def batch(lengths=(40, 3, 17)):
    return padded_batch(lengths)


def outputs_of(model, ids, mask):
    if type(model).__name__ == "ModernBertForMultipleChoice":
        ids, mask = ids[None], mask[None]
    out = model(input_ids=ids, attention_mask=mask)
    out = next(out[name] for name in ("logits", "start_logits", "last_hidden_state") if out.get(name) is not None)
    return out.clamp(min=-1e3)  # of padding, the lowest number that there is


@pytest.fixture(scope="module", params=["encoder", "decoder"])
def small(request):
    """One of the package's models, floats and 8 bits, its tokenizer, and texts that neither was chosen by."""
    folder = small_model(request.param)
    kind = AutoModelForMaskedLM if request.param == "encoder" else AutoModelForCausalLM
    model, tokenizer = kind.from_pretrained(folder, dtype="float32"), Tokenizer.from_pretrained(folder)
    text = (Path(__file__).parents[2] / "LICENSE").read_text()
    prose = "The old house stood at the end of the lane, and nobody had lived there since the war. " * 3
    rows = tokenizer([prose, text[:1000], text[3000:3300], "Yes."], padding=True, return_tensors="pt")
    return model, kind.from_pretrained(folder, dtype="float32", quantization_config="int8"), tokenizer, rows


def test_8_bits_are_near_at_every_token_of_texts_unseen(small):
    model, quantized, _, rows = small
    with torch.no_grad():
        a, b = (m.base_model(rows["input_ids"], rows["attention_mask"]).last_hidden_state for m in (model, quantized))
    real = rows["attention_mask"].bool()
    assert torch.cosine_similarity(a[real], b[real], dim=-1).min() >= 0.999
    record = quantized.quantization
    assert record.measured["cosine_min"] >= 0.999
    assert record.measured["texts"] == "the package's own"
    assert len(record.measured["layers"]) == model.config.num_hidden_layers + 1
    assert quantized.num_parameters() == model.num_parameters()
    assert quantized.num_parameters(exclude_embeddings=True) == model.num_parameters(exclude_embeddings=True)


@pytest.mark.parametrize("fused", [False, True])
def test_a_text_is_its_own_bit_for_bit(small, fused):
    _, quantized, _, rows = small
    model = copy.deepcopy(quantized)
    model = model.optimize_for_inference() if fused else model
    with torch.no_grad():
        whole = model(rows["input_ids"], rows["attention_mask"]).logits
        for i, length in enumerate(rows["attention_mask"].sum(1).tolist()):
            alone = model(rows["input_ids"][i : i + 1, :length]).logits
            assert torch.equal(alone[0], whole[i, :length])


@pytest.mark.parametrize(("scheme", "most"), [("int8", 0.27), ("int4", 0.16)])
def test_files_are_as_small_as_promised(small, scheme, most, tmp_path):
    model, quantized, tokenizer, _ = small
    if scheme == "int4":
        quantized = modernbert.quantize(copy.deepcopy(model), scheme, tokenizer=tokenizer)
    quantized.save_pretrained(tmp_path)
    floats = sum(p.numel() * 4 for p in model.parameters())
    assert (tmp_path / "quantized.safetensors").stat().st_size <= most * floats


OF_CLASSES = [(name, "int8") for name in CLASSES]
OF_CLASSES += [(name, other) for name in ("ModernBertModel", "ModernBertDecoderForCausalLM") for other in SCHEMES]


@pytest.mark.parametrize(("name", "scheme"), dict.fromkeys(OF_CLASSES))
def test_every_head_saved_and_loaded_gives_the_same_bits(name, scheme, tmp_path):
    model = made(name, attention_bias=name.endswith("Model"), mlp_bias=name.endswith("Model"))
    before = outputs_of(model, *batch())
    config = QuantizationConfig(scheme=scheme, min_cosine=0.5)
    assert modernbert.quantize(model, config) is model
    after = outputs_of(model, *batch())
    assert not torch.equal(after, before)
    assert isinstance(model.get_input_embeddings(), QuantizedEmbedding)
    model.save_pretrained(tmp_path / "a")
    loaded = type(model).from_pretrained(tmp_path / "a")
    assert torch.equal(outputs_of(loaded, *batch()), after)
    loaded.optimize_for_inference()
    fused = outputs_of(loaded, *batch())
    assert torch.nn.functional.cosine_similarity(fused.flatten(), after.flatten(), dim=0) > 0.99
    loaded.save_pretrained(tmp_path / "b")
    for file in ("quantized.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    copied = copy.deepcopy(loaded)
    assert torch.equal(outputs_of(copied, *batch()), after)
    other = made(name, attention_bias=name.endswith("Model"), mlp_bias=name.endswith("Model"), initializer_range=0.2)
    expected = outputs_of(modernbert.quantize(other, config), *batch())
    copied.load_state_dict(other.state_dict())
    assert torch.equal(outputs_of(copied, *batch()), expected)
    assert not torch.equal(expected, after)
    assert copied.bfloat16().dtype == torch.bfloat16
    assert outputs_of(copied, *batch()).isfinite().all()
    assert outputs_of(copied.half(), *batch()).isfinite().all()
    with pytest.raises(RuntimeError, match="Missing key"):
        copied.load_state_dict({n: t for n, t in other.state_dict().items() if not n.endswith("weight_scale")})


@pytest.mark.parametrize("channels", ["norms", "columns", "gates", "outputs"])
def test_channels_fifty_times_larger(channels):
    """What trained models are known for: a few inputs that reach far beyond the others."""
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 384, "num_hidden_layers": 6}
    model = made("ModernBertModel", **sizes, initializer_range=0.02)
    few = torch.tensor([5, 77, 130])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if channels == "norms" and "norm" in name and "final" not in name:
                parameter[few] *= 50
            if channels == "columns" and name.endswith("Wi.weight"):
                parameter[:, few] *= 50
            if channels == "gates" and name.endswith("Wi.weight"):
                parameter[384 + few] *= 50
            if channels == "outputs" and name.endswith("Wo.weight"):
                parameter[few] *= 50
    ids, mask = batch((120, 31, 64))
    before = model(ids, mask).last_hidden_state[mask.bool()]
    modernbert.quantize(model)
    after = model(ids, mask).last_hidden_state[mask.bool()]
    assert torch.cosine_similarity(before, after, dim=-1).min() >= 0.999


def test_each_text_is_read_once_as_floats_and_each_weight_laid_out_once_a_rounding(monkeypatch):
    """What quantizing takes is passes over texts and layouts of weights."""
    passes, laid_out = [], []
    look, lay_out = gate.look, PackedIntegers.__init__
    monkeypatch.setattr(
        gate, "look", lambda model, batch: passes.append(bool(quantized_modules(model))) or look(model, batch)
    )

    def noted(self, weight, *more):
        laid_out.append(weight.shape)
        lay_out(self, weight, *more)

    monkeypatch.setattr(PackedIntegers, "__init__", noted)
    model, tokenizer = made("ModernBertModel", vocab_size=4000), Tokenizer.from_pretrained(small_model())
    said = []
    modernbert.quantize(model, QuantizationConfig(min_cosine=0.5), tokenizer=tokenizer, report=said.append)
    linear = [m for m in quantized_modules(model).values() if isinstance(m, QuantizedLinear)]
    batches = passes.count(True)
    assert passes == batches * [False] + batches * [True], said
    assert len(laid_out) == len(linear) > 0, said


def test_generation_with_a_cache_is_generation_without():
    model = made("ModernBertDecoderForCausalLM")
    modernbert.quantize(model, QuantizationConfig(scheme="int8", min_cosine=0.5))
    ids = torch.randint(3, 90, (2, 11))
    for fused in (False, True):
        model = model.optimize_for_inference() if fused else model
        cached, plain = (
            model.generate(ids, max_new_tokens=8, min_new_tokens=8, use_cache=use, pad_token_id=0)
            for use in (True, False)
        )
        assert torch.equal(cached, plain)


def test_the_gate_refuses_and_leaves_the_model_as_it_was():
    model = made("ModernBertForMaskedLM")
    state = copy.deepcopy(model.state_dict())
    config = QuantizationConfig(scheme="int4", min_cosine=0.99999, most_kept=0.1)
    with pytest.raises(QuantizationError, match=r"int4 was refused: the worst token's cosine is 0\.\d+"):
        modernbert.quantize(model, config)
    assert not quantized_modules(model)
    assert model.quantization is None
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.decoder.weight is model.get_input_embeddings().weight
    model.train()


def test_the_gate_gives_more_bits_where_they_are_needed(tmp_path):
    model = AutoModelForMaskedLM.from_pretrained(small_model(), dtype="float32")
    said = []
    config = QuantizationConfig(scheme="int8", min_cosine=0.99965, most_kept=1.0)
    modernbert.quantize(model, config, tokenizer=Tokenizer.from_pretrained(small_model()), report=said.append)
    assert model.quantization.measured["cosine_min"] >= 0.99965
    finer = model.quantization.finer
    assert set(finer.values()) == {"int8 in groups of 32", "bfloat16"}
    assert any("rounded more finely" in line for line in said)
    kept = [name for name, how in finer.items() if how == "bfloat16"]
    assert kept
    assert not any(isinstance(model.get_submodule(name), QuantizedLinear) for name in kept)
    before = outputs_of(model, *batch())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(outputs_of(loaded, *batch()), before)
    assert loaded.quantization == model.quantization


def test_what_cannot_be_reached_is_refused_though_every_weight_may_have_more_bits():
    with pytest.raises(QuantizationError):
        modernbert.quantize(made("ModernBertModel"), QuantizationConfig(min_cosine=1.0, most_kept=1.0))


def test_a_bare_checkpoint_in_a_model_with_a_head(tmp_path):
    modernbert.quantize(made("ModernBertModel"), QuantizationConfig(min_cosine=0.5)).save_pretrained(tmp_path / "bare")
    model = modernbert.ModernBertForMaskedLM.from_pretrained(tmp_path / "bare")
    assert not any(p.is_meta or p.requires_grad for p in model.parameters())
    with torch.no_grad():
        before = model(*batch()).logits
        model.decoder.bias += 1.0
        torch.testing.assert_close(model(*batch()).logits[0], before[0] + 1.0)
    model.save_pretrained(tmp_path / "whole")
    fresh = modernbert.ModernBertForMaskedLM(modernbert.ModernBertConfig.from_pretrained(tmp_path / "whole"))
    assert fresh.train().quantization is None
    fresh.save_pretrained(tmp_path / "fresh")
    assert "quantization_config" not in json.loads((tmp_path / "fresh" / "config.json").read_text())
    inner = made("ModernBertForMaskedLM", tie_word_embeddings=False)
    modernbert.quantize(inner.model, QuantizationConfig(min_cosine=0.5))
    with pytest.raises(ValueError, match="quantize the whole model to save it"):
        inner.save_pretrained(tmp_path / "inner")


def test_training_is_refused_with_the_reason(tmp_path):
    model = modernbert.quantize(made("ModernBertForSequenceClassification"), QuantizationConfig(min_cosine=0.5))
    with pytest.raises(ValueError, match=r"is quantized \(int8\): whole numbers have no gradient"):
        model.train()
    model.eval()
    for call in (lambda: model.resize_token_embeddings(120), lambda: model.prune_heads({0: [0]})):
        with pytest.raises(ValueError, match="needs float weights"):
            call()
    with pytest.raises(ValueError, match="quantized already, as int8"):
        modernbert.quantize(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantized already, as int8"):
        type(model).from_pretrained(tmp_path, quantization_config="int4")


def test_gradients_to_what_goes_in_are_those_of_the_floats_it_stands_for():
    model = modernbert.quantize(made("ModernBertForSequenceClassification"), QuantizationConfig(min_cosine=0.5))
    embeds = torch.randn(1, 9, 64, requires_grad=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    out = model(inputs_embeds=embeds).logits
    out.sum().backward()
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embeds).logits, out)
    plain = made("ModernBertForSequenceClassification")
    dense = {
        n: t for n, t in model.state_dict().items() if not n.endswith(("weight_scale", "outliers", "outlier_weight"))
    }
    dense |= {f"{n}.weight": module.weight for n, module in quantized_modules(model).items()}
    plain.load_state_dict(dense)
    plain(inputs_embeds=(other := embeds.detach().clone().requires_grad_())).logits.sum().backward()
    assert torch.cosine_similarity(embeds.grad.flatten(), other.grad.flatten(), dim=0) > 0.98


@pytest.mark.parametrize(
    ("given", "scheme"),
    [
        ("int4", "int4"),
        ({"scheme": "int8-weight-only"}, "int8-weight-only"),
        (BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0), "int8"),
        (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), "int4"),
        ({"load_in_8bit": True, "load_in_4bit": False}, "int8"),
    ],
)
def test_what_callers_name(given, scheme):
    assert resolve(given).scheme == scheme


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: resolve("int3"), "scheme is 'int3'; choose one of int8, int8-weight-only, int4"),
        (lambda: resolve(8), "quantization_config is 8; give one of int8"),
        (lambda: QuantizationConfig(min_cosine=2), "min_cosine is 2; it must be a number of at least 0 and at most 1"),
        (lambda: QuantizationConfig(tokens=1), "tokens is 1; it must be a whole number of at least 64"),
        (BitsAndBytesConfig, "give either load_in_8bit=True or load_in_4bit=True"),
        (lambda: modernbert.quantize(made("ModernBertModel"), texts=["a"]), "texts need a tokenizer"),
    ],
)
def test_what_means_nothing_is_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_checkpoints_of_others_and_of_later_versions_are_refused(tmp_path):
    modernbert.quantize(made("ModernBertModel"), QuantizationConfig(min_cosine=0.5)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for change, message in (
        ({"quant_method": "bitsandbytes"}, "was quantized by 'bitsandbytes'"),
        ({"format": 2}, "quantized in format 2"),
        ({"scheme": "int2"}, "scheme 'int2'"),
    ):
        path.write_text(json.dumps({**values, "quantization_config": {**values["quantization_config"], **change}}))
        with pytest.raises(CheckpointError, match=message):
            modernbert.ModernBertModel.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError):
        Record.from_dict({})


def test_transformers_refuses_our_format(tmp_path):
    from transformers import AutoModel

    modernbert.quantize(made("ModernBertModel"), QuantizationConfig(min_cosine=0.5)).save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModel.from_pretrained(tmp_path)


def test_a_checkpoint_without_a_tokenizer_is_measured_on_random_ids(tmp_path, caplog):
    made("ModernBertModel").save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        model = modernbert.ModernBertModel.from_pretrained(tmp_path, quantization_config="int8", dtype="bfloat16")
    assert "has no tokenizer.json" in caplog.text
    assert model.quantization.measured["texts"] == "ids drawn at random"
    assert model.dtype == torch.bfloat16
    assert model(*batch()).last_hidden_state.dtype == torch.bfloat16


def test_pipelines_serve_quantized_models(tmp_path):
    fill = pipeline("fill-mask", quantization_config="int8")
    assert fill.model.quantization.scheme == "int8"
    assert fill("The capital of France is [MASK].")[0]["score"] > 0
    fill.model.save_pretrained(tmp_path)
    fill.tokenizer.save_pretrained(tmp_path)
    again = pipeline("fill-mask", tmp_path)
    assert again("She opened the [MASK].") == fill("She opened the [MASK].")
    embed = pipeline("sentence-embedding", small_model(), dtype="float32", quantization_config="int8")
    assert embed.model.quantization.measured["texts"] == "the package's own"
    plain = pipeline("sentence-embedding", small_model(), dtype="float32")
    texts = own_texts()[:8]
    a, b = (torch.as_tensor(p(texts)) for p in (embed, plain))
    assert torch.cosine_similarity(a, b, dim=-1).min() > 0.999


@pytest.mark.parametrize("bits", [8, 4])
def test_code_that_was_written_for_bitsandbytes(bits):
    where = small_model("decoder")
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    tokenizer = modernbert.AutoTokenizer.from_pretrained(where)
    model = AutoModelForCausalLM.from_pretrained(
        where, dtype=torch.float16, device_map="auto", quantization_config=config
    )
    assert model.quantization.scheme == f"int{bits}"
    inputs = tokenizer("The future of the house is", return_tensors="pt").to(model.device)
    with torch.no_grad():
        outputs = model.generate(**inputs, max_length=30, do_sample=True)
    assert inputs.input_ids.shape[1] < outputs.shape[1] <= 30
    assert tokenizer.decode(outputs[0], skip_special_tokens=True).startswith("The future of the house is")


TORCHAO = """
import sys, torch, modernbert
from modernbert.quantization.torchao import quantize_by_torchao
from tests.quantization.test_models import batch, made
for scheme in ("int8", "int8-weight-only"):
    model = made("ModernBertForMaskedLM", hidden_size=128, num_attention_heads=2, initializer_range=0.02)
    ids, mask = batch()
    with torch.no_grad():
        before = model(ids, mask).logits[mask.bool()]
        quantize_by_torchao(model, modernbert.QuantizationConfig(scheme=scheme))
        after = model(ids, mask).logits[mask.bool()]
    assert type(model.model.layers[0].mlp.Wi.weight).__module__.startswith("torchao")
    assert not torch.equal(before, after)
    assert torch.cosine_similarity(before, after, dim=-1).min() > 0.99
    try:
        model.save_pretrained(sys.argv[1])
    except ValueError as error:
        assert "torchao" in str(error)
    else:
        raise AssertionError("it was saved")
"""


def test_torchao_serves_where_a_gpu_would(tmp_path):
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", TORCHAO, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
