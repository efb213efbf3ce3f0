"""Commands whose flags are the fields of a dataclass of options."""

from __future__ import annotations

import dataclasses
import inspect
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modernbert.training.options import TrainingOptions

if TYPE_CHECKING:
    from modernbert.training.contract import Outcome


def command(
    options: type[TrainingOptions], act: Callable[[Path | None, bool, dict[str, Any]], None], file: str, example: str,
    first: Sequence[str] = (),
) -> Callable[..., None]:  # fmt: skip
    """A function that typer makes a command of: a flag for each option, one for a file of them, and `--resume`.

    Args:
        options: what it is about; its first line is the command's help.
        act: takes the file, whether to resume, and the options that were given.
        file: name of the flag for the file.
        example: shown below the help.
        first: names of options that stand first.
    """

    def run(resume: bool, **given: Any) -> None:
        path = given.pop(file)
        act(path, resume, {name: value for name, value in given.items() if value not in (None, [])})

    hints = typing.get_type_hints(options)
    order = {name: i for i, name in enumerate(first)}
    fields = sorted(dataclasses.fields(options), key=lambda field: order.get(field.name, len(order)))
    parameters = [_parameter(field, hints[field.name]) for field in fields]
    settings = Annotated[Path | None, typer.Option(help="YAML file of options; flags count more.")]
    again = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of the run.")]
    parameters += [
        inspect.Parameter(file, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=settings),
        inspect.Parameter("resume", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=again),
    ]
    typing.cast(Any, run).__signature__ = inspect.Signature(parameters)  # what typer makes flags of
    run.__doc__ = f"{options.__doc__}\n\nExample: {example}"
    return run


def tell(outcome: Outcome, figures: Mapping[str, float], output: Path) -> None:
    """Say how a run went: its figures on standard output, the rest beside them. One process speaks for all."""
    if os.environ.get("RANK", "0") != "0":
        return
    if outcome.stopped:
        typer.echo(f"stopped early: {outcome.stopped}", err=True)
    for name, value in figures.items():
        typer.echo(f"{name:<32}{value:.4f}")
    typer.echo(f"written to {output}; open {output / 'report.html'} for curves and errors", err=True)


def _parameter(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    """A flag that is None where it is not given, so that a file's options count; its help tells the default."""
    said = str(field.metadata["help"])
    if field.metadata["choices"]:
        said = f"{said.rstrip('.')}: {', '.join(field.metadata['choices'])}."
    if field.default not in (dataclasses.MISSING, None, ""):
        default = field.default if not isinstance(field.default, bool) else "yes" if field.default else "no"
        said += f" [default: {default}]"
    is_list = typing.get_origin(hint) is list
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    kind: Any = hint if is_list or not kinds else kinds[0]
    annotation = Annotated[kind | None, typer.Option(help=said, show_default=False)]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
