"""Where a model computes and in which dtype: what callers may name, made definite."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

import torch

logger = logging.getLogger(__name__)


def resolve_device(device: Any) -> torch.device:
    """The device that a caller names; an index or "auto" falls back to the CPU where there is no GPU.

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
    if isinstance(device, str) and device.isdigit():
        device = int(device)
    if device == "auto":
        device = 0 if gpus else "cpu"
    if isinstance(device, int):
        if device < gpus:
            return torch.device("cuda", device)
        if gpus:
            raise ValueError(f"device is {device}; this machine has GPUs 0 to {gpus - 1}")
        logger.warning("device %d was asked for and this machine has no GPU; the CPU serves", device)
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

    Raises:
        ValueError: the name is no floating dtype.
    """
    if dtype in (None, "auto"):
        dtype = stored or torch.float32
    if isinstance(dtype, str):
        named = getattr(torch, dtype.removeprefix("torch."), None)
        if not isinstance(named, torch.dtype):
            raise ValueError(f"dtype is {dtype!r}; give auto, float32, bfloat16 or float16")
        dtype = named
    assert isinstance(dtype, torch.dtype)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; weights are float32, bfloat16 or float16")
    if dtype == torch.float16 and device.type == "cpu":
        instead = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
        _log_once(f"float16 is slow on a CPU; computing in {str(instead).removeprefix('torch.')}")
        return instead
    return dtype


@functools.cache
def _log_once(message: str) -> None:
    logger.info(message)
