"""Attention weights of one text, layer by layer and head by head.

Shapes: N layers, H heads, L tokens of the text.
"""

from __future__ import annotations

import base64
import dataclasses
from typing import Any

import torch
from torch import Tensor

from modernbert.models.base import PreTrainedModel
from modernbert.text.tokenizer import Tokenizer
from modernbert.tools.explain.page import encoded, filled

_LONGEST = 256  # tokens of a page: a weight is a byte for every layer, head and pair of tokens


@dataclasses.dataclass(frozen=True)
class AttentionMap:
    """Attention weights of a text.

    Attributes:
        tokens: what each token reads.
        kinds: of each layer "full_attention" or "sliding_attention".
        weights: one (H, L, L) a layer: how much each token (row) takes from each (column); rows sum to 1. Layers whose
            heads were pruned have fewer.
    """

    tokens: list[str]
    kinds: list[str]
    weights: list[Tensor]


@torch.no_grad()
def attention_of(model: Any, tokenizer: Tokenizer, text: str, longest: int = _LONGEST) -> AttentionMap:
    """Attention weights of a text.

    Args:
        model: any model of this library, loaded with `attn_implementation` "auto" or "eager".
        tokenizer: its tokenizer.
        text: the text.
        longest: tokens that are allowed.

    Raises:
        InputError: the text is empty or too long, or the model's backend makes no weights.
    """
    encoder = model.base_model if isinstance(model, PreTrainedModel) else model.model
    encoding, tokens = encoded(tokenizer, text, longest)
    ids = torch.tensor([encoding.ids], device=encoder.device)
    output = encoder.eval()(ids, output_attentions=True)
    weights = [layer[0].float().cpu() for layer in output.attentions]
    return AttentionMap(tokens, list(encoder.config.layer_types), weights)


def draw_attention(found: AttentionMap, title: str = "Attention") -> str:
    """A page with a small picture of every head, and a large one with its tokens for the head that is chosen.

    Args:
        found: what `attention_of` gave.
        title: of the page.

    Returns:
        HTML that stands alone: no network, no other file.
    """
    # Square roots keep small weights visible; the page squares them again for its figures.
    layers = [(w.sqrt() * 255).round().to(torch.uint8).contiguous().numpy().tobytes() for w in found.weights]
    data = {
        "tokens": found.tokens,
        "kinds": ["global" if kind == "full_attention" else "local" for kind in found.kinds],
        "heads": [w.shape[0] for w in found.weights],
        "layers": [base64.b64encode(layer).decode() for layer in layers],
    }
    return filled("attention.html", title, data)
