"""The command line. Nothing here imports torch before a command runs that needs it."""

from __future__ import annotations

import sys
from typing import Any

import typer
import typer.core

from modernbert import __version__
from modernbert.cli.bench import bench
from modernbert.cli.convert import convert
from modernbert.cli.explain import attention, attribution
from modernbert.cli.finetune import finetune
from modernbert.cli.info import info
from modernbert.cli.messages import InterruptedCommandError, errors_in_flags, say, warnings_shown
from modernbert.cli.pretrain import evaluate, prepare_data, pretrain, train_tokenizer
from modernbert.cli.quantize import quantize
from modernbert.cli.run import embed, run, score

_KNOWING = ("run", "embed", "score")  # commands that name options of the library by themselves


class _Command(typer.core.TyperCommand):
    """A command whose errors name flags, and that refuses an option given twice, of which it would keep the last."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = self.make_parser(ctx).parse_args(args=list(args))[2] if args else []
        for option in given:
            once = option.param_type_name == "option" and not option.multiple and not getattr(option, "is_flag", False)
            if once and (times := given.count(option)) > 1:
                ctx.fail(f"{option.opts[0]} is given {times} times; give it once")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        options = self.params if self.name not in _KNOWING else ()
        with errors_in_flags({str(p.name): p.opts[0] for p in options if p.param_type_name == "option"}):
            return super().invoke(ctx)


app = typer.Typer(
    name="modernbert",
    help="ModernBERT in PyTorch: padding stops at the door.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(run)
app.command()(embed)
app.command()(score)
app.command()(info)
app.command()(bench)
app.command()(attention)
app.command()(attribution)
app.command("train-tokenizer")(train_tokenizer)
app.add_typer(finetune, name="finetune")
app.command("prepare-data")(prepare_data)
app.command("pretrain")(pretrain)
app.command()(evaluate)
app.command()(convert)
app.command()(quantize)
for _registered in (*app.registered_commands, *finetune.registered_commands):
    _registered.cls = _Command


_INTERRUPTED = 130  # exit code, as of a process that the signal ended


def _version(value: bool) -> None:
    if value:
        typer.echo(f"modernbert {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Run a command; bad input ends with one line on standard error and exit code 2."""
    with warnings_shown():
        try:
            code = app(args=arguments, standalone_mode=False)
        except InterruptedCommandError as error:
            say(error)
            sys.exit(error.code)
        except KeyboardInterrupt:
            code = _INTERRUPTED
        except Exception as error:
            message = _message(error)
            if message is None:
                raise
            say(message)
            sys.exit(2)
    if code == _INTERRUPTED:
        say("interrupted")
    sys.exit(code if isinstance(code, int) else 0)


def _message(error: Exception) -> str | None:
    """One line about an error that is the user's to mend; None for a defect of ours."""
    if hasattr(error, "format_message"):  # of the command line's own parser
        message = " ".join(str(error.format_message()).split())
        return f"{message} (try --help)" if message else "give a command (try --help)"
    if isinstance(error, ValueError | OSError | RuntimeError | TypeError) and type(error).__module__ in (
        "modernbert.errors",
        "builtins",
    ):
        defect = isinstance(error, TypeError | RuntimeError) and type(error).__module__ == "builtins"
        return None if defect else " ".join(str(error).split())
    return None
