"""Kernels for graphics cards, in Triton: what PyTorch's own would take several passes over memory for."""
