"""Attention weights of one text, layer by layer and head by head.

Shapes: H heads, L tokens of the text.
"""

from __future__ import annotations

import base64
import dataclasses
from typing import Any

import torch
from torch import Tensor

from modernbert.models.base import PreTrainedModel
from modernbert.text.tokenizer import Tokenizer
from modernbert.tools.page import encoded, filled


@dataclasses.dataclass(frozen=True)
class AttentionMap:
    """Attention weights of a text.

    Attributes:
        tokens: the text of each token.
        kinds: of each layer "full_attention" or "sliding_attention".
        weights: (H, L, L) of each layer: how much each token (row) takes from each (column); rows sum to 1. Layers
            whose heads were pruned have fewer.
    """

    tokens: list[str]
    kinds: list[str]
    weights: list[Tensor]


@torch.no_grad()
def attention_of(model: Any, tokenizer: Tokenizer, text: str, longest: int = 256) -> AttentionMap:
    """Compute the attention weights of a text.

    Args:
        model: any model of this library.
        tokenizer: its tokenizer.
        text: the text.
        longest: how many tokens are allowed; a page has a byte for every layer, head and pair of tokens.

    Raises:
        InputError: the text is empty or too long.
    """
    encoder = model.base_model if isinstance(model, PreTrainedModel) else model.model
    encoding, tokens = encoded(tokenizer, text, longest)
    ids = torch.tensor([encoding.ids], device=encoder.device)
    weights = encoder.eval()(ids, output_attentions=True).attentions
    return AttentionMap(tokens, list(encoder.config.layer_types), [layer[0].float().cpu() for layer in weights])


def draw_attention(found: AttentionMap, title: str = "Attention") -> str:
    """Draw every head in small, and the chosen one large, with its tokens.

    Args:
        found: what `attention_of` returned.
        title: of the page.

    Returns:
        HTML that stands alone: no network, no other file.
    """
    # Square roots keep small weights visible; the page squares them again for its numbers.
    layers = [(w.sqrt() * 255).round().to(torch.uint8).contiguous().numpy().tobytes() for w in found.weights]
    data = {
        "tokens": found.tokens,
        "kinds": ["global" if kind == "full_attention" else "local" for kind in found.kinds],
        "heads": [w.shape[0] for w in found.weights],
        "layers": [base64.b64encode(layer).decode() for layer in layers],
    }
    return filled("attention.html", title, data)
