"""Checkpoints of a run: a folder a step, written whole or not at all, in safetensors and JSON.

A checkpoint holds the model in its ordinary form, the optimizer's state by the parameters' names, and the state of
the run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modernbert.errors import CheckpointError, InputError
from modernbert.io.files import replace_folder

logger = logging.getLogger(__name__)
STATE, ABOUT = "optimizer.safetensors", "trainer.json"
_REMEMBERED = {"best", "since_best", "seconds", "tokens", "data"}


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a run, by their steps."""
    found = [p for p in output.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of)


def resumable(output: Path) -> str:
    """What an interrupted run can continue from, in words."""
    found = checkpoints(output)
    if not found:
        return "nothing is saved yet; resume=True starts from the beginning"
    return f"{found[-1]} is saved; resume=True continues from it"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def write_checkpoint(
    output: Path,
    step: int,
    save_model: Callable[[Path], None],
    state: dict[str, Tensor] | None,
    about: dict[str, Any],
    keep: Collection[int] = (),
) -> Path:
    """Write `checkpoint-STEP` whole, then remove those before it.

    Args:
        output: folder of the run.
        step: the step that was done last.
        save_model: writes the model into a folder.
        state: of the optimizer; None if every process called `write_part`.
        about: the state of the run, for JSON.
        keep: steps whose checkpoints stay.

    Raises:
        OSError: there is no room, or no permission; the checkpoints before are untouched.
    """
    older = [path for path in checkpoints(output) if step_of(path) not in {step, *keep}]
    temporary, final = _temporary(output, step), output / f"checkpoint-{step}"
    if state is not None:  # else the folder holds the processes' parts already
        shutil.rmtree(temporary, ignore_errors=True)
    with _whole_or_not(output, step):
        save_model(temporary)
        if state is not None:
            save_file(state, temporary / STATE)
        (temporary / ABOUT).write_text(json.dumps({"step": step, **about}, indent=2), encoding="utf-8")
        replace_folder(temporary, final)
    for path in older:
        shutil.rmtree(path, ignore_errors=True)
    return final


def write_part(output: Path, step: int, state: dict[str, Tensor], number: int, processes: int) -> None:
    """Write one process's part of a checkpoint that `write_checkpoint` finishes once all have."""
    temporary = _temporary(output, step)
    with _whole_or_not(output, step):
        temporary.mkdir(parents=True, exist_ok=True)
        save_file(state, temporary / f"shard-{number:05}-of-{processes:05}.safetensors")


def discard(output: Path, step: int) -> None:
    """Remove the parts of an unfinished checkpoint."""
    shutil.rmtree(_temporary(output, step), ignore_errors=True)


def recover(output: Path) -> None:
    """Put back the checkpoint that a run was replacing when it was killed; see `modernbert.io.files.replace_folder`."""
    for previous in output.glob(".checkpoint-*.previous"):
        final = output / previous.name.removeprefix(".").removesuffix(".previous")
        if final.exists():
            shutil.rmtree(previous, ignore_errors=True)
        else:
            previous.rename(final)


def _temporary(output: Path, step: int) -> Path:
    return output / f".checkpoint-{step}"


@contextlib.contextmanager
def _whole_or_not(output: Path, step: int) -> Iterator[None]:
    """Leave nothing of a checkpoint that cannot be written, and say which one is whole."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(_temporary(output, step), ignore_errors=True)
        final = output / f"checkpoint-{step}"
        whole = [path for path in checkpoints(output) if path != final]
        last = f"{whole[-1]} is whole" if whole else "there is none before it"
        raise OSError(f"{final} cannot be written: {error}; {last}") from error


def last_checkpoint(output: Path) -> tuple[Path, dict[str, Any]]:
    """The last whole checkpoint of a run and the run's state; damaged ones after it are passed over.

    Raises:
        InputError: there is none.
    """
    found = checkpoints(output)
    if not found:
        raise InputError(f"{output} holds no checkpoint to resume from")
    damages = []
    for checkpoint in reversed(found):
        about, damage = _read(checkpoint)
        if about is not None:
            return checkpoint, about
        damages.append(damage)
    raise InputError(f"no checkpoint of {output} is whole: {damages[0]}; name another folder and start anew")


def best_before(output: Path) -> Any:
    """The step and the value of the best evaluation known to the last whole checkpoint; None without one."""
    with contextlib.suppress(InputError):
        return last_checkpoint(output)[1]["best"]
    return None


def set_damaged_aside(output: Path, last: Path) -> None:
    """Rename what stands after the last whole checkpoint to `checkpoint-STEP.damaged`, with one warning for each."""
    for path in checkpoints(output):
        if step_of(path) > step_of(last):
            damage = _read(path)[1]
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            logger.warning("%s; it is renamed to %s, and the run continues from %s", damage, aside.name, last)


def _read(checkpoint: Path) -> tuple[dict[str, Any] | None, str]:
    """The state of the run in a checkpoint; or None, and what is damaged."""
    path = checkpoint / ABOUT
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(about, dict) or not set(about) >= _REMEMBERED:
            raise ValueError("it lacks the state of the run")
        tensors = sorted(checkpoint.glob("*.safetensors"))
        if len(tensors) < 1 + (tensors[:1] == [checkpoint / STATE]):
            raise ValueError("it lacks its weights")
        for path in tensors:
            with safe_open(path, framework="pt"):
                pass
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        return None, f"{path} is damaged ({' '.join(str(error).split())[:120]})"
    return about, ""


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as tensors by "parameter/key"."""
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"{name}/{key}"] = value.detach().contiguous()
    return state


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Put back the `optimizer_state` of a checkpoint."""
    try:
        state = load_file(checkpoint / STATE)
    except SafetensorError as error:
        raise CheckpointError(f"{checkpoint / STATE} is not a whole safetensors file: {error}") from error
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        name, _, part = key.rpartition("/")
        found.setdefault(name, {})[part] = value
    for name, parameter in model.named_parameters():
        if name in found:  # counts of steps stay on the CPU, where optimizers keep them
            optimizer.state[parameter] = {
                part: value if part == "step" else value.to(parameter.device) for part, value in found[name].items()
            }


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Raise the safetensors library's error about a full disk or a missing permission as `OSError`."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"the model cannot be written to {folder}: {error}") from error
