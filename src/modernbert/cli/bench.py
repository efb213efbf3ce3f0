"""`modernbert bench`: what this machine can do, and how near to it a model comes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modernbert.errors import InputError

if TYPE_CHECKING:
    from modernbert.bench import Limits, Result


def bench(
    model: Annotated[str | None, typer.Argument(help="Folder or Hub repository; none: random, base size.")] = None,
    lengths: Annotated[str, typer.Option(help="Batches: NxL, varN[:SEED], longN[:SEED].")] = "1x16,8x128,var32,1x2048",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or both, with a comma between.")] = "float32,bfloat16",
    threads: Annotated[int | None, typer.Option(help="Threads; PyTorch's own number if not given.")] = None,
    seconds: Annotated[float, typer.Option(help="How long to repeat each batch.")] = 2.0,
    picture: Annotated[Path | None, typer.Option(help="Write an .svg.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Measure this machine's limits, then a model on batches, with nothing else running.

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

    from modernbert.bench import draw, lengths_of, limits, measure
    from modernbert.files import replacing

    for workload in workloads:
        lengths_of(workload)
    if threads is not None:
        torch.set_num_threads(threads)
    machines: dict[str, Limits] = {}
    results: dict[str, list[Result]] = {}
    for name in dtypes:
        served = _load(model, name).optimize_for_inference().base_model
        machines[name] = limits(getattr(torch, name))
        results[name] = [measure(served, workload, machines[name], seconds) for workload in workloads]
        if not as_json:
            _show(name, machines[name], results[name])
    if as_json:
        said = {
            name: {"limits": machines[name]._asdict(), "results": [dataclasses.asdict(r) for r in results[name]]}
            for name in dtypes
        }
        typer.echo(json.dumps({"threads": torch.get_num_threads(), **said}))
    if picture is not None:
        title = f"{model or 'base size, random weights'}, {torch.get_num_threads()} threads"
        with replacing(picture) as temporary:
            temporary.write_text(draw(title, machines, results), encoding="utf-8")


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

    console = Console(highlight=False)
    console.print(
        f"\n[bold]{dtype}[/bold]: products {machine.flops / 1e9:,.0f} GFLOP/s ({machine.by}), "
        f"copying {machine.copying / 1e9:.1f} GB/s, reading {machine.reading / 1e9:.1f} GB/s; {results[0].backend}"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("batch")
    for name in ("tokens", "ms", "tokens/s", "GFLOP/s", "of limit"):
        table.add_column(name, justify="right")
    table.add_column("where the time goes")
    for r in results:
        parts = sorted(r.parts.items(), key=lambda part: -part[1])
        total = sum(r.parts.values())
        said = " ".join(f"{name} {seconds / total:.0%}" for name, seconds in parts if seconds > 0.005 * total)
        table.add_row(
            r.workload,
            f"{r.tokens:,}",
            f"{r.seconds * 1e3:,.1f}",
            f"{r.tokens / r.seconds:,.0f}",
            f"{r.flops / r.seconds / 1e9:,.0f}",
            f"{r.limit / r.seconds:.0%}",
            said,
        )
    console.print(table)
