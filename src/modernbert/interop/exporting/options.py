"""What is exported, and how it is checked, as callers and flags say it."""

from __future__ import annotations

import dataclasses

from modernbert.checks import Options, option

FORMATS = ("onnx", "openvino")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """What to write.

    Raises:
        InputError: a value is impossible.
    """

    format: list[str] = option(["onnx"], "Files to write.", choices=FORMATS)
    graph: list[str] = option(
        ["padded"],
        "What a graph takes: ids and a mask (padded), or texts end to end (packed).",
        choices=("padded", "packed"),
    )
    task: str | None = option(
        None,
        "Export the checkpoint as this instead.",
        choices=("feature-extraction", "fill-mask", "sentence-embedding"),
        otherwise="the checkpoint's own head",
    )
    truncate_dim: int | None = option(
        None, "Dimensions of a text's vector that are kept.", least=1, otherwise="the checkpoint's"
    )
    external_data: bool = option(False, "Write weights beside an ONNX graph, as graphs above 2 GB need.")
    int8: bool = option(False, "Write ONNX graphs with weights of 8 bits as well, if that costs little enough.")
    min_cosine: float = option(0.999, "With int8: least cosine of the worst token's last state.", least=0, most=1)
    tokens: int = option(4096, "With int8: tokens of the texts to read, half of them to measure on.", least=64)
    check: bool = option(True, "Run what was written, and compare it with the model.")
    longest: int | None = option(
        None, "Tokens of the longest text of that comparison.", least=1, otherwise="the longest that the model takes"
    )
