"""The folder of a run: kept for one run at a time, its settings, and the history of its steps."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from modernbert import __version__
from modernbert.errors import InputError
from modernbert.io.files import locked, naming, write_text
from modernbert.training.checkpoints import checkpoints, last_checkpoint, recover, step_of
from modernbert.training.options import TrainingOptions

SETTINGS, RESULTS, METRICS = "run.yaml", "results.json", "metrics.jsonl"
# What a resumed run may change in silence, and what it may change with a line about it.
_SILENT = {"tracker", "save_every"}
_REPORTED = {"epochs", "max_steps", "lr", "patience", "eval_every", "keep_best", "device"}
_CHANGE = "# from step "  # how a line of the settings begins that reports a change


def read_settings(path: Path, task: str) -> dict[str, Any]:
    """Options of a YAML file for a task, by their names."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}; options by their names are wanted")
    of = values.pop("task", task)
    if of != task:
        raise InputError(f"{path} is for {of}, and the task is {task}")
    values.pop("modernbert", None)
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def settings_before(folder: Path, task: str) -> dict[str, Any]:
    """The settings of the run in a folder; none if there is no run."""
    path = folder / SETTINGS
    return read_settings(path, task) if path.is_file() else {}


def write_settings(folder: Path, task: str, options: TrainingOptions, changes: Sequence[str] = ()) -> None:
    """Write the settings of a run into its folder, below comments about what was changed on the way."""
    values = {"task": task, "modernbert": __version__, **dataclasses.asdict(options)}
    folder.mkdir(parents=True, exist_ok=True)
    comments = "".join(f"# {change}\n" for change in changes)
    write_text(folder / SETTINGS, comments + yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def check_unchanged(folder: Path, before: Mapping[str, Any], options: TrainingOptions, free: Collection[str]) -> None:
    """Raise `InputError` if a run that has checkpoints would continue with other options than it began with.

    Args:
        folder: of the run.
        before: its options until now; empty for a new run.
        options: those from here on.
        free: names of more options that may change.
    """
    may_change = {*_REPORTED, *_SILENT, *free}
    changed = _changed({name: value for name, value in before.items() if name not in may_change}, options)
    if changed and checkpoints(folder):
        raise InputError(f"{'; '.join(changed)} in the run in {folder}; resume it with the same options")


def changes_of(folder: Path, task: str, options: TrainingOptions, say: Callable[[str], None]) -> list[str]:
    """What a resumed run changed on its way, a line each; a new line is passed to `say` too."""
    if not (folder / SETTINGS).is_file():
        say(f"there is no run in {folder} yet; starting one")
        return []
    if not checkpoints(folder):
        say(f"the run in {folder} has saved nothing yet; starting it from the beginning")
        return []
    lines = (folder / SETTINGS).read_text(encoding="utf-8").splitlines()
    changes = [line.removeprefix("# ") for line in lines if line.startswith(_CHANGE)]
    before = {name: value for name, value in settings_before(folder, task).items() if name in _REPORTED}
    if changed := _changed(before, options):
        step = step_of(last_checkpoint(folder)[0])
        changes.append(
            f"from step {step} on: {'; '.join(changed)}; the weights may not be those of a run that began so"
        )
        say(changes[-1])
    return changes


def _changed(before: Mapping[str, Any], options: TrainingOptions) -> list[str]:
    now = dataclasses.asdict(options)
    return [f"{name} is {now[name]!r} and was {was!r}" for name, was in before.items() if now[name] != was]


@contextlib.contextmanager
def opened(folder: Path, resume: bool) -> Iterator[None]:
    """Keep a folder for this run alone; a new one that nothing was written to is removed again.

    Raises:
        InputError: it is in use, or holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output is {folder}, which is a file; name a folder")
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    made: list[Path] = []
    try:
        with locked(folder, f"output is {folder}, which another process is writing; name another folder"):
            made = missing  # of this run, and not of the one that keeps the folder
            found = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
            files = [name for name in found if not name.startswith(".")]
            holds = f"output is {folder}, which holds {files[0]}" if files else ""
            if files and not resume:
                raise InputError(f"{holds}; name another folder, or continue its run with resume=True")
            if files and SETTINGS not in files:
                raise InputError(f"{holds} and no run to resume; name another folder")
            recover(folder)
            yield
    finally:
        for place in made:
            if place.exists() and not any(place.iterdir()):
                place.rmdir()


def append_metrics(folder: Path, values: Mapping[str, Any]) -> None:
    """Add a step's values to the run's history."""
    path = folder / METRICS
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def trim_metrics(folder: Path, step: int) -> None:
    """Drop the steps after the checkpoint that a run resumes from, and a line that was not written whole."""
    path = folder / METRICS
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        with contextlib.suppress(ValueError):
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
    write_text(path, "".join(kept))
