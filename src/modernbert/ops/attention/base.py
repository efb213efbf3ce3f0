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

from modernbert.errors import BackendError
from modernbert.ops.packing import Packing

logger = logging.getLogger(__name__)

Reach = tuple[int | None, int | None]

# The class of each name. A name without one is known, and says why it cannot run.
IMPLEMENTATIONS: dict[str, tuple[str, str] | str] = {
    "eager": ("modernbert.ops.attention.eager", "EagerAttention"),
    "sdpa": ("modernbert.ops.attention.sdpa", "SdpaAttention"),
    "native": ("modernbert.ops.attention.native", "NativeAttention"),
    "flash_attention_2": "this release has no flash attention backend; choose 'sdpa', which is as exact",
    "flex_attention": "this release has no flex attention backend; choose 'sdpa', which is as exact",
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


def choose_backend(name: str | None, deterministic: bool = False) -> AttentionBackend:
    """Make the backend of this name; "auto" and None choose, and log what they chose.

    Raises:
        BackendError: the backend cannot run here; the message gives the reason.
        ValueError: there is no such name.
    """
    if name in (None, "auto"):
        name = "sdpa"
        logger.info("attention backend: %s", name)
    entry = IMPLEMENTATIONS.get(str(name))
    if entry is None:
        raise ValueError(f"attn_implementation is {name!r}; choose one of auto, {', '.join(IMPLEMENTATIONS)}")
    if isinstance(entry, str):
        raise BackendError(f"attn_implementation {name!r} cannot run here: {entry}")
    module, attribute = entry
    backend: AttentionBackend = getattr(importlib.import_module(module), attribute)(deterministic)
    return backend
