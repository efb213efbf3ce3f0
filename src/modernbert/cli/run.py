"""`modernbert run`: a pipeline on texts from arguments, a file or standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from modernbert.errors import InputError


def run(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; without any, --file or standard input.")] = None,
    task: Annotated[str, typer.Option(help="What to do with each text.")] = "fill-mask",
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub repository; the package's small model if not given.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or Hub repository; the model's if not given.")] = None,
    file: Annotated[Path | None, typer.Option(help="File of texts, one a line.")] = None,
    top_k: Annotated[int | None, typer.Option(help="How many answers for each mask.")] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="A word to consider; repeat for several. Others are left out.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help='One object a line: {"input": ..., "output": ...}.')] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda:0, or a GPU's index.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")] = None,
    attn_implementation: Annotated[str | None, typer.Option(help="auto, eager or sdpa.")] = None,
) -> None:
    """Run a task on texts: arguments, a file or standard input, a line a text.

    Example: modernbert run "The capital of France is [MASK]."
    """
    if texts and file:
        raise InputError("texts are given both as arguments and by --file; give one of them")
    if not texts and file is None and sys.stdin.isatty():
        raise InputError("no text: give it as an argument, with --file, or on standard input")
    source: Iterable[str] = texts or _lines(file)

    from modernbert.pipelines import pipeline

    where = {"revision": revision, "attn_implementation": attn_implementation}
    options = {"top_k": top_k, "targets": target or None}
    serve = pipeline(task, model, tokenizer, device, dtype, **{k: v for k, v in where.items() if v is not None})
    given: dict[str, Any] = {k: v for k, v in options.items() if v is not None}
    seen: list[str] = []  # texts that wait for their answers

    def remembered() -> Iterator[str]:
        for text in source:
            seen.append(text)
            yield text

    answered = 0
    with _ProgressBar(len(texts) if texts else _count(file)) as advance:
        for output in serve.stream(remembered(), **given):
            text = seen.pop(0)
            if as_json:
                sys.stdout.write(json.dumps({"input": text, "output": output}, ensure_ascii=False) + "\n")
            else:
                _show(text, output)
            answered += 1
            advance()
    if not answered:
        raise InputError("no text: every line was empty")


def _lines(file: Path | None) -> Iterator[str]:
    """Lines that are not blank; each must be UTF-8."""
    name = str(file) if file else "standard input"
    stream = file.open("rb") if file else sys.stdin.buffer
    with stream:
        for number, line in enumerate(stream, 1):
            try:
                text = line.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise InputError(f"{name}, line {number}, is not UTF-8: {error.reason}") from error
            if text.strip():
                yield text


def _count(file: Path | None) -> int | None:
    if file is None:
        return None
    with file.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


class _ProgressBar:
    """A progress bar on standard error, where that is a terminal, the output is not, and there is much to do."""

    def __init__(self, total: int | None) -> None:
        self.progress: Any = None
        if sys.stderr.isatty() and not sys.stdout.isatty() and (total is None or total > 20):
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("texts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.progress = Progress(*columns, console=Console(stderr=True))
            self.task = self.progress.add_task("texts", total=total)

    def __enter__(self) -> Any:
        if self.progress is None:
            return lambda: None
        self.progress.start()
        return lambda: self.progress.advance(self.task)

    def __exit__(self, *error: object) -> None:
        if self.progress is not None:
            self.progress.stop()


def _show(text: str, output: Any) -> None:
    """Print a text and a table of its answers; several masks give several tables."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(text, style="bold"))
    lists = output if isinstance(output[0], list) else [output]
    for i, answers in enumerate(lists, 1):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("score", justify="right")
        table.add_column("word" if len(lists) == 1 else f"mask {i}")
        if len(lists) == 1:
            table.add_column("text")
        for answer in answers:
            cells: list[Any] = [
                f"{answer['score']:.3f}",
                Text(answer["token_str"].strip() or repr(answer["token_str"])),
            ]
            table.add_row(*cells, *([Text(answer["sequence"])] if len(lists) == 1 else []))
        console.print(table)
