"""Where a model computes and in which dtype: from what callers name to a device and a dtype; what it draws from."""

from __future__ import annotations

import functools
import logging
import os
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from modernbert.errors import shown

logger = logging.getLogger(__name__)

if hasattr(os, "register_at_fork"):
    # A forked process computes with one thread: the others stayed behind, and OpenMP would wait for them.
    os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))


def resolve_device(device: Any) -> torch.device:
    """The device that a caller names; an index or "auto" falls back to the CPU if there is no GPU.

    Raises:
        ValueError: the name means nothing, or names a GPU that is not there.
    """
    gpus = torch.cuda.device_count()
    if isinstance(device, Mapping):
        if set(device) != {""}:
            raise ValueError(
                f"device_map has the keys {sorted(device)}; a model goes to one device as a whole: {{'': 0}}"
            )
        device = device[""]
    if device is None or device in (-1, "cpu"):
        return torch.device("cpu")
    if device == "auto":
        device = 0 if gpus else "cpu"
    elif isinstance(device, str) and device.isdigit():
        device = int(device)
    if isinstance(device, int):
        if device < 0:
            raise ValueError(f"device is {device}; give a GPU's index, or -1 for the CPU")
        if device < gpus:
            return torch.device("cuda", device)
        if gpus:
            raise ValueError(f"device is {device}; this machine has GPUs 0 to {gpus - 1}")
        logger.warning("device %d was asked for and this machine has no GPU; the CPU is used", device)
        return torch.device("cpu")
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device is {device!r}; give 'cpu', 'cuda', 'cuda:0', an index or 'auto'") from error
    if place.type == "cuda" and (place.index or 0) >= gpus:
        raise ValueError(f"device is {device!r}; this machine has {gpus} GPUs")
    return place


def resolve_dtype(dtype: torch.dtype | str | None, stored: torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype to compute in: what the caller names, or what the checkpoint is stored in.

    float16 becomes float32 on a CPU, with a warning: it is slow there and overflows, and float32 holds its values
    exactly, on every processor.

    Raises:
        ValueError: the name is no floating dtype.
    """
    named: Any = (stored or torch.float32) if dtype in (None, "auto") else dtype
    if isinstance(named, str):
        named = getattr(torch, named.removeprefix("torch."), None)
    if not isinstance(named, torch.dtype):
        raise ValueError(f"dtype is {shown(dtype)}; give auto, float32, bfloat16 or float16")
    if not named.is_floating_point:
        raise ValueError(f"dtype is {named}; weights are float32, bfloat16 or float16")
    if named == torch.float16 and device.type == "cpu":
        warn_once(
            'float16 is for GPUs: on this CPU the weights are float32; for inference, dtype="bfloat16" takes half the '
            "memory"
        )
        return torch.float32
    return named


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning the first time that there is reason to."""
    logger.warning(message)


def set_seed(seed: int, deterministic: bool = False) -> None:
    """Seed the generators of Python, NumPy and PyTorch; `deterministic` has PyTorch take deterministic kernels, too."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)
