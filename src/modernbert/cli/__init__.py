"""The command line. Nothing here imports torch before a command runs that needs it."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer

from modernbert import __version__
from modernbert.cli.bench import bench
from modernbert.cli.convert import convert
from modernbert.cli.corpus import verify
from modernbert.cli.doctor import doctor
from modernbert.cli.explain import attention, attribution
from modernbert.cli.export import export
from modernbert.cli.finetune import finetune
from modernbert.cli.flags import Command
from modernbert.cli.info import info
from modernbert.cli.messages import InterruptedCommandError, say, warnings_shown
from modernbert.cli.mine import mine
from modernbert.cli.pretrain import evaluate, prepare_data, pretrain, train_tokenizer
from modernbert.cli.quantize import quantize
from modernbert.cli.run import TaskCommand, embed, run, score
from modernbert.cli.search import index, search
from modernbert.cli.serve import serve

app = typer.Typer(
    name="modernbert",
    help="Run, fine-tune, quantize and pretrain ModernBERT models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("run")(run)
app.command("embed")(embed)
app.command("score")(score)
app.command("verify")(verify)
app.command("serve")(serve)
app.command("index")(index)
app.command("search")(search)
app.command()(info)
app.command()(doctor)
app.command()(bench)
app.command()(attention)
app.command()(attribution)
app.command("train-tokenizer")(train_tokenizer)
app.add_typer(finetune, name="finetune")
app.command("mine")(mine)
app.command("prepare-data")(prepare_data)
app.command("pretrain")(pretrain)
app.command()(evaluate)
app.command()(convert)
app.command()(quantize)
app.command("export")(export)
for _registered in (*app.registered_commands, *finetune.registered_commands):
    _registered.cls = TaskCommand if _registered.name == "run" else Command


_INTERRUPTED = 130  # the exit code of a process that this signal ended


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
            _end(error.code)
        except KeyboardInterrupt:
            code = _INTERRUPTED
        except Exception as error:
            message = _message(error)
            if message is None:
                raise
            say(message)
            _end(2)
    if code == _INTERRUPTED:
        say("interrupted")
    sys.exit(code if isinstance(code, int) else 0)


def _end(code: int) -> NoReturn:
    """End after an error.

    Where a run of several processes breaks off, threads of PyTorch's still wait for the others, and would abort this
    process while Python shuts down, with another exit code: it ends at once.
    """
    group = sys.modules.get("torch.distributed")
    if group is not None and group.is_available() and group.is_initialized() and group.get_world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


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
