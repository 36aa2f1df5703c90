"""Operators on NVIDIA GPUs: `blackwell` calls the compiled kernels of csrc/cuda."""
