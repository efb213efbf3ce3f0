"""Attention over packed texts: the contract of a backend, the two of PyTorch, and the table that engines add to."""

from modernbert.nn.attention.contract import (
    IMPLEMENTATIONS,
    AttentionBackend,
    choose_backend,
    register_backend,
    register_choice,
)
from modernbert.nn.attention.eager import EagerAttention
from modernbert.nn.attention.sdpa import SdpaAttention

register_backend("eager", EagerAttention)
register_backend("sdpa", SdpaAttention)

__all__ = ["IMPLEMENTATIONS", "AttentionBackend", "choose_backend", "register_backend", "register_choice"]
