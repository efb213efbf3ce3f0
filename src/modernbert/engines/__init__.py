"""Who runs a frozen model's layers: C kernels on a CPU, Triton kernels on a card."""
