"""The interface of attention backends and the table they are chosen from.

Shapes: T tokens of all texts together, H heads, D head size.
"""

from __future__ import annotations

import abc
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modernbert.nn.packing import Packing

logger = logging.getLogger(__name__)

Reach = tuple[int | None, int | None]


class AttentionBackend(abc.ABC):
    """Softmax attention of every token over its own text, or over a window of it.

    A backend is made once for a model. For each pass and each kind of layer it makes a plan (masks, gathers: whatever
    the layers of a kind share), then serves each layer by that plan. A deterministic one takes only kernels whose
    gradients are the same at every run.
    """

    name: str

    def __init__(self, deterministic: bool = False) -> None:
        self.deterministic = deterministic

    @abc.abstractmethod
    def plan(self, packing: Packing, reach: Reach, dtype: torch.dtype) -> Any:
        """What the layers of one reach share in one pass; (left, right) is inclusive, None is the text's end."""

    @abc.abstractmethod
    def attend(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, plan: Any, dropout: float = 0.0) -> Tensor:
        """Attention outputs of shape (T, H, D); scores are scaled by D**-0.5, `dropout` falls on the weights."""


IMPLEMENTATIONS: dict[str, Callable[[bool], AttentionBackend]] = {}  # how the backend of each name is made
_CHOSEN_ON: dict[str, Callable[[torch.dtype], tuple[str, str]]] = {}


def register_backend(name: str, make: Callable[[bool], AttentionBackend]) -> None:
    """Add a backend by the name that `attn_implementation` takes; `make` is called with `deterministic`."""
    IMPLEMENTATIONS[name] = make


def register_choice(device_type: str, choose: Callable[[torch.dtype], tuple[str, str]]) -> None:
    """Say what "auto" takes on devices of a type: `choose` gives a dtype's backend by its name, and the reason."""
    _CHOSEN_ON[device_type] = choose


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
        place = "cpu" if device is None else device.type
        usual = "sdpa", "on a CPU" if place == "cpu" else f"the others are not for {place}"
        name, reason = _CHOSEN_ON[place](dtype) if place in _CHOSEN_ON else usual
        logger.info("attention backend: %s (%s)", name, reason)
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"attn_implementation is {name!r}; choose one of auto, {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[name](deterministic)
