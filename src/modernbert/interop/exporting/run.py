"""`export`: the folder, the graphs in it, and the report."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from modernbert.errors import InputError
from modernbert.interop.exporting.graphs import GRAPHS, Graph, task_of
from modernbert.interop.exporting.options import ExportOptions
from modernbert.io.files import making, write_text
from modernbert.io.hub import Source
from modernbert.models.adapters import merge_adapters
from modernbert.models.base import PreTrainedModel
from modernbert.models.sentence_encoder import SentenceEncoder
from modernbert.models.sentence_layout import CROSS_ENCODER, SETTINGS, contents_of
from modernbert.quantization.gate import Measured
from modernbert.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_LARGEST = 2_000_000_000  # bytes of weights that one ONNX file can hold
_NEEDED = {  # packages, by what needs them
    "onnx": ("onnx", "onnx_ir", "onnxscript"),
    "openvino": ("onnx", "onnx_ir", "onnxscript", "openvino"),
    "check": ("onnxruntime",),
    "int8": ("onnxruntime",),
}


@dataclasses.dataclass(frozen=True)
class ExportedFile:
    """One graph that was written.

    Attributes:
        path: of the file, in the folder.
        format: "onnx" or "openvino".
        graph: "padded" or "packed".
        inputs, outputs: their names, in order.
        bytes: of the graph and its weights.
        difference: the largest from the model's own numbers; None if it was not checked.
        int8: what rounding cost, see `quantization.gate.Measured`, and which products stayed floats; None of floats.
    """

    path: str
    format: str
    graph: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    bytes: int
    difference: float | None = None
    int8: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What `export` wrote.

    Attributes:
        output: the folder.
        task: what the graphs are for, such as "text-classification".
        opset: of the ONNX operators.
        files: the graphs.
        longest: tokens of the longest text that was compared; None if nothing was.
        versions: of the packages that wrote and ran them.
    """

    output: str
    task: str
    opset: int
    files: tuple[ExportedFile, ...]
    longest: int | None
    versions: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.output}: {self.task}, opset {self.opset}"]
        for file in self.files:
            shape = f"{', '.join(file.inputs)} -> {', '.join(file.outputs)}"
            lines.append(f"{file.path:<34}{file.bytes / 1e6:>10,.1f} MB  {shape}")
            if file.difference is not None:
                lines.append(f"  largest difference from the model {file.difference:.1e}")
            elif file.int8 is not None:
                measured = {k: v for k, v in file.int8.items() if k != "kept"}
                kept = f"; floats: {file.int8['kept']}" if file.int8["kept"] else ""
                lines.append(f"  {Measured(**measured)}{kept}")
            else:
                lines.append("  not compared with the model")
        longest = "" if self.longest is None else f"texts of 1 to {self.longest:,} tokens; "
        lines.append(f"{longest}{', '.join(f'{name} {number}' for name, number in self.versions.items())}")
        return "\n".join(lines)


def export(
    model: Any,
    output: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    texts: Sequence[str] | None = None,
    revision: str | None = None,
    report: Callable[[str], None] | None = None,
    **options: Any,
) -> ExportReport:
    """Write a model as ONNX or OpenVINO graphs, in a folder that other libraries read, and compare them with it.

    Graphs hold float32 numbers. Each is run on texts of one token, of the most tokens, and on uneven batches; where a
    number differs from the model's by more than 1e-4 (of the largest, or of 1), or is none, nothing is left behind.

    Args:
        model: a folder or Hub repository, or a model of this package: an encoder or decoder with any head, or a
            `SentenceEncoder`.
        output: the folder to write; it must be new or empty.
        tokenizer: written beside the graphs; by default that of the folder or repository.
        texts: what `int8` is measured on; by default the package's own.
        revision: branch, tag or commit of the repository.
        report: called with a line about each step; by default lines are logged.
        options: see `ExportOptions`: `format` ("onnx", "openvino" or both), `graph` ("padded", "packed" or both),
            `task`, `truncate_dim`, `external_data`, `int8`, `min_cosine`, `tokens`, `check`, `longest`.

    Returns:
        What was written and how far it is from the model.

    Raises:
        InputError: an option is impossible, a package is missing, or the model is of another kind, dtype or device.
        ExportError: a graph's numbers are not the model's.
        QuantizationError: `int8` would cost more than `min_cosine` allows.

    Source: ONNX operators of opset 18; the layouts of optimum and sentence-transformers.
    """
    chosen, folder, say = ExportOptions.of(options, "export"), Path(output), report or logger.info
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"output is {folder}, which exists already; name another folder")
    if chosen.int8 and "onnx" not in chosen.format:
        raise InputError(
            f"int8 is for ONNX graphs, and format is {', '.join(chosen.format)}; add onnx, or leave int8 out"
        )
    _check_packages(chosen)
    about: dict[str, Any] = {}
    if isinstance(model, str | Path):
        source = Source(str(model), revision)
        contents = contents_of(source)
        about = contents.about if contents.kind == CROSS_ENCODER else {}  # its activation and its prompts
        if tokenizer is None and source.find("tokenizer.json") is not None:
            tokenizer = Tokenizer.from_pretrained(str(model), revision=revision)
        model = _load(str(model), chosen.task, revision)
        merge_adapters(model)
    elif chosen.task is not None:
        raise InputError("task chooses the class of a checkpoint, and a model was given; leave it out")
    _check_model(model)
    if chosen.truncate_dim is not None:
        model = _truncated(model, chosen.truncate_dim)
    longest = min(chosen.longest or model.config.max_position_embeddings, model.config.max_position_embeddings)
    training = model.training
    model.eval()
    try:
        with making(folder) as temporary:
            _write_layout(model, tokenizer, about, temporary)
            files = _write_graphs(model, tokenizer, texts, chosen, longest, temporary, say)
    finally:
        model.train(training)
    used = dict.fromkeys(name for need in _needs(chosen) for name in _NEEDED[need])
    versions = {name: version(name) for name in ("torch", *used)}
    from modernbert.interop.exporting.onnx import OPSET

    return ExportReport(
        str(folder), task_of(model)[0], OPSET, tuple(files), longest if chosen.check else None, versions
    )


def _needs(chosen: ExportOptions) -> list[str]:
    checks = ["check"] if chosen.check and "onnx" in chosen.format else []
    return [*chosen.format, *checks, *(["int8"] if chosen.int8 else [])]


def _check_packages(chosen: ExportOptions) -> None:
    for need in _needs(chosen):
        for name in _NEEDED[need]:
            try:
                importlib.import_module(name)
            except ImportError as error:
                instead = "; or leave the comparison out: check=False" if need == "check" else ""
                raise InputError(f"exporting needs {name}: pip install 'modernbert[export]'{instead}") from error


def _load(name: str, task: str | None, revision: str | None) -> Any:
    from modernbert.auto import AutoModel, AutoModelForMaskedLM, load_as_saved

    loaders: dict[str | None, Callable[..., Any]] = {
        None: load_as_saved,
        "feature-extraction": AutoModel.from_pretrained,
        "fill-mask": AutoModelForMaskedLM.from_pretrained,
        "sentence-embedding": SentenceEncoder.from_pretrained,
    }
    return loaders[task](name, revision=revision, dtype=torch.float32)


def _check_model(model: Any) -> None:
    task_of(model)
    body: PreTrainedModel = model.model if isinstance(model, SentenceEncoder) else model
    body.refuse_adapters("export")
    if body.quantization is not None:
        raise InputError("the model is quantized; export the float checkpoint, with int8 if that is wanted")
    if model.dtype != torch.float32 or model.device.type != "cpu":
        raise InputError(
            f"the model is {str(model.dtype).removeprefix('torch.')} on {model.device}; what is exported is float32 on "
            "the CPU: load it with dtype='float32'"
        )
    body.thaw()
    if isinstance(model, SentenceEncoder) and not model.settings.poolings:
        raise InputError("the encoder has no pooling, so no vectors of texts; export it with task='feature-extraction'")


def _truncated(model: Any, dimensions: int) -> Any:
    if not isinstance(model, SentenceEncoder) or dimensions > model.full_dimensions:
        most = (
            f"at most {model.full_dimensions}" if isinstance(model, SentenceEncoder) else "for sentence encoders alone"
        )
        raise InputError(f"truncate_dim is {dimensions}; it is {most}")
    shallow = copy.copy(model)
    shallow.settings = dataclasses.replace(model.settings, truncate_dim=dimensions)
    return shallow


def _write_layout(model: Any, tokenizer: Tokenizer | None, about: dict[str, Any], folder: Path) -> None:
    """Everything but the graphs: configuration, tokenizer, and what follows the layers of a sentence encoder."""
    if isinstance(model, SentenceEncoder):
        model.save_pretrained(folder)
        for path in folder.glob("model*.safetensors*"):
            path.unlink()
    else:
        model.config_to_save().save_pretrained(folder)
        if about:
            write_text(folder / SETTINGS, json.dumps(about, indent=2) + "\n")
    if tokenizer is not None:
        limited = copy.copy(tokenizer)  # readers want a limit, and the graph has one
        limited.model_max_length = min(tokenizer.model_max_length, model.config.max_position_embeddings)
        limited.save_pretrained(folder)


def _write_graphs(
    model: Any,
    tokenizer: Tokenizer | None,
    texts: Sequence[str] | None,
    chosen: ExportOptions,
    longest: int,
    folder: Path,
    say: Callable[[str], None],
) -> list[ExportedFile]:
    from modernbert.interop.exporting import int8, parity
    from modernbert.interop.exporting.onnx import save, trace

    files = []
    external = chosen.external_data or sum(p.numel() * p.element_size() for p in model.parameters()) > _LARGEST
    for name in dict.fromkeys(chosen.graph):
        say(f"tracing the {name} graph")
        with _quiet():
            graph = GRAPHS[name](model).eval()
            traced = trace(graph)
        suffix = "" if name == "padded" else f"_{name}"
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            place = folder / "onnx" if "onnx" in chosen.format else Path(scratch)
            place.mkdir(exist_ok=True)
            onnx_path = place / f"model{suffix}.onnx"
            save(traced, onnx_path, external)
            written = [onnx_path] if "onnx" in chosen.format else []
            if "openvino" in chosen.format:
                import openvino

                written.append(folder / "openvino" / f"openvino_model{suffix}.xml")
                written[-1].parent.mkdir(exist_ok=True)
                openvino.save_model(
                    openvino.Core().read_model(str(onnx_path)), str(written[-1]), compress_to_fp16=False
                )
        for path in written:
            difference = None
            if chosen.check:
                say(f"comparing {path.relative_to(folder)} with the model")
                run = parity.session(path)
                difference = parity.compare(run, model, name, graph, longest)
            files.append(_described(path, folder, graph, name, difference))
        if chosen.int8:
            batches = int8.batches_of(model, tokenizer, texts, chosen.tokens)
            to = onnx_path.with_name(f"model{suffix}_quantized.onnx")
            found = int8.quantize(graph, name, onnx_path, to, batches, chosen.min_cosine, external, say)
            cost = {**dataclasses.asdict(found.measured), "kept": found.kept}
            files.append(dataclasses.replace(_described(to, folder, graph, name), int8=cost))
    return files


def _described(path: Path, folder: Path, graph: Graph, name: str, difference: float | None = None) -> ExportedFile:
    sizes = [p.stat().st_size for p in path.parent.iterdir() if p.stem == path.stem or p.name.startswith(path.name)]
    kind = "openvino" if path.suffix == ".xml" else "onnx"
    where = path.relative_to(folder).as_posix()
    return ExportedFile(where, kind, name, graph.inputs, graph.outputs, sum(sizes), difference)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch's exporter warns of packages that it does not need and of its own deprecated calls."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
