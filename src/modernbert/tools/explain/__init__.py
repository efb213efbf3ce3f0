"""Looking inside: attention weights and attributions of a text, as numbers and as stand-alone HTML pages."""

from modernbert.tools.explain.attention import AttentionMap, attention_of, draw_attention
from modernbert.tools.explain.attribution import Attribution, attribute, draw_attribution

__all__ = ["AttentionMap", "Attribution", "attention_of", "attribute", "draw_attention", "draw_attribution"]
