"""What a checkpoint is, how fast a model runs, what it attends to, and which tokens an answer rests on.

Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "Attribution": "attribution",
    "AttentionMap": "attention",
    "attention_of": "attention",
    "attribute": "attribution",
    "checkpoint_info": "info",
    "draw_attention": "attention",
    "draw_attribution": "attribution",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return __all__
