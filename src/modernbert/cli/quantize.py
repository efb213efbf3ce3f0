"""`modernbert quantize`: a checkpoint with weights of 8 or 4 bits, and what that costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from modernbert.errors import InputError, listed


def quantize(
    source: Annotated[str, typer.Argument(help="Folder or Hub repository to quantize.")],
    output: Annotated[Path, typer.Option(help="Folder to write; it must be new or empty.")],
    scheme: Annotated[str, typer.Option(help="int8, int8-weight-only, int4 or int4-weight-only.")] = "int8",
    texts: Annotated[Path | None, typer.Option(help="File of texts to measure on. (default: the package's)")] = None,
    column: Annotated[str | None, typer.Option(help="Column of --texts that holds the text. (default: text)")] = None,
    min_cosine: Annotated[float | None, typer.Option(help="Least cosine. (default: 0.999, 0.9 with 4 bits)")] = None,
    most_kept: Annotated[float, typer.Option(help="Share of the weights that may get more bits, 0 to 1.")] = 0.25,
    tokens: Annotated[int, typer.Option(help="Tokens of the texts to read, half of them to measure on.")] = 4096,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit. (default: the newest)")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Quantize a checkpoint, measure how much accuracy that costs, and save it if that is little enough.

    The cosine is that between the last hidden states before and after, at the worst token.

    Example: modernbert quantize answerdotai/ModernBERT-base --output base-int8
    """
    from modernbert.auto import load_as_saved
    from modernbert.io.files import making, write_text
    from modernbert.io.hub import Source
    from modernbert.io.tables import read_records, text_in
    from modernbert.models.adapters import merge_adapters
    from modernbert.models.sentence_layout import CROSS_ENCODER, SETTINGS, contents_of
    from modernbert.quantization.gate import quantize as act
    from modernbert.quantization.options import QuantizationConfig
    from modernbert.text.tokenizer import Tokenizer

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--output is {output}, which exists already; name another folder")
    config = QuantizationConfig(scheme=scheme, min_cosine=min_cosine, most_kept=most_kept, tokens=tokens)
    if column is not None and texts is None:
        raise InputError("--column is for --texts")
    if texts is not None and not texts.exists():
        raise InputError(f"there is no file {texts}")
    given = None
    if texts is not None:
        rows = enumerate(read_records(texts), 1)
        given = [text_in(row, column or "text", f"{texts}, row {number},") for number, row in rows]
    tokenizer = None
    where = Source(source, revision)
    if given is not None or where.holding("tokenizer.json").find("tokenizer.json") is not None:
        tokenizer = Tokenizer.from_pretrained(source, revision=revision)
    else:
        typer.echo(f"{source} has no tokenizer.json; the cost is measured on ids drawn at random", err=True)
    model = load_as_saved(source, revision=revision)
    merge_adapters(model)
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    act(model, config, tokenizer=tokenizer, texts=given, report=lambda line: typer.echo(line, err=True))
    with making(output) as temporary:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        contents = contents_of(where.holding("config.json"))
        if contents.kind == CROSS_ENCODER and contents.about:  # its activation and its prompts
            write_text(temporary / SETTINGS, json.dumps(contents.about, indent=2) + "\n")
    after = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    record = model.quantization
    said = {"output": str(output), **record.to_dict(), "bytes": {"before": before, "after": after}}
    if as_json:
        typer.echo(json.dumps(said, ensure_ascii=False))
        return
    typer.echo(f"{output}: {scheme}, {after / 1e6:,.1f} MB; the weights were {before / 1e6:,.1f} MB")
    for line in described(record.to_dict()):
        typer.echo(line)


def described(record: dict[str, Any]) -> list[str]:
    """What a checkpoint's `quantization_config` says, in lines for people."""
    measured, finer = record["measured"], record["finer"]
    lines = []
    if {"cosine_mean", "cosine_min", "tokens", "texts"} <= set(measured):
        cosine = f"{measured['cosine_mean']:.5f}, at the worst token {measured['cosine_min']:.5f}"
        lines.append(
            f"cosine of the last hidden states {cosine} ({measured['tokens']:,} tokens; texts: {measured['texts']})"
        )
    if measured.get("agreement") is not None:
        lines.append(f"{measured['agreement']:.1%} of the answers are the same")
    for how in sorted(set(finer.values())):
        names = [name.removeprefix("model.") for name, other in finer.items() if other == how]
        lines.append(f"{how}: {listed(names)}")
    return lines
