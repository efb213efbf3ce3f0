"""The folder of a run: kept for one run at a time, and the settings that it was started with."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from modernbert import __version__
from modernbert.errors import InputError
from modernbert.files import naming, write_text
from modernbert.training.checkpoints import checkpoints, recover
from modernbert.training.options import TrainingOptions

SETTINGS, RESULTS, METRICS = "run.yaml", "results.json", "metrics.jsonl"
# What a run that goes on may change.
CHANGEABLE = {"epochs", "max_steps", "lr", "patience", "tracker", "device", "save_every", "eval_every", "keep_best"}


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


def write_settings(folder: Path, task: str, options: TrainingOptions) -> None:
    """Write the settings of a run into its folder."""
    values = {"task": task, "modernbert": __version__, **dataclasses.asdict(options)}
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / SETTINGS, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


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
        free: names of options that may change, beside `CHANGEABLE`.
    """
    if not checkpoints(folder):
        return
    kept = {name: value for name, value in before.items() if name not in CHANGEABLE and name not in free}
    changed = [
        f"{name} is {now!r} and was {was!r}" for name, was in kept.items() if (now := getattr(options, name)) != was
    ]
    if changed:
        raise InputError(f"{'; '.join(changed)} in the run in {folder}; resume it with the same options")


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
