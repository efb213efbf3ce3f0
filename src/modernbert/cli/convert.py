"""`modernbert convert`: checkpoints of training runs to folders that every command loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[
        Path,
        typer.Argument(help="Sharded checkpoint of a run, or a .pt or .safetensors file of ModernBERT's own trainer."),
    ],
    output: Annotated[Path, typer.Option(help="Folder to write; it must be new or empty.")],
    config: Annotated[Path | None, typer.Option(help="JSON configuration, if SOURCE has none.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer, a folder or Hub repository, if SOURCE has none.")
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read a .pt file, a pickle, as data; no code is run.")
    ] = False,
) -> None:
    """Convert a training checkpoint into a folder that this package and transformers load."""
    from modernbert.training.pretraining.convert import convert as act

    act(source, output, config=config, tokenizer=tokenizer, allow_pickle=allow_pickle)
    typer.echo(f"written to {output}", err=True)
