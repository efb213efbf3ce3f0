"""The configuration of the decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from modernbert.config.base import Config, Reach, keeps_unknown
from modernbert.errors import ConfigError


@keeps_unknown
@dataclasses.dataclass(kw_only=True)
class ModernBertDecoderConfig(Config):
    """The architecture and options of a ModernBERT decoder; the defaults are those of its base size.

    A token of a local layer sees itself and the tokens before it, `local_attention // 2` in all: 64 by default.

    Args:
        use_cache: whether a forward pass in evaluation mode returns a cache of keys and values.
        **kwargs: every argument of `modernbert.PreTrainedConfig`.

    Raises:
        ConfigError: a value is impossible; the message names the field.

    Source: Ettin, arXiv:2507.11412, and the reference configuration's documentation.
    """

    model_type: ClassVar[str] = "modernbert-decoder"
    default_theta: ClassVar[dict[str, float]] = {"full_attention": 160_000.0, "sliding_attention": 160_000.0}
    fixed: ClassVar[Mapping[str, Any]] = MappingProxyType({**Config.fixed, "is_decoder": True})

    use_cache: bool = True

    def reach(self, layer_type: str) -> Reach:
        """How far a layer of this type attends; never ahead."""
        return Reach(None, 0) if layer_type == "full_attention" else Reach(self.sliding_window - 1, 0)

    def to_dict(self) -> dict[str, Any]:
        """Everything that `config.json` holds; an id that there is not is -1, since transformers reads no null here."""
        values = super().to_dict()
        for name in ("pad", "bos", "cls", "sep"):
            if values[f"{name}_token_id"] is None:
                values[f"{name}_token_id"] = -1
        return values

    def check_fits(self) -> None:
        super().check_fits()
        if self.local_attention < 2:
            raise ConfigError(
                f"local_attention is {self.local_attention}; a decoder's token sees half as many, so at least 2"
            )
