"""LoRA adapters that PEFT saved, on our models: the outputs of transformers' models with PEFT, switched and merged."""

import contextlib
import copy
import functools
import json
import pickle
import threading
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import modernbert
import modernbert.models.adapters
from modernbert.errors import CheckpointError, InputError, NotFoundError
from modernbert.quantization.modules import QuantizedLinear
from tests.conftest import model_of, padded_batch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

ENCODER, DECODER = ["Wqkv", "Wo", "Wi"], ["q_proj", "v_proj", "Wo", "Wi"]
KINDS = {
    "plain": {},
    "classifier": {"modules_to_save": ["classifier"], "target_modules": ["Wqkv"]},
    "patterns": {"rank_pattern": {r"layers\.1\.attn\.Wo": 5, "Wi": 2}, "alpha_pattern": {"mlp.Wo": 11}},
    "rank-stabilized": {"use_rslora": True},
    "dora": {"use_dora": True},
    "biases": {"bias": "all", "lora_bias": False},
    "bias of B": {"lora_bias": True},
    "some layers": {"layers_to_transform": [1, 3], "layers_pattern": "layers"},
    "a pattern": {"target_modules": r".*layers\.[02]\.mlp\.(Wi|Wo)"},
    "all linear": {"target_modules": "all-linear"},
}  # fmt: skip
CASES = [
    *(("ModernBertForSequenceClassification", kind) for kind in KINDS),
    *((name, "plain") for name in ("ModernBertModel", "ModernBertForMaskedLM", "ModernBertDecoderForCausalLM")),
    *((name, "classifier") for name in ("ModernBertForTokenClassification", "ModernBertForQuestionAnswering")),
    ("ModernBertDecoderForSequenceClassification", "classifier"),
    ("ModernBertDecoderModel", "dora"),
]
BIASED = {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True, "decoder_bias": True}


@torch.no_grad()
def shaken(model, seed):
    """Random values in everything that PEFT trains."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * (0.02 if "magnitude" in name else 0.2))
    return model


def options_of(name, kind):
    options = {"r": 3, "lora_alpha": 5, "target_modules": DECODER if "Decoder" in name else ENCODER} | KINDS[kind]
    return options if "Decoder" not in name else {k: v if v != ["Wqkv"] else ["q_proj"] for k, v in options.items()}


def adapted_by_peft(folder, name, kind, seed=1, base=None, **changes):
    """A base of ours in a folder, an adapter on transformers' model of it, saved; the model with it."""
    base = base or folder / "base"
    if not base.exists():
        model_of(name, initializer_range=0.2, **(BIASED if "bias" in kind else {}), **changes).save_pretrained(base)
    theirs = getattr(transformers, name).from_pretrained(base, attn_implementation="eager")
    with warnings.catch_warnings():  # of theirs
        warnings.simplefilter("ignore")
        adapted = shaken(peft.get_peft_model(theirs, peft.LoraConfig(**options_of(name, kind))), seed).eval()
    adapted.save_pretrained(folder / f"{kind}-{seed}")
    return base, folder / f"{kind}-{seed}", adapted


@functools.cache
def batch():
    ids, mask = padded_batch([40, 7, 21])
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def outputs(model):
    """Everything that a model says of the real tokens, or of texts."""
    answer = model(**batch())
    first = answer["last_hidden_state"] if "last_hidden_state" in answer else answer[0]
    real = batch()["attention_mask"].bool()
    return first[real] if first.shape[:2] == real.shape else first


def close(ours, theirs, limit=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=limit, atol=limit * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_gives_the_outputs_of_peft_on_transformers_plain_optimized_and_merged(name, kind, tmp_path):
    base, folder, theirs = adapted_by_peft(tmp_path, name, kind)
    wanted, cls = outputs(theirs), getattr(modernbert, name)
    plain = cls.from_pretrained(base)
    ours = cls.from_pretrained(base, adapter=folder)
    close(outputs(ours), wanted)
    assert not torch.allclose(outputs(plain), wanted, atol=1e-2)
    found = outputs(cls.from_pretrained(folder))  # which names its base
    assert torch.equal(found, outputs(ours))
    close(outputs(ours.optimize_for_inference()), wanted)
    ours.merge_adapter()
    close(outputs(ours), wanted)
    ours.disable_adapters()
    assert torch.equal(outputs(ours), outputs(copy.deepcopy(plain).optimize_for_inference()))
    ours.thaw()
    assert torch.equal(outputs(ours), outputs(plain))
    for key, value in plain.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key]), key
    merged = cls.from_pretrained(base, adapter=folder, merge_adapter=True)
    unmerged = outputs(cls.from_pretrained(base, adapter=folder))
    assert (outputs(merged) - unmerged).norm() <= 2e-6 * unmerged.norm()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(outputs(cls.from_pretrained(tmp_path / "merged")), outputs(merged))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A base with two adapters, each with a classifier of its own."""
    folder, name = tmp_path_factory.mktemp("two"), "ModernBertForSequenceClassification"
    base, first, _ = adapted_by_peft(folder, name, "classifier", 1)
    second = adapted_by_peft(folder, name, "plain", 2, base)[1]
    return base, {"a": first, "b": second}


def load(base, **options):
    return modernbert.AutoModelForSequenceClassification.from_pretrained(base, **options)


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("merged", [False, True])
def test_switching_gives_the_bits_of_each_alone(two, optimized, dtype, merged):
    base, folders = two
    ready = (lambda model: model.optimize_for_inference()) if optimized else (lambda model: model)
    alone = {n: outputs(ready(load(base, adapter=f, dtype=dtype, merge_adapter=merged))) for n, f in folders.items()}
    alone["none"] = outputs(ready(load(base, dtype=dtype)))
    model = ready(load(base, adapter=folders, dtype=dtype))
    if merged:
        model.merge_adapter()
    assert model.active_adapters() == ["a"]
    for name in ("a", "b", "none", "b", "a", "none"):
        if name == "none":
            model.disable_adapters()
            assert model.active_adapters() == []
        else:
            model.set_adapter(name)
        assert torch.equal(outputs(model), alone[name]), name
    model.enable_adapters()
    assert torch.equal(outputs(model), alone["a"])
    assert torch.equal(outputs(pickle.loads(pickle.dumps(model.thaw() or model))), outputs(copy.deepcopy(model)))
    model.delete_adapter("a")
    assert (model.adapter_names, model.active_adapters()) == (["b"], [])
    model.load_adapter(folders["a"], "again")
    assert torch.equal(outputs(ready(model)), alone["a"])
    assert torch.equal(outputs(ready(model.unload())), alone["none"])
    assert model.adapter_names == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimized", [False, True])
def test_a_text_of_a_batch_is_the_text_alone_with_an_adapter(two, optimized, dtype):
    model = load(two[0], adapter=two[1]["b"], dtype=dtype)
    model = model.optimize_for_inference() if optimized else model
    ids, mask = padded_batch([300, 7, 31, 200])  # together more rows than are added at once
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        for text, real in enumerate(mask.bool()):
            assert torch.equal(model(ids[text][real][None]).logits[0], whole[text])
    trained = model(ids, attention_mask=mask).logits  # where gradients are wanted, nothing is added in place
    torch.testing.assert_close(trained.detach(), whole, rtol=0, atol=1e-5 if dtype == "float32" else 0.1)


@pytest.mark.filterwarnings("ignore")
def test_several_adapters_add_up_as_in_peft(tmp_path):
    base, first, theirs = adapted_by_peft(tmp_path, "ModernBertModel", "plain", 1)
    second = adapted_by_peft(tmp_path, "ModernBertModel", "patterns", 2, base)[1]
    theirs.load_adapter(second, "second")
    theirs.base_model.set_adapter(["default", "second"])
    ours = modernbert.ModernBertModel.from_pretrained(base, adapter={"x": first, "y": second})
    ours.set_adapter(["x", "y"])
    close(outputs(ours), outputs(theirs))
    ours.merge_adapter()
    close(outputs(ours), outputs(theirs))


@pytest.mark.filterwarnings("ignore")
def test_a_classifier_of_an_adapter_says_how_many_labels_there_are(tmp_path, caplog):
    model_of("ModernBertForMaskedLM", initializer_range=0.2).save_pretrained(tmp_path / "base")
    theirs = transformers.ModernBertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["Wi"], modules_to_save=["head"])
    adapted = shaken(peft.get_peft_model(theirs, config), 3).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    caplog.clear()
    for load_it in (
        lambda: load(tmp_path / "base", adapter=tmp_path / "adapter"),
        lambda: load(tmp_path / "adapter"),
        lambda: modernbert.auto.load_as_saved(tmp_path / "adapter"),
    ):
        close(outputs(load_it()), outputs(adapted))
    assert "random values" not in caplog.text


def test_a_quantized_base_takes_adapters_beside_its_weights(two):
    base, folders = two
    how = {"quantization_config": modernbert.QuantizationConfig(scheme="int8-weight-only", min_cosine=0.5)}
    plain, ours = load(base, **how), load(base, adapter=folders["b"], **how)
    assert any(isinstance(module, QuantizedLinear) for module in ours.modules())
    exact = outputs(load(base, adapter=folders["b"]))
    assert (outputs(ours) - exact).abs().mean() < 0.3 * (outputs(plain) - exact).abs().mean()
    with pytest.raises(InputError, match=r"layers\.0\.\S+ cannot be merged; its weight is quantized"):
        ours.merge_adapter()
    ours.optimize_for_inference().disable_adapters()
    assert torch.equal(outputs(ours), outputs(plain.optimize_for_inference()))
    merged = load(base, adapter=folders["b"], merge_adapter=True, **how)
    assert (outputs(merged) - exact).abs().mean() < 0.3 * (outputs(plain) - exact).abs().mean()


def edited(folder, to, **changes):
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    values = json.loads((to / "adapter_config.json").read_text()) | changes
    (to / "adapter_config.json").write_text(json.dumps(values))
    return to


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "has peft_type 'IA3'; adapters are LORA here"),
        ({"target_parameters": ["x"]}, r"has target_parameters \['x'\], which is not served; merge it"),
        ({"alora_invocation_tokens": [1]}, "has alora_invocation_tokens"),
        ({"something_new": 3}, "has something_new 3, which is not served"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights 'pissa', which changes the base's weights"),
        ({"r": 7}, r"has matrices \(3, 48\) and \(\d+, 3\) for \S+; they must be \(7, 48\)"),
        ({"use_dora": True}, "has none as lora magnitude_vector"),
        ({"lora_alpha": "high"}, "has lora_alpha 'high'; it must be a number"),
        ({"rank_pattern": {"(": 4}}, "has the rank_pattern '\\('"),
        ({"alpha_pattern": {"(a+)+b": 4}}, r"has the alpha_pattern '\(a\+\)\+b'; a group in it may not be repeated"),
        ({"rank_pattern": [4]}, r"has rank_pattern \[4\]; it must be numbers by layers' names"),
    ],
)  # fmt: skip
def test_what_would_change_the_result_is_refused_by_its_name(two, tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        load(two[0], adapter=edited(two[1]["b"], tmp_path / "x", **changes))


def test_what_callers_get_wrong_is_one_line(two, tmp_path):
    base, folders = two
    model = load(base)
    with pytest.raises(InputError, match=r"no adapter is loaded; load_adapter\(folder\) loads one"):
        model.set_adapter("a")
    model.load_adapter(folders["a"], "a")
    for call, message in {
        lambda: model.set_adapter("c"): "adapter_name is 'c'; there are a",
        lambda: model.load_adapter(folders["b"], "a"): "adapter_name is 'a', which is taken",
        lambda: model.save_pretrained(tmp_path / "x"): r"save_pretrained is for the weights alone, .* adapters \(a\)",
        lambda: model.prune_heads({0: [1]}): "prune_heads is for the weights alone",
        lambda: modernbert.quantize(model, "int8"): "quantize is for the weights alone",
        lambda: load(base, adapter=[folders["a"]]): "adapter is .*; give a folder or repository, or a dict",
        lambda: load(base, adapter=folders, merge_adapter=True): "merge_adapter is True with 2 adapters",
        lambda: load(folders["a"], adapter=folders["b"]): "is an adapter itself, and adapter is given, too",
    }.items():
        with pytest.raises(InputError, match=message):
            call()
    assert not (tmp_path / "x").exists()
    before = outputs(model)
    with pytest.raises(CheckpointError, match=r"has matrices .* for q?\S*; they must be"):
        model_of("ModernBertModel", hidden_size=24).load_adapter(folders["b"])
    with pytest.raises(CheckpointError, match=r"adapts \S*layers\.0\.attn\.Wqkv, and there is no such layer"):
        model_of("ModernBertDecoderModel").load_adapter(folders["b"])
    with pytest.raises(NotFoundError, match=r"holds no adapter_config\.json"):
        model.load_adapter(base)
    gone = edited(folders["b"], tmp_path / "gone", base_model_name_or_path=str(tmp_path / "nowhere"))
    with pytest.raises(NotFoundError, match=r"adapter of .*nowhere', and there is no such folder here; give its base"):
        load(gone)
    nameless = edited(folders["b"], tmp_path / "nameless", base_model_name_or_path=None)
    with pytest.raises(CheckpointError, match="with base_model_name_or_path None; give its base"):
        load(nameless)
    (gone / "adapter_model.safetensors").rename(gone / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"holds its weights as adapter_model.bin, a pickle"):
        load(base, adapter=gone)
    assert torch.equal(outputs(model), before)


def test_every_odd_value_in_an_adapter_s_files_is_an_error_of_ours_or_an_adapter(two, tmp_path):
    base, folder = two[0], edited(two[1]["a"], tmp_path / "x")
    config = json.loads((folder / "adapter_config.json").read_text())
    for name in config:
        for value in (None, True, -1, 0, 2.5, "x", [], [1], {}, {"a": "b"}, {"Wqkv": -2}):
            (folder / "adapter_config.json").write_text(json.dumps({**config, name: value}))
            with contextlib.suppress(CheckpointError, NotFoundError):
                modernbert.models.adapters.AdapterFolder(folder).fit(load_once(base))
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        for odd in (None, tensor.int(), tensor.flatten(), tensor[:0], tensor.unsqueeze(0)):
            changed = {n: t for n, t in {**tensors, name: odd}.items() if t is not None}
            save_file(changed, folder / "adapter_model.safetensors")
            with contextlib.suppress(CheckpointError):
                load_once(base).load_adapter(folder, f"{name} {odd is None}")
                assert odd is None or odd.shape == tensor.shape
    (folder / "adapter_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        load(base, adapter=folder)


@functools.cache
def load_once(base):
    return load(base)


def test_a_tied_output_is_adapted_beside_its_weight_and_not_merged(tmp_path):
    base = tmp_path / "base"
    model = model_of("ModernBertForMaskedLM", initializer_range=0.2)
    model.save_pretrained(base)
    torch.manual_seed(0)
    low = {"lora_A": torch.randn(2, 48), "lora_B": torch.randn(96, 2)}
    (tmp_path / "adapter").mkdir()
    tensors = {f"base_model.model.decoder.{k}.weight": v for k, v in low.items()}
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": str(base)}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    ours = modernbert.ModernBertForMaskedLM.from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        states = model.head(model.model(**batch()).last_hidden_state[batch()["attention_mask"].bool()])
    wanted = outputs(model) + states @ low["lora_A"].T @ low["lora_B"].T
    close(outputs(ours), wanted)
    close(outputs(ours.optimize_for_inference()), wanted)
    with pytest.raises(InputError, match="an adapter of decoder cannot be merged; its weight is the token embedding's"):
        ours.merge_adapter()
    close(outputs(ours), wanted)


def test_adapters_move_and_are_cast_with_their_model(two):
    model = load(two[0], adapter=two[1]["b"]).to(torch.float64)
    exact = outputs(model)
    assert exact.dtype == torch.float64
    close(outputs(model.to(torch.float32)).double(), exact)
    assert all(low.a_RI.dtype == torch.float32 for module in model.modules() for low in getattr(module, "low", ()))


@pytest.mark.parametrize("merged", [False, True])
def test_the_base_is_cast_along_while_something_stands_for_its_parameters(tmp_path, merged):
    base, folder, _ = adapted_by_peft(tmp_path, "ModernBertForSequenceClassification", "classifier")
    model, plain = load(base, adapter=folder), load(base).to(torch.float64)
    if merged:
        model.merge_adapter()
    model.to(torch.float64).disable_adapters()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert torch.equal(outputs(model), outputs(plain))


def test_threads_may_switch_at_once(two):
    model, failed = load(two[0], adapter=two[1]), []

    def switch():
        try:
            for name in [*two[1]] * 10:
                model.set_adapter(name)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=switch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for name, folder in two[1].items():
        model.set_adapter(name)
        assert torch.equal(outputs(model), outputs(load(two[0], adapter=folder)))


@pytest.mark.parametrize("name", [3, None, ""])
def test_names_that_are_none_are_refused(two, name):
    model = load(two[0])
    with pytest.raises(InputError, match=r"adapter_name is .*; it must be a name"):
        model.load_adapter(two[1]["a"], name)
    model.load_adapter(two[1]["a"])
    for call in (model.set_adapter, model.delete_adapter):
        with pytest.raises(InputError, match="adapter_name is "):
            call(name)
    assert model.active_adapters() == ["default"]
