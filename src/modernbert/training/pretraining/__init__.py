"""Pretraining: raw text, tokens in shards, packed passes, and runs of either objective on one process or many."""
