"""The CUDA device that a kernel is launched on."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Makes the device of `tensor` current, which triton launches on; nothing on a CPU, where
    kernels are interpreted."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
