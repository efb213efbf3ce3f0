"""`modernbert finetune TASK`: a command for each task, its flags the fields of the task's options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from modernbert.cli.flags import Say, command, tell
from modernbert.training.tasks.options import OPTIONS, FinetuneOptions

finetune = typer.Typer(
    no_args_is_help=True,
    help="Fine-tune a model for a task: data in, a folder out that every other command loads.",
)
_FIRST = ("train", "eval", "output", "model", "column")  # what a user reads first stands first


def _command(task: str, options: type[FinetuneOptions]) -> Callable[..., None]:
    """The command of a task."""

    def act(say: Say, config: Path | None, resume: bool, given: dict[str, Any]) -> None:
        from modernbert.training.finetuning import finetune as tune

        say(f"{task}: {options.__doc__ or ''}".strip())
        result = tune(task, config=config, resume=resume, say=say, **given)
        tell(result.outcome, result.figures, result.output)

    return command(f"finetune {task}", options, act, "config", f"--train train.jsonl --output runs/{task}", _FIRST)


for _task, _options in OPTIONS.items():
    finetune.command(_task)(_command(_task, _options))
