"""Operators on NVIDIA GPUs. `dispatch` chooses; `blackwell`, where it is built, calls the compiled
kernels of csrc/cuda; the modules triton_* run everywhere from sm_80 on."""
