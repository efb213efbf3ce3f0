"""Pipelines: text in, answers out. One file a task, one line in the table."""

from __future__ import annotations

import importlib
from importlib.resources import files
from pathlib import Path
from typing import Any

from modernbert.errors import InputError
from modernbert.pipelines.base import Pipeline

# Task -> its class, and the small model that comes with the package and serves where none is named.
TASKS: dict[str, tuple[str, str]] = {
    "fill-mask": ("modernbert.pipelines.fill_mask.FillMaskPipeline", "encoder"),
}


def small_model(name: str = "encoder") -> Path:
    """Folder of the small checkpoint that comes with the package."""
    return Path(str(files("modernbert"))) / "small" / name


def pipeline(
    task: str | None = None,
    model: Any = None,
    tokenizer: Any = None,
    device: Any = None,
    dtype: Any = None,
    *,
    torch_dtype: Any = None,
    **kwargs: Any,
) -> Pipeline:
    """Make a pipeline: a model and its tokenizer, ready for texts.

    Args:
        task: one of the tasks, such as "fill-mask".
        model: a model, a folder, or a repository on the Hub; None takes the small model that comes with the
            package, offline.
        tokenizer: a tokenizer or where to find one; None takes the model's.
        device: such as "cpu", "cuda:0" or 0; None takes the CPU.
        dtype: dtype of the weights, "auto" for the checkpoint's.
        torch_dtype: older spelling of `dtype`.
        kwargs: `attn_implementation`, `device_map`, `revision`, `subfolder`, `cache_dir`, `token`,
            `local_files_only`, `batch_tokens`, `batch_size`, and the task's own options, which become defaults
            of its calls.

    Raises:
        InputError: the task is unknown or not given.
        NotFoundError, CheckpointError: the model cannot be loaded.
    """
    if task not in TASKS:
        raise InputError(f"task is {task!r}; choose one of {', '.join(TASKS)}")
    path, small = TASKS[task]
    module, _, name = path.rpartition(".")
    cls: type[Pipeline] = getattr(importlib.import_module(module), name)
    dtype = torch_dtype if dtype is None else dtype
    if model is None:
        model = small_model(small)
        dtype = "float32" if dtype is None else dtype
    return cls.load(model, tokenizer, device=device, dtype=dtype, **kwargs)


__all__ = ["TASKS", "Pipeline", "pipeline", "small_model"]
