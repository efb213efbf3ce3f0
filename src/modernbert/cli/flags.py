"""Commands whose flags are the fields of a dataclass of options."""

from __future__ import annotations

import inspect
import os
import shlex
import signal
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from modernbert.checks import OptionField, fields_of
from modernbert.cli.messages import InterruptedCommandError, errors_in_flags, in_flags
from modernbert.errors import TerminatedRunError
from modernbert.training.options import TrainingOptions
from modernbert.training.threads import share_cores

if TYPE_CHECKING:
    from modernbert.training.contract import Outcome

Say = Callable[[str], None]
Act = Callable[[Say, Path | None, bool, dict[str, Any]], None]


class Command(typer.core.TyperCommand):
    """A command whose errors name flags, and that refuses an option given twice, of which it would keep the last."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = self.make_parser(ctx).parse_args(args=list(args))[2] if args else []
        for option in given:
            once = option.param_type_name == "option" and not option.multiple and not getattr(option, "is_flag", False)
            if once and (times := given.count(option)) > 1:
                ctx.fail(f"{option.opts[0]} is given {times} times; give it once")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with errors_in_flags({str(p.name): p.opts[0] for p in self.params if p.param_type_name == "option"}):
            return super().invoke(ctx)


def flag(
    field: OptionField,
    described: str | None = None,
    *,
    hidden: bool = False,
    both: bool = False,
) -> inspect.Parameter:
    """A flag for an option, None where it is not given; its help says the default.

    Args:
        field: the option.
        described: shown instead of its own description.
        hidden: whether help leaves it out.
        both: whether a switch that is off by default can be switched off, too, such as over a file that has it on.
    """
    kinds = [typing.get_args(kind)[0] if typing.get_origin(kind) else kind for kind in field.kinds]
    kind: Any = types.GenericAlias(list, (kinds[-1],)) if field.is_list else kinds[0]
    said = (field.described if described is None else described) + (" Repeat for several." if field.is_list else "")
    pair = kind is bool and (both or field.default is not False)
    name = f"--{field.flag}/--no-{field.flag}" if pair else f"--{field.flag}"
    annotation = Annotated[kind | None, typer.Option(name, help=said, show_default=False, hidden=hidden)]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def with_signature(function: Callable[..., None], parameters: Iterable[inspect.Parameter], doc: str) -> Any:
    """The function with what typer makes flags and help of."""
    ordered = sorted(parameters, key=lambda parameter: parameter.default is not inspect.Parameter.empty)
    typing.cast(Any, function).__signature__ = inspect.Signature(ordered)
    function.__doc__ = doc
    return function


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

    def say(line: str) -> None:
        typer.echo(in_flags(line), err=True)

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
        """The message about the run's end, with the command that continues from there."""
        again = shlex.join(["modernbert", *name.split(), "--output", str(chosen.get("output")), "--resume"])
        return in_flags(said) + (f" ({again})" if "output" in chosen else "")

    order = {name: i for i, name in enumerate(first)}
    fields = sorted(fields_of(options), key=lambda field: order.get(field.name, len(order)))
    flags = {field.name: f"--{field.flag}" for field in fields}
    parameters = [flag(field, in_flags(field.described, flags), both=True) for field in fields]
    settings = Annotated[Path | None, typer.Option(help="YAML file of options; flags override it.")]
    again = Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in --output.")]
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters.append(inspect.Parameter(file, keyword, default=None, annotation=settings))
    parameters.append(inspect.Parameter("resume", keyword, default=False, annotation=again))
    return with_signature(run, parameters, f"{options.__doc__}\n\nExample: modernbert {name} {example}")


def tell(outcome: Outcome, metrics: Mapping[str, float], output: Path) -> None:
    """Print the metrics of a run on standard output, all else on standard error; the first process does it for all."""
    if os.environ.get("RANK", "0") != "0":
        return
    if outcome.stopped:
        typer.echo(f"stopped early: {outcome.stopped}", err=True)
    for name, value in metrics.items():
        typer.echo(f"{name:<32}{value:.4f}")
    typer.echo(f"written to {output}; open {output / 'report.html'} for curves and errors", err=True)


def _before_the_first_step(output: str | None) -> str:
    """What to do after an interruption while everything was being set up, or after the last step."""
    if output is None:  # a file names it
        return "interrupted; the same command with --resume continues from what is saved, if anything is"
    if any(Path(output).glob("checkpoint-*")):
        return "interrupted; the same command with --resume continues from what is saved"
    again = "the same command with --resume" if Path(output).exists() else "the same command"
    return f"interrupted; nothing is saved yet: {again} starts from the beginning"
