"""Commands whose flags are the fields of a dataclass of options."""

from __future__ import annotations

import dataclasses
import inspect
import os
import shlex
import signal
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modernbert.cli.messages import InterruptedCommandError, flags_of, in_flags
from modernbert.errors import TerminatedRunError
from modernbert.training.options import TrainingOptions
from modernbert.training.threads import share_cores

if TYPE_CHECKING:
    from modernbert.training.contract import Outcome

Say = Callable[[str], None]
Act = Callable[[Say, Path | None, bool, dict[str, Any]], None]


def command(
    name: str, options: type[TrainingOptions], act: Act, file: str, example: str, first: Sequence[str] = ()
) -> Callable[..., None]:
    """A function that typer makes a command of: a flag for each option, one for a file of them, and `--resume`.

    Args:
        name: of the command, as it is typed.
        options: what it is about; its first line is the command's help.
        act: takes what says a line, the file, whether to resume, and the options that were given.
        file: name of the flag for the file.
        example: shown below the help: the command's options.
        first: names of options that stand first.
    """
    flags = flags_of([*(field.name for field in dataclasses.fields(options)), file, "resume"])

    def say(line: str) -> None:
        typer.echo(in_flags(line, flags), err=True)

    def run(resume: bool, **given: Any) -> None:
        share_cores()
        path = given.pop(file)
        chosen = {option: value for option, value in given.items() if value not in (None, [])}
        try:
            act(say, path, resume, chosen)
        except TerminatedRunError as error:
            raise InterruptedCommandError(go_on(str(error), chosen), 128 + signal.SIGTERM) from None
        except KeyboardInterrupt as error:
            if os.environ.get("RANK", "0") != "0":
                raise
            message = go_on(str(error), chosen) if str(error) else _before_the_first_step(chosen.get("output"))
            raise InterruptedCommandError(message) from None

    def go_on(said: str, chosen: Mapping[str, Any]) -> str:
        """What the run says of its end, with the command that goes on from there."""
        message = in_flags(said, flags)
        if "output" in chosen:
            again = ["modernbert", *name.split(), "--output", chosen["output"], "--resume"]
            message += f" ({shlex.join(again)})"
        return message

    hints = typing.get_type_hints(options)
    order = {name: i for i, name in enumerate(first)}
    fields = sorted(dataclasses.fields(options), key=lambda field: order.get(field.name, len(order)))
    parameters = [_parameter(field, hints[field.name], flags) for field in fields]
    settings = Annotated[Path | None, typer.Option(help="YAML file of options; flags count more.")]
    again = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of the run.")]
    parameters += [
        inspect.Parameter(file, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=settings),
        inspect.Parameter("resume", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=again),
    ]
    typing.cast(Any, run).__signature__ = inspect.Signature(parameters)  # what typer makes flags of
    run.__doc__ = f"{options.__doc__}\n\nExample: modernbert {name} {example}"
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


def _before_the_first_step(output: str | None) -> str:
    """What to do after an interruption while everything was being set up, or after the last step."""
    if output is None:  # a file names it
        return "interrupted; the same command with --resume goes on from what is saved, if anything is"
    if any(Path(output).glob("checkpoint-*")):
        return "interrupted; the same command with --resume goes on from what is saved"
    again = "the same command with --resume" if Path(output).exists() else "the same command"
    return f"interrupted; nothing is saved yet: {again} starts from the beginning"


def _parameter(field: dataclasses.Field[Any], hint: Any, flags: Mapping[str, str]) -> inspect.Parameter:
    """A flag that is None where it is not given, so that a file's options count; its help says the default.

    Default and "required" stand in round brackets: square ones are marks of style where help is drawn.
    """
    said = str(field.metadata["help"])
    if field.metadata["choices"]:
        said = f"{said.rstrip('.')}: {', '.join(field.metadata['choices'])}."
    if field.metadata["required"]:
        said += " (required)"
    else:
        default = field.metadata["otherwise"] or field.default
        default = {True: "yes", False: "no"}[default] if isinstance(default, bool) else default
        said += f" (default: {default})"
    said = in_flags(said, flags)
    is_list = typing.get_origin(hint) is list
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    kind: Any = hint if is_list or not kinds else kinds[0]
    annotation = Annotated[kind | None, typer.Option(help=said, show_default=False)]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
