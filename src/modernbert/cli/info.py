"""`modernbert info`: what a checkpoint is."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modernbert.errors import InputError, printable

if TYPE_CHECKING:
    from rich.table import Table


def info(
    model: Annotated[str, typer.Argument(help="Folder or Hub repository.")],
    lengths: Annotated[str, typer.Option(help="Lengths in tokens to estimate the memory for.")] = "128,512,2048,8192",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit. (default: the newest)")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Describe a checkpoint: its size, layers, attention windows, labels, files, and the memory it needs.

    Example: modernbert info answerdotai/ModernBERT-base
    """
    from modernbert.io.tables.writing import to_json
    from modernbert.tools.info import checkpoint_info

    numbers = lengths.split(",")
    if not all(n.strip().isdecimal() and int(n) > 0 for n in numbers):
        raise InputError(f"--lengths is {lengths!r}; give whole numbers of at least 1 with commas between")
    found = checkpoint_info(model, [int(n) for n in numbers], revision)
    if as_json:
        typer.echo(to_json(found, str))
    else:
        _show(found)


def table_of(values: Mapping[str, Any]) -> Table:
    """Names and values in two columns; more rows may follow."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column()
    for name, value in values.items():
        _add(table, name, value)
    return table


def _add(table: Table, name: str, value: Any) -> None:
    from rich.text import Text

    table.add_row(Text(printable(name)), Text(printable(_cell(value), keep="\n")))


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console

    table = table_of({})
    add = functools.partial(_add, table)
    for section, prefix in (("model", ""), ("architecture", ""), ("tokenizer", "tokenizer ")):
        for name, value in found[section].items():
            add(f"{prefix}{name}", value)
        table.add_section()
    if "quantization" in found:
        from modernbert.cli.quantize import described

        add("quantized", "\n".join([found["quantization"]["scheme"], *described(found["quantization"])]))
    if "labels" in found:
        labels = list(found["labels"].values())
        add("labels", f"{len(labels)}: {', '.join(labels[:12])}{', ...' if len(labels) > 12 else ''}")
    for name in ("parts", "adapter", "not served"):
        if name in found:
            add(name, found[name])
    for name, size in found["files"].items():
        add(name, f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size:,} bytes")
    table.add_section()
    for tokens, size in found["memory"].items():
        add(f"memory at {int(tokens):,} tokens", f"{size / 2**20:,.0f} MiB in the stored dtype, weights included")
    for tokens, size in found.get("cache", {}).items():
        add(f"cache of {int(tokens):,} tokens", f"{size / 2**20:,.1f} MiB")
    Console(highlight=False, soft_wrap=True).print(table)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.10g}" if isinstance(value, int | float) else str(value)
