"""Progress of a run on standard error: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from modernbert.training.contract import Progress

_SECONDS_BETWEEN = 20.0


class Reporter:
    """Takes the progress of every step.

    Args:
        metric: the metric of evaluations to show.
        shown: whether to show anything.
    """

    def __init__(self, metric: str, shown: bool = True) -> None:
        self.metric, self.shown = metric, shown
        self.live: Any = None
        self.task: Any = None
        self.evaluated, self.loss = "", math.nan
        self.written = time.monotonic()

    def __enter__(self) -> Reporter:
        if self.shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self.live = Bar(*columns, console=Console(stderr=True))
            self.task = self.live.add_task("", total=None)
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.stop()

    def __call__(self, progress: Progress) -> None:
        if not self.shown:
            return
        # The loss of single batches jumps; its running mean shows the trend.
        self.loss = progress.loss if math.isnan(self.loss) else 0.9 * self.loss + 0.1 * progress.loss
        if self.metric in progress.metrics:
            self.evaluated = f" · held out: {self.metric} {progress.metrics[self.metric]:.4g}"
        line = (
            f"epoch {progress.epoch:.2f} · loss {self.loss:.4f} · {progress.tokens_per_second:,.0f} tokens/s · "
            f"{duration(progress.seconds_left)} left{self.evaluated}"
        )
        if self.live is not None:
            self.live.update(self.task, completed=progress.step, total=progress.steps, description=line)
            return
        last = progress.step == progress.steps
        if last or progress.metrics or time.monotonic() - self.written > _SECONDS_BETWEEN:
            self.written = time.monotonic()
            sys.stderr.write(f"step {progress.step}/{progress.steps} · {line}\n")
            sys.stderr.flush()


def to_stderr(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
