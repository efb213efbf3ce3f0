"""Exported graphs give the model's numbers, whatever the texts; and an export leaves a whole folder or nothing."""

import importlib
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import modernbert
from modernbert.cli import main
from modernbert.errors import ExportError, InputError, QuantizationError
from modernbert.io.checkpoint import write_weights
from modernbert.models.sentence_encoder import Dense, Normalize, SentenceEncoder
from modernbert.models.sentence_layout import EmbeddingSettings
from tests.conftest import DATA, model_of, padded_batch, with_biases
from tests.heads import CLASSES

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason=f"exporting needs {package}: pip install 'modernbert[export]'")

from modernbert.interop.exporting import parity  # noqa: E402
from modernbert.interop.exporting.graphs import PaddedGraph  # noqa: E402

SIZES = {"num_hidden_layers": 2, "max_position_embeddings": 256, "initializer_range": 0.2}
POOLINGS = ("cls", "mean", "max", "last", "weighted_mean", "mean_sqrt_len")
LENGTHS = [[1], [7, 1, 200, 64, 33], [65, 63], [256]]  # blocks hold 64 queries


def sentence_encoder(poolings=("mean",), truncate_dim=None, folder=None, **sizes):
    """A random encoder with everything that a folder can put after the layers."""
    width = 48 * len(poolings)
    parts = [with_biases(Dense(width, 32)), Normalize()]
    settings = EmbeddingSettings(poolings=poolings, truncate_dim=truncate_dim)
    return SentenceEncoder(model_of("ModernBertModel", **{**SIZES, **sizes}), settings, (), parts).eval()


def model_called(name):
    if name == "SentenceEncoder":
        return sentence_encoder(POOLINGS, truncate_dim=20)
    changes = {"classifier_pooling": "mean", "num_labels": 2} if "Classification" in name else {}
    return with_biases(model_of(name, **SIZES, **changes))


@torch.no_grad()
def outputs_of(model, feed):
    """The outputs that a graph has, in order."""
    if isinstance(model, SentenceEncoder):
        return [model.model(**feed)["last_hidden_state"], model(**feed)]
    return [x for x in model(**feed).values() if isinstance(x, torch.Tensor)]


def compare(folder, path, model, feeds):
    run = parity.session(Path(folder) / path)
    for feed in feeds:
        for got, right in zip(run(feed), outputs_of(model, feed), strict=True):
            torch.testing.assert_close(got.reshape(right.shape), right, rtol=0, atol=1e-4)


def padded_feeds(model):
    for i, lengths in enumerate(LENGTHS):
        for side in ("right", "left")[: 1 + (len(lengths) > 1)]:
            ids, mask = padded_batch(lengths, side, more=min(i, 256 - max(lengths)))
            yield {"input_ids": ids, "attention_mask": mask}
    ids, mask = padded_batch([40, 90])
    mask[0], mask[1, 20:50] = 0, 0  # a text of padding alone, and a gap between real tokens
    yield {"input_ids": ids, "attention_mask": mask}


def packed_feeds(model):
    for lengths in LENGTHS:
        starts = torch.tensor([0, *np.cumsum(lengths)])
        yield {"input_ids": torch.randint(3, 96, (sum(lengths),)), "cu_seqlens": starts}


def check_graph(model, folder, kind, graph):
    """Export without the package's own comparison, and compare here."""
    modernbert.export(model, folder, format=kind, graph=graph, check=False)
    feeds = (padded_feeds if graph == "padded" else packed_feeds)(model)
    if graph == "padded" and isinstance(model, modernbert.ModernBertForMultipleChoice):
        feeds = ({name: x[None] for name, x in feed.items()} for feed in feeds)
    stem = "onnx/model{}.onnx" if kind == "onnx" else "openvino/openvino_model{}.xml"
    compare(folder, stem.format("" if graph == "padded" else "_packed"), model, feeds)


QUICK = [(name, "padded") for name in [*CLASSES, "SentenceEncoder"]]
QUICK += [("SentenceEncoder", "packed"), ("ModernBertDecoderForSequenceClassification", "packed")]
ALL = [(name, graph) for name in [*CLASSES, "SentenceEncoder"] for graph in ("padded", "packed")]


@pytest.mark.parametrize(
    ("name", "graph"), [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in ALL]
)
def test_a_graph_gives_the_numbers_of_its_model(name, graph, tmp_path):
    check_graph(model_called(name), tmp_path / "out", "onnx", graph)


@pytest.mark.parametrize(
    ("name", "graph"), [case if case in QUICK[-3:-1] else pytest.param(*case, marks=pytest.mark.slow) for case in ALL]
)
def test_a_graph_of_openvino_gives_the_numbers_of_its_model(name, graph, tmp_path):
    pytest.importorskip("openvino", reason="pip install 'modernbert[export]'")
    check_graph(model_called(name), tmp_path / "out", "openvino", graph)
    assert not (tmp_path / "out" / "onnx").exists()


def test_a_graph_holds_no_mask_of_all_pairs_and_names_weights_as_the_checkpoint_does(tmp_path):
    import onnx

    modernbert.export(model_of("ModernBertForSequenceClassification", **SIZES), tmp_path / "out", check=False)
    graph = onnx.load(tmp_path / "out" / "onnx" / "model.onnx").graph
    assert [i.name for i in graph.input] == ["input_ids", "attention_mask"]
    dims = [[d.dim_param for d in value.type.tensor_type.shape.dim] for value in (*graph.input, *graph.output)]
    assert dims[:2] == [["batch_size", "sequence_length"]] * 2
    assert dims[2][0] == "batch_size"
    weights = {initializer.name for initializer in graph.initializer}
    assert {"model.layers.1.attn.Wqkv.weight", "head.dense.weight", "classifier.weight"} <= weights
    products = [node for node in graph.node if node.op_type in ("MatMul", "Softmax")]
    assert products == []  # attention is in the loops alone, block by block
    assert not any(node.metadata_props for node in graph.node)


def test_a_report_says_what_was_written_and_how_far_it_is_from_the_model(tmp_path):
    model = model_called("ModernBertForMaskedLM").train()
    report = modernbert.export(model, tmp_path / "out", longest=70, int8=True, min_cosine=0.5)
    assert model.training  # which it was before
    assert all(p.requires_grad for p in model.parameters())
    plain, int8 = report.files
    assert (report.task, report.opset, report.longest) == ("fill-mask", 18, 70)
    assert (plain.path, plain.inputs, plain.outputs) == (
        "onnx/model.onnx",
        ("input_ids", "attention_mask"),
        ("logits",),
    )
    assert 0 < plain.difference < 1e-4
    assert plain.bytes == (tmp_path / "out" / plain.path).stat().st_size > int8.bytes
    assert int8.path == "onnx/model_quantized.onnx"
    assert 0.9 < int8.int8["cosine_min"] < int8.int8["cosine_mean"] < 1
    assert int8.int8["agreement"] > 0.5
    assert {"torch", "onnx", "onnxruntime"} <= set(report.versions)


def test_int8_that_costs_too_much_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(QuantizationError, match=r"cosine is 0\.\d+, and 1\.0 is wanted, also with \*\.mlp\.Wo\."):
        modernbert.export(
            model_called("ModernBertModel"), tmp_path / "out", int8=True, min_cosine=1.0, tokens=256, check=False
        )
    assert list(tmp_path.iterdir()) == []


def test_a_graph_with_other_numbers_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    right = parity.session

    def wrong(path):
        run = right(path)
        return lambda feed: [x + 2e-4 * (feed["input_ids"].shape[-1] > 256 - 1) for x in run(feed)]

    monkeypatch.setattr(parity, "session", wrong)
    with pytest.raises(ExportError, match=r"logits differs from the model's by 2\.\de-04 for ids of shape \(1, 256\)"):
        modernbert.export(model_called("ModernBertForSequenceClassification"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_number_that_is_none_is_refused():
    model = model_called("ModernBertForSequenceClassification")
    with pytest.raises(ExportError, match=r"logits holds NaN or infinite numbers for ids of shape \(1, 1\)"):
        parity.compare(lambda feed: [torch.full((1, 2), torch.nan)], model, "padded", PaddedGraph(model), 20)


def test_weights_beside_the_graph_are_those_that_it_reads(tmp_path):
    model = model_called("ModernBertModel")
    report = modernbert.export(model, tmp_path / "out", external_data=True, int8=True, min_cosine=0.5, tokens=256)
    names = sorted(path.name for path in (tmp_path / "out" / "onnx").iterdir())
    assert names[:2] == ["model.onnx", "model.onnx_data"]
    assert report.files[0].bytes == sum((tmp_path / "out" / "onnx" / name).stat().st_size for name in names[:2])
    compare(tmp_path, "out/onnx/model.onnx", model, padded_feeds(model))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (None, {"format": "tflite"}, r"format is 'tflite'; choose one of onnx, openvino"),
        (None, {"int8": True, "format": "openvino"}, "int8 is for ONNX graphs, and format is openvino"),
        (None, {"task": "fill-mask"}, "task chooses the class of a checkpoint"),
        (None, {"truncate_dim": 8}, "truncate_dim is 8; it is for sentence encoders alone"),
        (None, {"size": 8}, "export has no option size; there are format, graph"),
        (lambda model: model.bfloat16(), {}, "the model is bfloat16 on cpu; what is exported is float32"),
        (lambda model: modernbert.quantize(model, "int8"), {}, "the model is quantized; export the float checkpoint"),
        (lambda model: torch.nn.Linear(2, 2), {}, "model is a Linear; what is exported: SentenceEncoder"),
    ],
)
def test_what_cannot_be_exported_is_refused(change, options, message, tmp_path):
    model = model_called("ModernBertModel")
    with pytest.raises(InputError, match=message):
        modernbert.export(change(model) if change else model, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_adapters_are_added_to_the_weights_of_a_folder_and_refused_beside_those_of_a_model(tmp_path):
    encoder, base, adapted = sentence_encoder(), tmp_path / "base", tmp_path / "adapted"
    encoder.save_pretrained(adapted)
    base.mkdir()
    for name in ("config.json", "model.safetensors"):
        (adapted / name).rename(base / name)
    layer = "base_model.model.layers.0.attn.Wqkv"
    write_weights(
        adapted, {f"{layer}.lora_A.weight": torch.randn(1, 48), f"{layer}.lora_B.weight": torch.randn(144, 1)}
    )
    (adapted / "model.safetensors").rename(adapted / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "base_model_name_or_path": str(base)}
    (adapted / "adapter_config.json").write_text(json.dumps(settings))
    plain, encoder = encoder, SentenceEncoder.from_pretrained(adapted)
    feed = dict(zip(("input_ids", "attention_mask"), padded_batch([40, 7]), strict=True))
    assert not torch.allclose(encoder(**feed), plain(**feed), atol=1e-2)
    with pytest.raises(InputError, match=r"export is for the weights alone, and there are adapters \(default\)"):
        modernbert.export(encoder, tmp_path / "out")
    modernbert.export(adapted, tmp_path / "out", longest=64)
    compare(tmp_path / "out", "onnx/model.onnx", encoder, [feed])


def test_a_folder_that_holds_something_and_a_missing_package_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    model = model_called("ModernBertModel")
    with pytest.raises(InputError, match="which exists already; name another folder"):
        modernbert.export(model, tmp_path)
    found = importlib.import_module

    def missing(name, *args):
        if name == "onnxruntime":
            raise ImportError(name)
        return found(name, *args)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(
        InputError, match=r"needs onnxruntime: pip install 'modernbert\[export\]'; or leave .* check=False"
    ):
        modernbert.export(model, tmp_path / "out")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Checkpoints with the real tokenizer, and what the command makes of them."""
    if not DATA.exists():
        pytest.skip("no ../shared/data")
    folder = tmp_path_factory.mktemp("exported")
    tokenizer = modernbert.Tokenizer.from_pretrained(DATA / "tokenizer")
    sizes = {"vocab_size": 50368, "pad_token_id": 50283, "bos_token_id": 50281, "eos_token_id": 50282}
    sizes |= {"cls_token_id": 50281, "sep_token_id": 50282}
    encoder = sentence_encoder(("mean",), **sizes)
    encoder.after_pooling = torch.nn.ModuleList([Normalize()])
    cross = with_biases(model_of("ModernBertForSequenceClassification", **SIZES, **sizes, num_labels=1))
    about = {"model_type": "CrossEncoder", "activation_fn": "torch.nn.modules.activation.Sigmoid", "prompts": {}}
    for name, model in (("encoder", encoder), ("cross", cross)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "cross" / "config_sentence_transformers.json").write_text(json.dumps(about))
    return folder


def command(*arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def test_the_command_writes_a_folder_that_others_read(exported, tmp_path, capsys):
    code = command("export", exported / "encoder", "--output", tmp_path / "out", "--truncate-dim", 16, "--json")
    assert code == 0
    report = json.loads(capsys.readouterr().out)
    assert report["task"] == "sentence-embedding"
    assert report["files"][0]["outputs"] == ["last_hidden_state", "sentence_embedding"]
    made = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"modules.json", "config.json", "tokenizer.json", "1_Pooling/config.json", "onnx/model.onnx"} <= made
    assert not any(name.endswith(".safetensors") for name in made)
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == 256  # what the graph takes; fastembed refuses a folder without a limit
    run = parity.session(tmp_path / "out" / "onnx" / "model.onnx")
    ids = torch.randint(3, 50000, (2, 30))
    vectors = run({"input_ids": ids, "attention_mask": torch.ones_like(ids)})[1]
    right = SentenceEncoder.from_pretrained(exported / "encoder")(ids).detach()[:, :16]
    torch.testing.assert_close(vectors, right, rtol=0, atol=1e-5)


def test_the_command_refuses_in_flags(exported, tmp_path, capsys):
    assert command("export", exported / "cross", "--output", tmp_path, "--texts", "x.txt") == 2
    assert "--texts is for --int8" in capsys.readouterr().err


# What runs in an environment of its own, made as tests/interop says: the folder of its Python is in this variable.
OTHERS = os.environ.get("MODERNBERT_EXPORT_READERS")
READ = """
import json, sys
import numpy as np
from sentence_transformers import CrossEncoder, SentenceTransformer
folder, kind, backend = sys.argv[1:]
texts = json.loads(sys.stdin.read())
options = {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}} if backend == "openvino" else {}
if kind == "encoder":
    found = SentenceTransformer(folder, backend=backend, model_kwargs=options).encode(texts)
else:
    found = CrossEncoder(folder, backend=backend, model_kwargs=options).predict([(texts[0], text) for text in texts])
print("\\n" + json.dumps(np.asarray(found).tolist()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnx", "openvino"])
@pytest.mark.parametrize("kind", ["encoder", "cross"])
def test_sentence_transformers_gives_our_numbers(kind, backend, exported, tmp_path):
    if OTHERS is None:
        pytest.skip("MODERNBERT_EXPORT_READERS names no Python with sentence-transformers, optimum-onnx, optimum-intel")
    code = command("export", exported / kind, "--output", tmp_path / "out", "--format", backend)
    assert code == 0
    texts = ["The weather is lovely today.", "It's so sunny outside!", "word " * 200, "a"]
    arguments = [OTHERS, "-c", READ, str(tmp_path / "out"), kind, backend]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(arguments, input=json.dumps(texts), capture_output=True, text=True, env=clean, check=False)
    assert done.returncode == 0, done.stderr
    found = np.array(json.loads(done.stdout.strip().splitlines()[-1]))
    if kind == "encoder":
        right = modernbert.pipeline("sentence-embedding", str(exported / kind), dtype="float32")(texts)
    else:
        tokenizer = modernbert.Tokenizer.from_pretrained(exported / kind)
        pairs = tokenizer([texts[0]] * len(texts), texts, padding=True, return_tensors="pt", truncation=True)
        model = modernbert.ModernBertForSequenceClassification.from_pretrained(exported / kind)
        right = torch.sigmoid(model(**pairs).logits)[:, 0].detach().numpy()
    assert np.abs(found - np.stack([np.asarray(x) for x in right])).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CLASSES, "SentenceEncoder"])
def test_graphs_of_every_kind_agree_up_to_8192_tokens(name, tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "max_position_embeddings", 8192)
    monkeypatch.setitem(SIZES, "local_attention", 128)
    formats = ["onnx", "openvino"] if importlib.util.find_spec("openvino") else ["onnx"]
    report = modernbert.export(model_called(name), tmp_path / "out", format=formats, graph=["padded", "packed"])
    assert report.longest == 8192
    assert max(file.difference for file in report.files) < 1e-4
