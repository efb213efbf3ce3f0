"""Runs exported graphs, and compares them with the model that they came from.

Shapes: B texts, S columns of a padded grid, T tokens of all texts together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modernbert.errors import ExportError
from modernbert.interop.exporting.graphs import Graph
from modernbert.models.sentence_encoder import SentenceEncoder

TOLERANCE = 1e-4  # of the largest number of an output, or of 1
Run = Callable[[Mapping[str, Tensor]], list[Tensor]]


def session(path: Path) -> Run:
    """What runs a written graph, on the CPU in float32: its outputs by its inputs' names."""
    if path.suffix == ".xml":
        import openvino

        compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return lambda inputs: [_tensor(x) for x in compiled({k: v.numpy() for k, v in inputs.items()}).values()]
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    ort = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda inputs: [_tensor(x) for x in ort.run(None, {k: v.numpy() for k, v in inputs.items()})]


def _tensor(x: Any) -> Tensor:
    return torch.from_numpy(np.array(x))


def feed_of(
    graph: str, rows: Sequence[Tensor], task: str = "", side: str = "right", more: int = 0
) -> dict[str, Tensor]:
    """Inputs of a graph for texts of these ids; a padded one has `more` columns of padding."""
    if graph == "packed":
        starts = torch.tensor([0, *itertools.accumulate(map(len, rows))])
        return {"input_ids": torch.cat(list(rows)), "cu_seqlens": starts}
    width = max(map(len, rows)) + more
    ids, mask = torch.zeros((2, len(rows), width), dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(len(row))
        ids[i, place], mask[i, place] = row, 1
    feed = {"input_ids": ids, "attention_mask": mask}
    return {name: x[None] for name, x in feed.items()} if task == "multiple-choice" else feed


@torch.no_grad()
def answers_of(model: Any, feed: Mapping[str, Tensor], names: Sequence[str]) -> list[Tensor]:
    """The model's own outputs, by their names."""
    if isinstance(model, SentenceEncoder):
        return [model.model(**feed)["last_hidden_state"], model(**feed)]
    output = model(**feed)
    return [output[name] for name in names]


def cases(graph: str, task: str, vocabulary: int, longest: int) -> Iterator[dict[str, Tensor]]:
    """Texts of 1 token and of the most; uneven batches of 1 to 8 on either side; one of padding alone."""
    random = torch.Generator().manual_seed(0)

    def rows_of(lengths: Sequence[int]) -> list[Tensor]:
        return [torch.randint(vocabulary, (length,), generator=random) for length in lengths]

    yield feed_of(graph, rows_of([1]), task)
    for batch in range(1, 9):
        lengths = torch.randint(1, min(longest, 300) + 1, (batch,), generator=random).tolist()
        lengths[-1] = (1, 0, lengths[-1])[batch % 3] if batch > 1 else lengths[-1]
        yield feed_of(graph, rows_of(lengths), task, ("right", "left")[batch % 2], more=batch % 3)
    yield feed_of(graph, rows_of([longest]), task)


def compare(run: Run, model: Any, name: str, graph: Graph, longest: int) -> float:
    """The largest difference between a written graph and the model.

    Raises:
        ExportError: a number is none, or too far from the model's.
    """
    largest = 0.0
    for feed in cases(name, graph.task, model.config.vocab_size, longest):
        where = f"for ids of shape {tuple(feed['input_ids'].shape)}"
        for what, right, got in zip(graph.outputs, answers_of(model, feed, graph.outputs), run(feed), strict=True):
            if got.numel() != right.numel():
                raise ExportError(f"{what} has shape {tuple(got.shape)} {where}; the model's has {tuple(right.shape)}")
            if not bool(torch.isfinite(got).all()):
                raise ExportError(f"{what} holds NaN or infinite numbers {where}")
            counts = right > torch.finfo(right.dtype).min  # which stands where there is no answer
            allowed = TOLERANCE * max(1.0, float(torch.where(counts, right, 0.0).abs().max()))
            difference = float(got.reshape(right.shape).sub_(right).abs_().max())
            if difference > allowed:
                raise ExportError(
                    f"{what} differs from the model's by {difference:.1e} {where}; {allowed:.1e} is allowed"
                )
            largest = max(largest, difference)
    return largest
