"""`modernbert index` and `modernbert search`: folders and files as an index of passages, and questions to it."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from modernbert.checks import fields_of
from modernbert.cli.flags import flag, with_signature
from modernbert.cli.messages import InterruptedCommandError, counted, in_flags, say
from modernbert.errors import printable
from modernbert.indexing.options import IndexOptions, SearchOptions

_SHOWN = 400  # characters of a passage
_DEVICE = Annotated[str | None, typer.Option(help="cpu, cuda:0, or the number of a GPU. (default: cpu)")]
_JSON = typer.Option("--json", help="Print JSON.")


def _index(
    places: Annotated[list[Path], typer.Argument(help="Folders and files.")],
    output: Annotated[Path, typer.Option(help="Folder of the index, made where missing.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Encoder, a folder or Hub repository. (default: the index's, or the package's sentence encoder)"
        ),
    ] = None,
    device: _DEVICE = None,
    as_json: Annotated[bool, _JSON] = False,
    **options: Any,
) -> None:
    from modernbert.indexing import build_index

    chosen = {name: value for name, value in options.items() if value not in (None, [])}
    try:
        report = build_index(places, output, model, device=device, progress=sys.stderr.isatty(), **chosen)
    except KeyboardInterrupt:
        raise InterruptedCommandError(
            f"interrupted; {output} keeps what is done, and the same command goes on"
        ) from None
    for reason in report.failed.values():
        say(in_flags(reason))
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(report)))
    else:
        done = [f"{n} {name}" for name in ("added", "changed", "removed", "unchanged") if (n := getattr(report, name))]
        done += [f"{len(report.failed)} not read"] if report.failed else []
        files = f"files: {', '.join(done) or 'none'}"
        typer.echo(f"{output} holds {counted(report.passages, 'passage')}, {report.embedded} of them new; {files}")
    if report.failed:
        raise typer.Exit(1)


def _search(
    index: Annotated[Path, typer.Argument(help="Folder of an index.")],
    question: Annotated[str, typer.Argument(help="What to look for.")],
    model: Annotated[str | None, typer.Option(help="Where the index's model is now. (default: where it was)")] = None,
    reranker: Annotated[
        str | None, typer.Option(help="Model of text-ranking that orders the best passages. (default: none)")
    ] = None,
    device: _DEVICE = None,
    as_json: Annotated[bool, _JSON] = False,
    **options: Any,
) -> None:
    from modernbert.indexing import open_index

    opened = open_index(index, model, reranker, device=device)
    results = opened.search(question, **{name: value for name, value in options.items() if value is not None})
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(result) for result in results], ensure_ascii=False))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for number, result in enumerate(results, 1):
        columns = "".join(f", {name}: {value}" for name, value in result.columns.items())
        title = printable(f"{result.place}{columns}", limit=300)
        console.print(Text.assemble(f"{number}. ", (title, "cyan"), f"  {result.score:.4f}"))
        console.print(_excerpt(result.text, result.marks, Text), "")
    if not results:
        console.print("nothing found")


def _excerpt(text: str, marks: list[tuple[int, int]], make: Any) -> Any:
    """The part of a passage with the most marks, these in bold, on one line."""
    starts = [0, *(start for start, _ in marks)] if len(text) > _SHOWN else [0]
    held = {start: sum(start <= a and b <= start + _SHOWN for a, b in marks) for start in starts}
    first = max(starts, key=lambda start: (held[start], -start))
    first = max(0, min(text.rfind(" ", 0, max(0, first - 40)) + 1, len(text) - _SHOWN))
    last = min(len(text), first + _SHOWN)
    out = make("... " if first else "")
    place = first
    for start, end in [(a, b) for a, b in marks if first <= a and b <= last] + [(last, last)]:
        out.append(_line(text[place:start]))
        out.append(printable(text[start:end]), style="bold")
        place = end
    return out.append(" ..." if last < len(text) else "")


def _line(text: str) -> str:
    """A part of a text with its white space as single spaces."""
    return printable(" ".join(f"|{text}|".split())[1:-1]) if text else ""


def _command(function: Any, options: Any, doc: str) -> Any:
    own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "options"]
    keyword, default = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.empty
    own = [p.replace(kind=keyword) for p in own]
    required = [p for p in own if p.default is default]
    flags = [flag(field) for field in fields_of(options)]
    return with_signature(function, [*required, *(p for p in own if p not in required), *flags], doc)


index = _command(
    _index,
    IndexOptions,
    """Make an index of documents to search, or bring one up to date.

    Read are .txt, .md, .html, .pdf, .jsonl, .csv, .tsv and .parquet. Only files whose content changed
    are embedded; what is not there any more is removed. After an interruption the same command goes on.

    Example: modernbert index notes/ report.pdf --output notes.index --model Alibaba-NLP/gte-modernbert-base
    """,
)
search = _command(
    _search,
    SearchOptions,
    """Search an index by meaning and by words.

    Example: modernbert search notes.index "when is the rent due?" --where "path LIKE '%.pdf'"
    """,
)
