"""The CUDA implementations of `arc::*`: one backend per device, chosen when it first sees a tensor.

    blackwell   compiled kernels (csrc/cuda), where they are built for this GPU
    triton      compute capability 8.0 and newer, where triton is installed
    eager       everything else: the operators' meaning, in PyTorch

ARC_AO_CUDA_BACKEND names one of them instead. Triton is imported with the first CUDA tensor, so
that machines without a GPU need none.
"""

import os
import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

BACKEND_VARIABLE = "ARC_AO_CUDA_BACKEND"
BACKENDS = ("blackwell", "triton", "eager")
BLACKWELL_MODULE = "arc_ao.ops.cuda.blackwell"
TRITON_MODULES = {  # operator -> where its implementation is; for others the meaning serves
    "quant_augment": "triton_producers",
    "rms_norm_quant_augment": "triton_producers",
    "add_rms_norm_quant_augment": "triton_producers",
    "silu_mul_quant_augment": "triton_producers",
    "gelu_quant_augment": "triton_producers",
    "nvfp4_gemm": "triton_products",
    "nvfp4_weight_only_gemm": "triton_weight_only",
}
TRITON_MIN_CAPABILITY = (8, 0)
SWIZZLED = "swizzled"  # layout of Blackwell's kernels


class Choice(NamedTuple):
    """A backend and why it is the one."""

    backend: str
    reason: str


def register(name: str, eager: Callable) -> None:
    """Register the CUDA implementation of arc::`name`, whose meaning is `eager`."""

    def run(*arguments: Any, **options: Any) -> Any:
        device = next(a.device for a in arguments if isinstance(a, Tensor))
        backend = choice_for(device.index).backend
        return implementation(name, backend, eager, (*arguments, *options.values()))(
            *arguments, **options
        )

    torch.library.impl(f"arc::{name}", "CUDA")(run)


def implementation(
    name: str, backend: str, eager: Callable, arguments: tuple[Any, ...]
) -> Callable:
    """What runs arc::`name` on a backend; a weight that was packed for Blackwell's kernels and
    landed elsewhere runs the meaning."""
    is_swizzled = any(isinstance(a, str) and a == SWIZZLED for a in arguments)
    return kernel_of(name, backend, is_swizzled) or eager


@cache
def kernel_of(name: str, backend: str, is_swizzled: bool) -> Callable | None:
    """The kernel behind arc::`name` on a backend, looked up once; None is the eager meaning. An
    operator without a compiled kernel runs in Triton."""
    if backend == "blackwell":
        compiled = getattr(import_module(BLACKWELL_MODULE), name, None)
        if compiled is not None:
            return compiled
        backend = "eager" if find_spec("triton") is None else "triton"
    if backend == "eager" or is_swizzled or name not in TRITON_MODULES:
        return None
    return getattr(import_module(f"arc_ao.ops.cuda.{TRITON_MODULES[name]}"), name)


@cache
def choice_for(index: int) -> Choice:
    """The backend of CUDA device `index`; warns where a GPU is left to the eager meaning.

    Raises:
        ValueError: ARC_AO_CUDA_BACKEND is not a backend, or one that cannot run here.
    """
    capability = torch.cuda.get_device_capability(index)
    choice = choose(
        capability,
        blackwell_absent=blackwell_absent(capability),
        triton_absent=triton_absent(capability),
        wanted=os.environ.get(BACKEND_VARIABLE),
    )
    if choice.backend == "eager" and not os.environ.get(BACKEND_VARIABLE):
        warnings.warn(
            f"arc_ao runs its slow reference operators on cuda:{index}: {choice.reason}",
            stacklevel=2,
        )
    return choice


def choose(
    capability: tuple[int, int],
    *,
    blackwell_absent: str | None,
    triton_absent: str | None,
    wanted: str | None = None,
) -> Choice:
    """The best backend that is not absent, or the wanted one; `*_absent` says why, None if not.

    Raises:
        ValueError: a wanted backend that is unknown or absent, saying why.
    """
    absent = {"blackwell": blackwell_absent, "triton": triton_absent, "eager": None}
    if wanted:
        if wanted not in BACKENDS:
            raise ValueError(f"{BACKEND_VARIABLE}: expected one of {BACKENDS}, got {wanted!r}")
        if absent[wanted] is not None:
            raise ValueError(f"{BACKEND_VARIABLE}={wanted}: {absent[wanted]}")
        return Choice(wanted, f"{BACKEND_VARIABLE}={wanted}")
    backend = next(name for name in BACKENDS if absent[name] is None)
    better = [f"no {name}: {absent[name]}" for name in BACKENDS[: BACKENDS.index(backend)]]
    return Choice(backend, "; ".join([f"sm_{capability[0]}{capability[1]}", *better]))


def blackwell_absent(capability: tuple[int, int]) -> str | None:
    """Why the compiled kernels do not run on a GPU, or None where they do."""
    if find_spec(BLACKWELL_MODULE) is None:
        return "this version has no compiled CUDA kernels"
    return import_module(BLACKWELL_MODULE).reason_absent(capability)


def triton_absent(capability: tuple[int, int]) -> str | None:
    """Why the Triton kernels do not run on a GPU, or None where they do."""
    if torch.version.hip is not None:
        return "its kernels are written for NVIDIA and have not been tried on AMD"
    if capability < TRITON_MIN_CAPABILITY:
        return f"its kernels need sm_80 or newer, this is sm_{capability[0]}{capability[1]}"
    if find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    return None


def weight_layout(device: torch.device) -> str:
    """The layout that the backend of a CUDA device reads without rearranging it."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return SWIZZLED if choice_for(index).backend == "blackwell" else "plain"
