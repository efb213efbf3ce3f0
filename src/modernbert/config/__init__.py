"""Model configurations: one class an architecture, over what they share."""

from modernbert.config.base import ACTIVATIONS, LAYER_TYPES, Config, Reach
from modernbert.config.decoder import ModernBertDecoderConfig
from modernbert.config.encoder import POOLINGS, ModernBertConfig

PreTrainedConfig = PretrainedConfig = Config

__all__ = [
    "ACTIVATIONS",
    "LAYER_TYPES",
    "POOLINGS",
    "Config",
    "ModernBertConfig",
    "ModernBertDecoderConfig",
    "PreTrainedConfig",
    "PretrainedConfig",
    "Reach",
]
