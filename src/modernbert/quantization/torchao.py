"""Quantization on a GPU, by torchao."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from modernbert.errors import BackendError
from modernbert.quantization.options import QuantizationConfig

logger = logging.getLogger(__name__)


def quantize_by_torchao(model: Any, config: QuantizationConfig) -> Any:
    """Put torchao's tensors in the places of a model's weights; embedding, tied output and classifier stay floats.

    Args:
        model: on a GPU.
        config: only the scheme counts; nothing is measured. Both schemes of 4 bits leave the inputs floats.

    Raises:
        BackendError: torchao is not installed, or lacks what the scheme needs.
    """
    try:
        from torchao import quantization as ao
    except ImportError as error:
        raise BackendError(
            "quantizing on a GPU needs torchao: pip install torchao; or quantize on the CPU: device='cpu'"
        ) from error
    schemes = {
        "int8": ao.Int8DynamicActivationInt8WeightConfig,
        "int8-weight-only": ao.Int8WeightOnlyConfig,
        "int4": ao.Int4WeightOnlyConfig,
        "int4-weight-only": ao.Int4WeightOnlyConfig,
    }
    logger.warning("on a GPU torchao quantizes (%s), and nothing is measured", schemes[config.scheme].__name__)

    def is_meant(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and not name.startswith(("classifier", "decoder"))

    try:
        ao.quantize_(model, schemes[config.scheme](), filter_fn=is_meant)
    except ImportError as error:
        raise BackendError(f"torchao cannot serve {config.scheme} here: {error}") from error
    return model
