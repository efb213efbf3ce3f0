"""ONNX graphs with weights of 8 bits, and what that costs, by the metrics of `quantization`.

ONNX Runtime rounds the inputs of each product as it runs, all tokens of a batch by one scale, so that a text's numbers
depend on its batch. Weights get 7 of their 8 bits: with 8, sums overflow on processors without VNNI.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from modernbert.errors import QuantizationError
from modernbert.interop.exporting.graphs import STATE, Graph
from modernbert.interop.exporting.parity import Run, feed_of, session
from modernbert.models.sentence_encoder import SentenceEncoder
from modernbert.quantization.calibration import Batch, Seen, look, make_batches, own_texts, seen_in
from modernbert.quantization.gate import Measured, compared

_OF_TOKENS = ("feature-extraction", "fill-mask", "token-classification", "question-answering", "text-generation")
_FIRST_KEPT = "mlp.Wo."  # the products whose inputs have the largest outliers, if any must stay floats


@dataclasses.dataclass(frozen=True)
class Quantized:
    """What was rounded, and what that costs."""

    kept: str  # products that stay floats; empty if there are none
    measured: Measured


def batches_of(model: Any, tokenizer: Any, texts: Sequence[str] | None, tokens: int) -> list[Batch]:
    """Texts to measure on; without a tokenizer random ids."""
    body = model.model if isinstance(model, SentenceEncoder) else model
    return make_batches(texts or own_texts(), tokenizer, body, tokens)[1]


def quantize(
    graph: Graph,
    name: str,
    written: Path,
    to: Path,
    batches: Sequence[Batch],
    least: float,
    external: bool,
    report: Callable[[str], None],
) -> Quantized:
    """Round the weights of a written graph into the file `to`, and measure on batches what that costs.

    Raises:
        QuantizationError: the worst token's cosine is below `least`.
    """
    import onnx

    model = graph.model_itself
    body = model.model if isinstance(model, SentenceEncoder) else model
    right = [look(body, batch) for batch in batches]
    nodes = onnx.load(written, load_external_data=False).graph.node
    for kept in ("", _FIRST_KEPT):
        _round(written, to, [n.name for n in nodes if kept and any(kept in i for i in n.input)], external)
        run = _showing(to)
        passes = [
            (_look(run, graph, name, batch), seen._replace(states=seen.states[-1:]))
            for batch, seen in zip(batches, right, strict=True)
        ]
        measured = compared(passes)
        kept = kept and f"*.{kept}"
        report(f"{to.name}{kept and f' with {kept} as floats'}: {measured}")
        if measured.cosine_min >= least:
            return Quantized(kept, measured)
    raise QuantizationError(
        f"int8 was refused: the worst token's cosine is {measured.cosine_min:.4f}, and {least} is wanted, also with "
        f"{kept} as floats. Ask for less with min_cosine, or leave int8 out"
    )


def _showing(path: Path) -> Run:
    """What runs a graph and gives its last hidden state as one output more."""
    import onnx

    shown = onnx.load(path)
    shown.graph.output.append(onnx.helper.make_tensor_value_info(STATE, onnx.TensorProto.FLOAT, None))
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        onnx.save(shown, Path(folder) / path.name, save_as_external_data=True)
        return session(Path(folder) / path.name)


def _look(run: Run, graph: Graph, name: str, batch: Batch) -> Seen:
    ids_T, lengths = batch.inputs.ids_T, list(batch.inputs.packing.lengths)
    assert ids_T is not None
    feed = feed_of(name, ids_T.split(lengths), graph.task)
    outputs = dict(zip((*graph.outputs, STATE), run(feed), strict=False))
    if name == "padded" and graph.task in _OF_TOKENS:
        outputs = {k: x[feed["attention_mask"] != 0] if k != STATE else x for k, x in outputs.items()}
    if graph.task == "multiple-choice":
        outputs["logits"] = outputs["logits"].reshape(1, -1)
    return seen_in(SimpleNamespace(**outputs), [outputs[STATE][: len(ids_T)]], batch)


def _round(written: Path, to: Path, exclude: list[str], external: bool) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    plain = onnx.load(written, load_external_data=False)
    del plain.graph.value_info[:]  # shapes of weights, which rounding transposes
    path = written.with_name(f".{written.name}")  # beside the weights, if they are in a file of their own
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it advises what has no effect on these graphs
    try:
        onnx.save(plain, path)
        quantize_dynamic(
            path, to, op_types_to_quantize=["MatMul", "Gemm", "Gather"], per_channel=True, reduce_range=True,
            weight_type=QuantType.QInt8, nodes_to_exclude=exclude, use_external_data_format=external,
        )  # fmt: skip
    finally:
        logging.disable(before)
        path.unlink(missing_ok=True)
