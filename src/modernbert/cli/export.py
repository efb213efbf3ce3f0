"""`modernbert export`: a model as files of ONNX or OpenVINO, in a folder that other libraries read."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from modernbert.checks import fields_of
from modernbert.cli.flags import flag, with_signature
from modernbert.errors import InputError
from modernbert.interop.exporting.options import ExportOptions


def _run(
    source: str, output: Path, texts: Path | None, column: str | None, revision: str | None, as_json: bool, **given: Any
) -> None:
    from modernbert.interop.exporting.run import export as act
    from modernbert.io.tables import read_records, text_in

    if texts is None and column is not None:
        raise InputError("--column is for --texts")
    if texts is not None and not given["int8"]:
        raise InputError("--texts is for --int8, which is measured on them")
    rows = None
    if texts is not None:
        named = enumerate(read_records(texts), 1)
        rows = [text_in(row, column or "text", f"{texts}, row {number},") for number, row in named]
    chosen = {name: value for name, value in given.items() if value not in (None, [])}
    report = act(
        source, output, texts=rows, revision=revision, report=lambda line: typer.echo(line, err=True), **chosen
    )
    typer.echo(json.dumps(dataclasses.asdict(report), ensure_ascii=False) if as_json else str(report))


_SOURCE = Annotated[str, typer.Argument(help="Folder or Hub repository to export.")]
_OUTPUT = Annotated[Path, typer.Option(help="Folder to write; it must be new or empty.")]
_TEXTS = Annotated[Path | None, typer.Option(help="File of texts to measure --int8 on. (default: the package's)")]
_COLUMN = Annotated[str | None, typer.Option(help="Column of --texts that holds the text. (default: text)")]
_REVISION = Annotated[str | None, typer.Option(help="Branch, tag or commit. (default: the newest)")]
_JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def _parameters() -> list[inspect.Parameter]:
    keyword, empty = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.empty
    others = {
        "source": (_SOURCE, empty), "output": (_OUTPUT, empty), "texts": (_TEXTS, None), "column": (_COLUMN, None),
        "revision": (_REVISION, None), "as_json": (_JSON, False),
    }  # fmt: skip
    own = [inspect.Parameter(name, keyword, default=d, annotation=kind) for name, (kind, d) in others.items()]
    return [*own[:2], *(flag(field) for field in fields_of(ExportOptions)), *own[2:]]


export = with_signature(
    _run,
    _parameters(),
    """Write a model as ONNX or OpenVINO graphs, and compare them with it.

    The folder is one that sentence-transformers, optimum, fastembed, text-embeddings-inference and transformers.js
    read. A graph whose numbers are not the model's is refused, and nothing is left behind.

    Example: modernbert export Alibaba-NLP/gte-modernbert-base --output gte-onnx
    """,
)
