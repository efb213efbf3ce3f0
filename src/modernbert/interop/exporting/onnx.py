"""Graphs as ONNX files: traced by PyTorch, attention written out in standard operators.

Shapes: N blocks of Q queries each, H heads, D head size, T tokens, K keys that a block sees.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from modernbert import __version__
from modernbert.interop.exporting.graphs import ATTEND, DOMAIN, EVERYTHING, STATE, Graph

OPSET = 18  # what readers of a few years ago know, and the lowest that PyTorch writes without conversion


def trace(graph: Graph) -> Any:
    """The graph as a model of `onnx_ir`."""
    with torch.no_grad():
        program = torch.onnx.export(
            graph,
            graph.example(),
            input_names=list(graph.inputs),
            output_names=[*graph.outputs, STATE],
            opset_version=OPSET,
            dynamic_shapes={name: dict(axes) for name, axes in graph.dynamic.items()},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    attending = [node for node in program.model.graph if node.op_type == ATTEND]
    for number, node in enumerate(attending):
        _expand(node, f"attention_{number}")
    model = program.model
    model.graph.outputs.pop()
    model.opset_imports.pop(DOMAIN, None)
    model.producer_name, model.producer_version = "modernbert", __version__
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # where in the source each came from, with paths of this machine
    return model


def save(model: Any, path: Path, external: bool) -> None:
    """Write a traced graph; with `external` its weights into a file beside it, named as others expect that."""
    import onnx_ir as ir

    ir.save(model, path, external_data=f"{path.name}_data" if external else None)


def _expand(node: Any, name: str) -> None:
    """Put a loop over the blocks in place of a node that stands for attention."""
    import onnx_ir as ir

    q, k, v, edges, text_of_queries, texts, position_of_queries, positions = node.inputs
    left, right = (node.attributes[name].value for name in ("left", "right"))
    tape = ir.tape.Tape()

    def value(of: Any) -> Any:
        return tape.op("Constant", [], {"value": ir.tensor(np.asarray(of))})

    def typed(of: str, dtype: Any, shape: Any = ()) -> Any:
        return ir.Value(name=f"{name}.{of}", type=ir.TensorType(dtype), shape=ir.Shape(shape))

    number, going = typed("block", ir.DataType.INT64), typed("going", ir.DataType.BOOL)
    zero, one, two = (value(np.array([i], dtype=np.int64)) for i in range(3))
    q_HQD, edges_2, text_Q = (tape.op("Gather", [x, number], {"axis": 0}) for x in (q, edges, text_of_queries))
    low, high = tape.op("Slice", [edges_2, zero, one]), tape.op("Slice", [edges_2, one, two])
    k_HKD, v_HKD = (tape.op("Slice", [x, low, high, one]) for x in (k, v))
    text_K = tape.op("Slice", [texts, low, high, zero])
    seen_QK = tape.op("Equal", [tape.op("Unsqueeze", [text_Q, one]), text_K])
    limits = [(test, n) for test, n in (("GreaterOrEqual", -left), ("LessOrEqual", right)) if abs(n) < EVERYTHING]
    if limits:
        position_Q = tape.op("Gather", [position_of_queries, number], {"axis": 0})
        position_K = tape.op("Slice", [positions, low, high, zero])
        ahead_QK = tape.op("Sub", [position_K, tape.op("Unsqueeze", [position_Q, one])])
        for test, steps in limits:
            seen_QK = tape.op("And", [seen_QK, tape.op(test, [ahead_QK, value(np.int64(steps))])])
    bias_QK = tape.op("Where", [seen_QK, value(np.float32(0)), value(np.float32(-1e9))])
    k_HDK = tape.op("Transpose", [k_HKD], {"perm": [0, 2, 1]})
    scores_HQK = tape.op("Add", [tape.op("MatMul", [q_HQD, k_HDK]), bias_QK])
    out = tape.op("MatMul", [tape.op("Softmax", [scores_HQK], {"axis": -1}), v_HKD])
    on = tape.op("Identity", [going])
    for of, like in ((out, typed("of_block", ir.DataType.FLOAT, q.shape[1:])), (on, typed("on", ir.DataType.BOOL))):
        of.name, of.type, of.shape = like.name, like.type, like.shape
    for i, inner in enumerate(tape.nodes):
        inner.name = f"{name}.{inner.op_type}_{i}"
        inner.outputs[0].name = inner.outputs[0].name if inner.outputs[0] in (out, on) else inner.name
    body = ir.Graph([number, going], [on, out], nodes=list(tape.nodes), name=name)

    outer = ir.tape.Tape()
    count = outer.op("Squeeze", [outer.op("Shape", [edges], {"start": 0, "end": 1})])
    yes = outer.op("Constant", [], {"value": ir.tensor(np.array(True))})
    found = outer.op("Loop", [count, yes], {"body": body})
    for inner in outer.nodes:
        inner.name = inner.outputs[0].name = f"{name}.{inner.op_type}"
    found.type, found.shape = node.outputs[0].type, node.outputs[0].shape
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], list(outer.nodes), node.outputs, [found])
