"""`modernbert serve`: models over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from modernbert.checks import fields_of
from modernbert.cli.flags import flag, with_signature
from modernbert.errors import InputError
from modernbert.serving.options import ServeOptions, read_options


def _run(config: Path | None, **given: Any) -> None:
    from modernbert.serving.workers import run

    chosen = {name: value for name, value in given.items() if value not in (None, [])}
    code = run({**(read_options(config) if config else {}), **chosen})
    if code:
        raise InputError("the server ended before its time; the lines above say why")


_FILE = Annotated[Path | None, typer.Option("--config", help="YAML file of these options; flags override it.")]


def _parameters() -> list[Any]:
    import inspect

    first = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_FILE)
    return [*(flag(field, both=True) for field in fields_of(ServeOptions)), first]


serve = with_signature(
    _run,
    _parameters(),
    """Serve models over HTTP, in the shapes of OpenAI, Cohere, text-embeddings-inference and vLLM.

    Without --model the package's small models are served. /docs describes every path.

    Example: modernbert serve --model Alibaba-NLP/gte-modernbert-base --port 8000
    """,
)
