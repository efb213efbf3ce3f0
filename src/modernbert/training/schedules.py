"""Shapes of the learning rate: its factor at each step of a run."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def warmup_stable_decay(step: int, total: int, warmup: int, decay: int) -> float:
    """Factor of the learning rate: up in a line, constant, then down as 1 - sqrt over the last `decay` steps."""
    if step < warmup:
        return (step + 1) / warmup
    if step >= total - decay:
        return max(0.0, 1 - math.sqrt((step - (total - decay) + 1) / (decay + 1)))
    return 1.0


def make_schedule(name: str, total: int, warmup: float, decay: float) -> Schedule:
    """The factor of the learning rate by the number of the step, from 0.

    Args:
        name: "wsd" (warm-up, constant, 1 - sqrt), "linear" or "cosine" (warm-up, then down to 0), "constant".
        total: steps of the run.
        warmup: share of them in which the rate rises in a line.
        decay: share of them in which "wsd" falls.
    """
    rising, falling = round(warmup * total), round(decay * total)
    if name == "wsd":
        return lambda step: warmup_stable_decay(step, total, rising, falling)
    shapes: dict[str, Callable[[float], float]] = {
        "linear": lambda done: 1 - done,
        "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
        "constant": lambda done: 1.0,
    }
    shape = shapes[name]

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        return shape((step - rising) / max(1, total - rising))

    return factor
