"""`modernbert bench`: what this machine can do, and how near to it a model comes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modernbert.errors import InputError

if TYPE_CHECKING:
    from modernbert.tools.bench import Limits, Result


def bench(
    model: Annotated[str | None, typer.Argument(help="Folder or Hub repository. (default: random weights)")] = None,
    lengths: Annotated[str, typer.Option(help="Batches, with commas between.")] = "1x16,8x128,var32,1x2048",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or both, with a comma.")] = "float32,bfloat16",
    threads: Annotated[int | None, typer.Option(help="Number of threads. (default: PyTorch's own)")] = None,
    seconds: Annotated[float, typer.Option(help="Seconds for which each batch is repeated.")] = 2.0,
    picture: Annotated[Path | None, typer.Option(help="Draw the results into this .svg file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure this machine's speed, then that of a model on batches; run nothing else meanwhile.

    Batches: NxL is N texts of L tokens; varN and longN are N texts of mixed lengths, up to 512
    and 8,192 tokens. Without a model, one of base size with random weights is measured.

    Example: modernbert bench --lengths 1x16,var32 --picture bench.svg
    """
    workloads, dtypes = lengths.split(","), dtype.split(",")
    if unknown := [name for name in dtypes if name not in ("float32", "bfloat16")]:
        raise InputError(f"--dtype is {unknown[0]!r}; choose float32, bfloat16 or both")
    if picture is not None and picture.suffix != ".svg":
        raise InputError(f"--picture is {str(picture)!r}; its name must end in .svg")
    if threads is not None and threads < 1:
        raise InputError(f"--threads is {threads}; it must be at least 1")

    import torch

    from modernbert.io.files import write_text
    from modernbert.tools.bench import lengths_of, limits, measure
    from modernbert.tools.picture import draw

    for workload in workloads:
        lengths_of(workload)
    if threads is not None:
        torch.set_num_threads(threads)
    name = "a model of base size, random weights" if model is None else model
    name, count = Path(name).resolve().name if Path(name).exists() else name, torch.get_num_threads()
    title = f"{name}, {count} thread{'s' if count > 1 else ''}"
    if not as_json:
        typer.echo(title)
    machines: dict[str, Limits] = {}
    results: dict[str, list[Result]] = {}
    for name in dtypes:
        served = _load(model, name).optimize_for_inference().base_model
        machines[name] = limits(getattr(torch, name))
        results[name] = [measure(served, workload, machines[name], seconds) for workload in workloads]
        if not as_json:
            _show(name, machines[name], results[name])
    if as_json:
        found = {
            name: {"limits": machines[name]._asdict(), "results": [dataclasses.asdict(r) for r in results[name]]}
            for name in dtypes
        }
        typer.echo(json.dumps({"threads": count, **found}))
    else:
        typer.echo(
            "\nMore tokens/s is better. The limit is the time that a batch's arithmetic takes at the machine's fastest,"
            "\nor that of reading the weights once if it is longer. Texts are random; padding is never computed."
        )
    if picture is not None:
        write_text(picture, draw(title, machines, results))


def _load(model: str | None, dtype: str) -> Any:
    import torch

    from modernbert.auto import AutoModel
    from modernbert.config import ModernBertConfig
    from modernbert.models.encoder import ModernBertModel

    if model is not None:
        return AutoModel.from_pretrained(model, dtype=dtype)
    torch.manual_seed(0)
    return ModernBertModel(ModernBertConfig()).to(getattr(torch, dtype))


def _show(dtype: str, machine: Limits, results: list[Result]) -> None:
    from rich.console import Console
    from rich.table import Table

    from modernbert.tools.bench import PARTS, described

    console = Console(highlight=False, soft_wrap=True)
    console.print(f"\n[bold]{dtype}[/bold], {results[0].backend}")
    console.print(
        f"This machine at most: {machine.flops / 1e9:,.0f} GFLOP/s in products (by {machine.by}), "
        f"{machine.reading / 1e9:.1f} GB/s reading memory, {machine.copying / 1e9:.1f} GB/s copying it.\n"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("batch")
    table.add_column("", no_wrap=True)
    for name in ("tokens", "ms a batch", "tokens/s", "of the limit"):
        table.add_column(name, justify="right")
    for r in results:
        times = f"{r.seconds * 1e3:,.1f}", f"{r.tokens / r.seconds:,.0f}", f"{r.limit / r.seconds:.0%}"
        table.add_row(r.workload, described(r.workload), f"{r.tokens:,}", *times)
    console.print(table)
    if any(r.parts for r in results):
        table = Table(box=None, pad_edge=False)
        table.add_column("where the time goes", no_wrap=True)
        for r in results:
            table.add_column(r.workload, justify="right")
        for name, words in PARTS.items():
            table.add_row(words, *(f"{r.parts[name] / sum(r.parts.values()):.0%}" if r.parts else "" for r in results))
        console.print()
        console.print(table)
