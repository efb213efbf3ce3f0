"""Adapters by pipelines and by the commands on texts: given beside a model, or as the model itself."""

import json
import warnings

import numpy as np
import pytest
import torch

import modernbert
from modernbert import OnePass, pipeline
from modernbert.errors import InputError
from modernbert.pipelines import small_model
from tests.commands import called

peft = pytest.importorskip("peft")
TEXTS = ["The capital of France is Paris.", "Rivers flow to the sea."]


def adapter_of(folder, cls, base, seed=0, **options):
    """A random adapter on a base, as PEFT saves it."""
    torch.manual_seed(seed)
    model = cls.from_pretrained(base, dtype="float32", **({"num_labels": 3} if "Sequence" in cls.__name__ else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **options))
        adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder, encoder, decoder = tmp_path_factory.mktemp("adapters"), small_model(), small_model("decoder")
    classes = modernbert.ModernBertForSequenceClassification, modernbert.ModernBertModel
    return {
        "classifier": adapter_of(folder / "c", classes[0], encoder, target_modules=["Wqkv"], task_type="SEQ_CLS"),
        "vectors": adapter_of(folder / "v", classes[1], encoder, target_modules=["Wi"], task_type="FEATURE_EXTRACTION"),
        "others": adapter_of(folder / "o", classes[1], encoder, 1, target_modules=["Wo"]),
        "writer": adapter_of(folder / "w", modernbert.ModernBertDecoderForCausalLM, decoder, target_modules=["Wo"]),
    }


def test_a_pipeline_merges_one_adapter_and_switches_among_several(adapters):
    base = small_model()
    plain = pipeline("sentence-embedding", base, dtype="float32")(TEXTS)
    one = pipeline("sentence-embedding", base, adapter=adapters["vectors"], dtype="float32")
    assert one.model.model.adapter_names == []
    beside = pipeline("sentence-embedding", base, adapter=adapters["vectors"], merge_adapter=False, dtype="float32")
    both = pipeline(
        "sentence-embedding", base, dtype="float32", adapter={n: adapters[n] for n in ("vectors", "others")}
    )
    np.testing.assert_allclose(one(TEXTS), beside(TEXTS), rtol=0, atol=1e-5)
    assert np.abs(one(TEXTS) - plain).max() > 0.01
    np.testing.assert_array_equal(both(TEXTS), beside(TEXTS))
    both.model.model.set_adapter("others")
    assert np.abs(both(TEXTS) - beside(TEXTS)).max() > 0.01
    both.model.model.disable_adapters()
    np.testing.assert_array_equal(both(TEXTS), plain)


def test_an_adapter_s_folder_says_its_task_its_base_and_its_tokenizer(adapters):
    by_folder = pipeline(model=adapters["classifier"], dtype="float32")
    assert by_folder.task == "text-classification"
    named = pipeline("text-classification", small_model(), adapter=adapters["classifier"], dtype="float32")
    assert by_folder(TEXTS) == named(TEXTS)
    by_folder.model.config_to_save().save_pretrained(adapters["classifier"])  # as our runs of fine-tuning leave it
    configured = pipeline(model=adapters["classifier"], dtype="float32")
    (adapters["classifier"] / "config.json").unlink()
    assert configured(TEXTS) == named(TEXTS)
    assert configured.model.adapter_names == []
    assert len(by_folder(TEXTS, top_k=9)[0]) == 3
    assert pipeline(model=adapters["vectors"]).task == "fill-mask"  # its base's, whose head it leaves
    assert modernbert.AutoTokenizer.from_pretrained(adapters["vectors"]).mask_token == "[MASK]"
    assert modernbert.AutoConfig.from_pretrained(adapters["vectors"]).model_type == "modernbert"
    with pytest.raises(InputError, match="adapter is for loading, and model is loaded already"):
        pipeline("fill-mask", by_folder.model, by_folder.tokenizer, adapter=adapters["vectors"])


def test_commands_take_an_adapter(adapters, tmp_path, capsys):
    model = ["--model", small_model(), "--dtype", "float32"]
    code, out, _ = called(capsys, "run", *TEXTS, *model, "--adapter", adapters["classifier"], "--json")
    assert code == 0
    wanted = pipeline(model=adapters["classifier"], dtype="float32")(TEXTS)
    assert [json.loads(line)["output"]["label"] for line in out.splitlines()] == [one["label"] for one in wanted]
    vectors = tmp_path / "x.npy"
    assert called(capsys, "embed", *TEXTS, *model, "--adapter", adapters["vectors"], "--output", vectors)[0] == 0
    serve = pipeline("sentence-embedding", small_model(), adapter=adapters["vectors"], dtype="float32")
    np.testing.assert_array_equal(np.load(vectors), serve(TEXTS))
    common = ["score", TEXTS[0], "--dtype", "float32", "--json", "--model"]
    by_folder = called(capsys, *common, adapters["writer"])
    assert by_folder == called(capsys, *common, small_model("decoder"), "--adapter", adapters["writer"])
    assert by_folder[0] == 0
    how = ["--scheme", "int8-weight-only", "--min-cosine", "0.1", "--output", tmp_path / "int8"]
    code, _, err = called(capsys, "quantize", adapters["vectors"], *how)
    assert code == 0, err
    rounded = pipeline("sentence-embedding", tmp_path / "int8")(TEXTS)
    assert np.abs(rounded - serve(TEXTS)).mean() < 0.3 * np.abs(rounded - pipeline("sentence-embedding")(TEXTS)).mean()
    assert by_folder[1] != called(capsys, *common, small_model("decoder"))[1]


def test_a_shared_pass_needs_adapters_that_are_merged_and_then_an_encoder_of_their_own(adapters):
    fill = pipeline("fill-mask", small_model())
    kept = pipeline("sentence-embedding", small_model(), adapter=adapters["vectors"], merge_adapter=False)
    with pytest.raises(InputError, match=r"^vector has adapters \(default\), which change its encoder"):
        OnePass({"mask": fill, "vector": kept})
    merged = pipeline("sentence-embedding", small_model(), adapter=adapters["vectors"])
    with pytest.raises(InputError, match=r"^mask and vector have different encoders: layers\.5\.mlp\.Wi\.weight holds"):
        OnePass({"mask": fill, "vector": merged})


def test_texts_of_several_adapters_in_one_call_get_the_bits_of_each_alone(adapters):
    folders = {name: adapters[name] for name in ("vectors", "others")}
    both = pipeline("sentence-embedding", small_model(), dtype="float32", adapter=folders)
    texts, names = [*TEXTS, "A third text.", TEXTS[0]], ["others", "__base__", "vectors", "vectors"]
    found = both(texts, adapter_names=names)
    assert both.model.model.active_adapters() == ["vectors"]
    for text, name, vector in zip(texts, names, found, strict=True):
        how = {} if name == "__base__" else {"adapter": folders[name], "merge_adapter": False}
        np.testing.assert_array_equal(
            pipeline("sentence-embedding", small_model(), dtype="float32", **how)(text), vector
        )
    both.model.model.disable_adapters()
    np.testing.assert_array_equal(both(texts, adapter_names=names), found)
    assert both.model.model.active_adapters() == []
    for inputs, given, what in (
        (texts, names[:3], "adapter_names has 3 names and there are 4 inputs"),
        (TEXTS, ["vectors", "film"], "adapter_names holds 'film'; the model has vectors, others"),
        (TEXTS[0], "vectors", "adapter_names is 'vectors'; give a list of inputs and a list of names"),
        (iter(TEXTS), ["vectors"], "adapter_names needs a list of inputs"),
    ):
        with pytest.raises(InputError, match=what):
            both(inputs, adapter_names=given)
    with pytest.raises(InputError, match="adapter_names holds 'film'; the model has no adapters"):
        pipeline("sentence-embedding")(TEXTS, adapter_names=["film"] * 2)


def test_a_server_has_a_model_with_each_adapter_by_its_name(adapters):
    pytest.importorskip("fastapi")
    from modernbert.serving import create_app

    app = create_app(
        model=[f"base={small_model()}:sentence-embedding"], dtype="float32", access_log=False,
        adapter=[f"one={adapters['vectors']}", str(adapters["others"])],
    )  # fmt: skip
    models = app.state.serving.models
    try:
        assert list(models.served) == ["base", "one", "o"]
        for name, folder in (("base", None), ("one", adapters["vectors"]), ("o", adapters["others"])):
            found = models.find(name, "sentence-embedding")[1](TEXTS)
            how = {} if folder is None else {"adapter": folder}
            alone = pipeline("sentence-embedding", small_model(), dtype="float32", **how)
            np.testing.assert_array_equal(found, alone(TEXTS))
    finally:
        models.close()
    for options, what in (
        ({"model": [small_model(), f"b={small_model()}"], "adapter": ["x"]}, "adapter is 'x' and there are 2 models"),
        ({"adapter": ["x"]}, "adapter is 'x' and there are 0 models"),
        ({"model": [str(small_model())], "adapter": ["=x"]}, "adapter is '=x'; give"),
        ({"model": [f"x={small_model()}"], "adapter": ["x=y"]}, "two models are called 'x'"),
    ):
        with pytest.raises(InputError, match=what):
            create_app(**{**options, "model": [str(m) for m in options.get("model", [])]}, access_log=False)
