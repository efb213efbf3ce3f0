"""`modernbert convert`: checkpoints of training runs to folders that every command loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="Sharded checkpoint folder of a run, or a .pt or .safetensors file of the original trainer."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder to make.")],
    config: Annotated[Path | None, typer.Option(help="JSON configuration, if the file has none.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or Hub repository, if the file has none.")] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read a .pt file, a pickle, as plain data (weights_only).")
    ] = False,
) -> None:
    """Write a training checkpoint in Hugging Face's format: a sharded one, or one of ModernBERT's original trainer."""
    from modernbert.training.pretraining.convert import convert as act

    act(source, output, config=config, tokenizer=tokenizer, allow_pickle=allow_pickle)
    typer.echo(f"written to {output}", err=True)
