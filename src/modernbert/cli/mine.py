"""`modernbert mine`: hard negatives for a table of pairs."""

from __future__ import annotations

from typing import Any

import typer

from modernbert.checks import fields_of
from modernbert.cli.flags import flag, with_signature
from modernbert.cli.messages import in_flags
from modernbert.training.tasks.options import MineOptions


def _mine(**given: Any) -> None:
    from modernbert.training.mining import mine as act

    chosen = {name: value for name, value in given.items() if value not in (None, [])}
    mined = act(**chosen, progress=True, say=lambda line: typer.echo(in_flags(line), err=True))
    typer.echo(f"{mined.rows} rows, {mined.negatives} negatives; {mined.lacking} rows have fewer than were asked for")


_EXAMPLE = "modernbert mine --pairs pairs.jsonl --model runs/search --output hard.jsonl --skip 5 --most-similar 0.95"
mine = with_signature(_mine, map(flag, fields_of(MineOptions)), f"{MineOptions.__doc__}\n\nExample: {_EXAMPLE}")
