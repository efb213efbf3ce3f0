"""The architecture: layers, encoder, heads, and what every model can do."""
