"""Kernels of our own for CPUs, and PyTorch's place taken by them where they run."""
