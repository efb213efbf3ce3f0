"""The folder of a run: kept for one run at a time, and the settings that it was started with."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from modernbert import __version__
from modernbert.errors import InputError
from modernbert.io.files import naming, write_text
from modernbert.training.checkpoints import checkpoints, last_checkpoint, recover, step_of
from modernbert.training.options import TrainingOptions

SETTINGS, RESULTS, METRICS = "run.yaml", "results.json", "metrics.jsonl"
# What a run that goes on may change without becoming another one, and what it may change if it says so.
_HARMLESS = {"tracker", "save_every"}
_TOLD = {"epochs", "max_steps", "lr", "patience", "eval_every", "keep_best", "device"}
_CHANGE = "# from step "  # how a line of the settings begins that says what was changed on the way


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


def settings_before(folder: str | Path | None, task: str) -> dict[str, Any]:
    """The settings of the run in a folder; none where there is no run."""
    path = None if folder is None else Path(folder) / SETTINGS
    return read_settings(path, task) if path is not None and path.is_file() else {}


def resumed(given: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a run that goes on: those of a file count more than those before, but not where they are null."""
    return {**before, **{name: value for name, value in given.items() if value is not None or name not in before}}


def write_settings(folder: Path, task: str, options: TrainingOptions, changes: Sequence[str] = ()) -> None:
    """Write the settings of a run into its folder, below comments that say what was changed on the way."""
    values = {"task": task, "modernbert": __version__, **dataclasses.asdict(options)}
    folder.mkdir(parents=True, exist_ok=True)
    comments = "".join(f"# {change}\n" for change in changes)
    write_text(folder / SETTINGS, comments + yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def going_on(folder: Path, task: str, options: TrainingOptions, say: Callable[[str], None]) -> list[str]:
    """What a resumed run changed on its way, a line each; what is new about it is said.

    Args:
        folder: of the run, with the settings that it had until now.
        task: its name.
        options: those from here on; `check_unchanged` let them pass.
        say: takes a line.
    """
    path = folder / SETTINGS
    if not path.is_file():
        say(f"there is no run in {folder} yet; starting one")
        return []
    if not checkpoints(folder):
        say(f"the run in {folder} has saved nothing yet; starting it from its beginning")
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    changes = [line.removeprefix("# ") for line in lines if line.startswith(_CHANGE)]
    before = settings_before(folder, task)
    changed = _changed({name: value for name, value in before.items() if name in _TOLD}, options)
    if changed:
        step = step_of(last_checkpoint(folder)[0])
        line = f"from step {step} on: {'; '.join(changed)}; the weights may not be those of a run that began so"
        say(line)
        changes.append(line)
    return changes


@contextlib.contextmanager
def opened(folder: Path, resume: bool) -> Iterator[None]:
    """Keep a folder for this run alone; a new one that nothing was written to is removed again.

    Raises:
        InputError: it is in use, or holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output is {folder}, which is a file; name a folder")
    is_new = not folder.exists()
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"output is {folder}, which another process is writing; name another folder") from None
    try:
        files = [] if is_new else sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        if files and not resume:
            raise InputError(
                f"output is {folder}, which holds {files[0]}; name another folder, or go on with its run: resume=True"
            )
        if files and SETTINGS not in files:
            raise InputError(f"output is {folder}, which holds {files[0]} and no run to resume; name another folder")
        recover(folder)
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # before it is released: later it could be another process's
        lock.release()
        for place in made:
            if place.exists() and not any(place.iterdir()):
                place.rmdir()


def check_unchanged(folder: Path, before: Mapping[str, Any], options: TrainingOptions, free: Collection[str]) -> None:
    """Raise `InputError` where a run that has checkpoints would go on with other options than it began with.

    Args:
        folder: of the run.
        before: its options until now; empty for a new run.
        options: those from here on.
        free: names of options that may change, beside those that `going_on` tells of.
    """
    if not checkpoints(folder):
        return
    may_change = {*_TOLD, *_HARMLESS, *free}
    if changed := _changed({name: value for name, value in before.items() if name not in may_change}, options):
        raise InputError(f"{'; '.join(changed)} in the run in {folder}; resume it with the same options")


def _changed(before: Mapping[str, Any], options: TrainingOptions) -> list[str]:
    now = dataclasses.asdict(options)
    return [f"{name} is {now[name]!r} and was {was!r}" for name, was in before.items() if now[name] != was]


def check_libraries(*names: str) -> None:
    """Raise `InputError` before the work where a library is missing that is wanted after it."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"training needs {name}: pip install 'modernbert[train]'")


def append_metrics(folder: Path, values: Mapping[str, Any]) -> None:
    """Add a step's figures to the run's history."""
    path = folder / METRICS
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def trim_metrics(folder: Path, step: int) -> None:
    """Forget the steps after the checkpoint that a run goes on from, and a line that was not written whole."""
    path = folder / METRICS
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        with contextlib.suppress(ValueError):
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
    write_text(path, "".join(kept))
