"""The interface of attention backends and the table they are chosen from.

Shapes: T tokens of all texts together, H heads, D head size.
"""

from __future__ import annotations

import abc
import importlib
import logging
from typing import Any

import torch
from torch import Tensor

from modernbert.nn.packing import Packing

logger = logging.getLogger(__name__)

Reach = tuple[int | None, int | None]

# The class of each name.
IMPLEMENTATIONS: dict[str, tuple[str, str]] = {
    "eager": ("modernbert.nn.attention.eager", "EagerAttention"),
    "sdpa": ("modernbert.nn.attention.sdpa", "SdpaAttention"),
    "native": ("modernbert.engines.cpu.attention", "NativeAttention"),
    "flash_attention_2": ("modernbert.engines.gpu.flash", "FlashAttention"),
    "flex_attention": ("modernbert.engines.gpu.flex", "FlexAttention"),
}


class AttentionBackend(abc.ABC):
    """Softmax attention of every token over its own text, or over a window of it.

    A backend is made once for a model. For each forward pass and each kind of layer it first makes a plan (masks,
    gathers: whatever the layers of a kind share), then serves each layer by that plan.

    Args:
        deterministic: take only kernels whose gradients are the same at every run.
    """

    name: str

    def __init__(self, deterministic: bool = False) -> None:
        self.deterministic = deterministic

    @abc.abstractmethod
    def plan(self, packing: Packing, reach: Reach, dtype: torch.dtype) -> Any:
        """What the layers of one reach share in one forward pass.

        Args:
            packing: where the texts lie.
            reach: inclusive (left, right) in positions; None on a side is to the text's end.
            dtype: of the q, k, v to come.
        """

    @abc.abstractmethod
    def attend(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, plan: Any, dropout: float = 0.0) -> Tensor:
        """Attention outputs of shape (T, H, D); scores are scaled by D**-0.5, `dropout` falls on the weights."""


def choose_backend(
    name: str | None,
    deterministic: bool = False,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> AttentionBackend:
    """Make the backend of this name; "auto" and None choose one for a device and a dtype, and log what and why.

    Raises:
        BackendError: the backend cannot run here; the message gives the reason.
        ValueError: there is no such name.
    """
    if name in (None, "auto"):
        name, reason = _best(device or torch.device("cpu"), dtype)
        logger.info("attention backend: %s (%s)", name, reason)
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"attn_implementation is {name!r}; choose one of auto, {', '.join(IMPLEMENTATIONS)}")
    module, attribute = IMPLEMENTATIONS[name]
    backend: AttentionBackend = getattr(importlib.import_module(module), attribute)(deterministic)
    return backend


def _best(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The fastest backend that is exact for numbers of a dtype on a device, and why it is that one."""
    if device.type == "cpu":
        return "sdpa", "on a CPU"
    if device.type != "cuda":
        return "sdpa", f"the others are not for {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return "sdpa", f"flash attention has no {dtype}".replace("torch.", "")
    flash, flex = (importlib.import_module(f"modernbert.engines.gpu.{file}").why_not() for file in ("flash", "flex"))
    if not flash:
        return "flash_attention_2", f"on {device.type}, {dtype}".replace("torch.", "")
    if torch.version.hip is not None and not flex:
        return "flex_attention", f"flash attention: {flash}"
    return "sdpa", f"flash attention: {flash}"
