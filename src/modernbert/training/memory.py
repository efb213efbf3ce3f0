"""What training may take of a device's memory."""

from __future__ import annotations

from torch import nn

from modernbert.models.base import PreTrainedModel
from modernbert.training.options import TrainingOptions


def save_memory(model: nn.Module, options: TrainingOptions) -> None:
    """Have the backward pass compute activations again, all of them or those past a budget, where the options say so.

    Args:
        model: of this package, or what wraps one.
        options: of the run.
    """
    budget = None if options.activation_memory is None else int(options.activation_memory * 2**30)
    if options.gradient_checkpointing or budget is not None:
        for module in list(model.modules()):
            if isinstance(module, PreTrainedModel):
                module.gradient_checkpointing_enable(keep_bytes=budget)
