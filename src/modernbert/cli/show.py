"""Answers for people: a table for each input."""

from __future__ import annotations

from typing import Any

from modernbert.checks import short
from modernbert.errors import printable


def show(item: Any, output: Any) -> None:
    """Print an input and its answer.

    Args:
        item: the input.
        output: what the pipeline returned for it, or the `InputError` in its place.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    if isinstance(output, list) and output and isinstance(output[0], dict) and "generated_text" in output[0]:
        for answer in output:  # the text that it goes on from is in it
            console.print(Text(printable(f"{answer['generated_text']}\n", keep="\n\t")))
        return
    console.print(Text(printable(_title(item), keep="\n\t"), style="bold"))
    if isinstance(output, Exception):
        console.print(Text(f"not answered: {printable(str(output))}\n", style="red"))
    elif hasattr(output, "shape"):
        numbers = ", ".join(f"{x:.4f}" for x in output.reshape(-1)[:6])
        console.print(f"{' x '.join(map(str, output.shape))} numbers: {numbers}, ...\n")
    elif isinstance(output, list) and output and isinstance(output[0], list) and not isinstance(output[0][0], list):
        for i, answers in enumerate(output, 1):
            console.print(_table(answers, f"mask {i}"))
    elif isinstance(output, list) and output and isinstance(output[0], list):
        console.print(f"1 x {len(output[0])} x {len(output[0][0])} numbers\n")
    else:
        console.print(_table(_rows(output, item)))


def _title(item: Any) -> str:
    if not isinstance(item, dict):
        return item if isinstance(item, str) else short(item) if isinstance(item, list) else str(item)
    parts = [value for value in item.values() if isinstance(value, str)]
    return " | ".join(short(" ".join(part.split())) for part in parts) if parts else str(item)


def _rows(output: Any, item: Any) -> list[dict[str, Any]]:
    """An answer as rows of a table."""
    if isinstance(output, dict) and "labels" in output:
        pairs = zip(output["scores"], output["labels"], strict=True)
        return [{"score": score, "label": label} for score, label in pairs]
    if isinstance(output, dict) and "choice" in output:
        choices = zip(output["scores"], item["choices"], strict=True)
        return sorted(({"score": s, "choice": c} for s, c in choices), key=lambda row: -row["score"])
    return [output] if isinstance(output, dict) else list(output)


# Headings of columns, and columns that tell a reader nothing.
_NAMES = {"token_str": "word", "sequence": "text", "entity_group": "entity"}
_HIDDEN = {"token", "index"}


def _table(rows: list[dict[str, Any]], word: str = "word") -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    if not rows:
        return Text("nothing found\n")
    several_masks = word != "word"
    names = [n for n in rows[0] if n not in _HIDDEN and not (several_masks and n == "sequence")]
    names.sort(key=lambda name: name != "score")
    for name in names:
        heading = word if name == "token_str" else _NAMES.get(name, name)
        table.add_column(printable(heading), justify="right" if isinstance(rows[0][name], int | float) else "left")
    for row in rows:
        table.add_row(*(Text(_cell(row[name])) for name in names))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = " ".join(str(value).split())
    return printable(text) or repr(value)
