"""The engine for CPUs: C kernels (in `native/`), what they do on tensors, and a backbone as a program of them."""
