"""`modernbert doctor`: this installation on one page, and what a model will run on here."""

from __future__ import annotations

from typing import Annotated

import typer

from modernbert.errors import printable


def doctor(
    model: Annotated[str | None, typer.Argument(help="Folder or Hub repository. (default: none)")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit. (default: the newest)")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Examine this installation: kernels, processor, threads, cards, packages; with a model, what it will run on.

    A quick self-test compares the kernels with plain PyTorch. The exit code is 1 if something is broken.

    Example: modernbert doctor answerdotai/ModernBERT-base
    """
    from modernbert.io.tables.writing import to_json
    from modernbert.tools.doctor import examine
    from modernbert.training.threads import cores, quota

    report = examine(model, revision, cores(), quota())
    if model is not None:
        from modernbert.pipelines import task_of

        kwargs = {} if revision is None else {"revision": revision}
        report.sections["model"]["task"] = task_of(model, kwargs)
    if as_json:
        typer.echo(to_json(report.to_dict(), str))
    else:
        _show(report.sections, report.problems, report.advice)
    if report.problems:
        raise typer.Exit(1)


def _show(sections: dict[str, dict[str, object]], problems: list[str], advice: list[str]) -> None:
    from rich.console import Console
    from rich.text import Text

    from modernbert.cli.info import table_of

    console = Console(highlight=False, soft_wrap=True)
    for title, values in sections.items():
        console.print(Text(title, style="bold"))
        console.print(table_of(values))
    for title, lines, style in (("broken", problems, "bold red"), ("what would be better", advice, "bold")):
        if lines:
            console.print(Text(f"\n{title}", style=style))
            for line in lines:
                console.print(Text(f"- {printable(line, limit=400)}"))
    if not problems:
        console.print(Text("\nNothing is broken.", style="bold green"))
