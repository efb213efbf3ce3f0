"""Quantization: weights of 8 or 4 bits in the place of floats, measured before they are let in."""
