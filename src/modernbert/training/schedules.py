"""The learning rate: its peak by the model's size, and its factor at each step of a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from modernbert.training.options import TrainingOptions

Schedule = Callable[[int], float]
_BASE_WIDTH, _BASE_LAYERS = 768, 22  # of ModernBERT-base, whose rates are known
_HIGHEST = 1e-3


def default_rate(base: float, width: int, layers: int) -> float:
    """The learning rate for a model of some size: smaller models want more.

    It goes with 1 / (width x layers), is at most 1e-3, and is rounded to two digits: 5e-5 at base size (768 wide, 22
    layers) makes 2.9e-5 of a large one (1,024 and 28), and 5.5e-4 of the small ones that come with the package (256 and
    6).

    Args:
        base: what it is at base size.
        width, layers: of the model.
    """
    rate = base * _BASE_WIDTH * _BASE_LAYERS / (width * layers)
    return float(f"{min(rate, _HIGHEST):.1e}")


def peak_rate(options: TrainingOptions, model: Any) -> float:
    """The learning rate of the options, or if none is given the default one for the model."""
    if options.lr is not None:
        return options.lr
    config = model.config
    return default_rate(options.base_lr, config.hidden_size, config.num_hidden_layers)


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
