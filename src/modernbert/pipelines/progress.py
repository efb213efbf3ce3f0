"""A progress bar on standard error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def bar(name: str) -> Any:
    """A `rich` progress bar that writes to standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def progress_bar(items: Iterable[T], total: int | None, name: str) -> Iterator[T]:
    """The items, while a bar shows how many have passed.

    Args:
        items: anything.
        total: how many there are, or None where nobody knows.
        name: what stands before the bar.
    """
    with bar(name) as progress:
        task = progress.add_task(name, total=total)
        for item in items:
            yield item
            progress.advance(task)
