"""Attention over packed texts: one file a backend, all behind the interface of `base`."""

from modernbert.nn.attention.contract import IMPLEMENTATIONS, AttentionBackend, choose_backend

__all__ = ["IMPLEMENTATIONS", "AttentionBackend", "choose_backend"]
