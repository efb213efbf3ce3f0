"""`modernbert finetune TASK`: a command for each task, its flags the fields of the task's options."""

from __future__ import annotations

import dataclasses
import inspect
import os
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from modernbert.finetuning.options import OPTIONS, FinetuneOptions

finetune = typer.Typer(
    no_args_is_help=True,
    help="Fine-tune a model for a task: data in, a folder out that every other command loads.",
)
_FIRST = ("train", "eval", "output", "model", "column")  # what a user reads first stands first


def _command(task: str, options: type[FinetuneOptions]) -> Callable[..., None]:
    """The command of a task: a function with a parameter for each of its options."""

    def run(config: Path | None, resume: bool, **given: Any) -> None:
        from modernbert.finetuning.run import finetune as tune

        given = {name: value for name, value in given.items() if value not in (None, [])}
        _say(f"{task}: {options.__doc__ or ''}".strip())
        result = tune(task, config=config, resume=resume, say=_say, **given)
        if os.environ.get("RANK", "0") != "0":  # one process speaks for all
            return
        if result.outcome.stopped:
            _say(f"stopped early: {result.outcome.stopped}")
        for name, value in result.figures.items():
            typer.echo(f"{name:<24}{value:.4f}")
        _say(f"written to {result.output}; open {result.output / 'report.html'} for curves and errors")

    hints = typing.get_type_hints(options)
    fields = sorted(
        dataclasses.fields(options), key=lambda f: _FIRST.index(f.name) if f.name in _FIRST else len(_FIRST)
    )
    parameters = [_parameter(field, hints[field.name]) for field in fields]
    file = Annotated[Path | None, typer.Option(help="YAML file of options; flags count more.")]
    again = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of the run.")]
    parameters += [
        inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=file),
        inspect.Parameter("resume", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=again),
    ]
    typing.cast(Any, run).__signature__ = inspect.Signature(parameters)  # what typer makes flags of
    run.__doc__ = f"{options.__doc__}\n\nExample: modernbert finetune {task} --train train.jsonl --output runs/{task}"
    return run


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


def _say(line: str) -> None:
    typer.echo(line, err=True)


for _task, _options in OPTIONS.items():
    finetune.command(_task)(_command(_task, _options))
