"""The engine for GPUs: Triton kernels, recorded launches, flash and flex attention, and a backbone made of them."""
