"""What a checkpoint is, how fast a model runs, what it attends to, and which tokens an answer rests on.

Names are imported when they are first used.
"""

from __future__ import annotations

from modernbert.lazy import exports

_EXPORTS = {
    "Attribution": "tools.attribution",
    "AttentionMap": "tools.attention",
    "attention_of": "tools.attention",
    "attribute": "tools.attribution",
    "checkpoint_info": "tools.info",
    "draw_attention": "tools.attention",
    "draw_attribution": "tools.attribution",
    "examine": "tools.doctor",
}
__getattr__, __dir__ = exports(__name__, _EXPORTS)
__all__ = __dir__()
