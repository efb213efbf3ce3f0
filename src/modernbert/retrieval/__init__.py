"""Retrieval: sparse vectors of texts."""
