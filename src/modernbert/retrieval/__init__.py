"""Models that search: sparse vectors of texts, vectors of tokens, and the similarity of these."""
