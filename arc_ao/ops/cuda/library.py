"""libarc_ao_cuda.so through ctypes: its structures and functions, and why it is not used.

ARC_AO_CUDA_LIBRARY=PATH loads another build of it. The structures restate csrc/cuda/arc_ao_cuda.h;
a library whose structures have other sizes is refused.
"""

import ctypes
import os
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

LIBRARY_VARIABLE = "ARC_AO_CUDA_LIBRARY"
LIBRARY = Path(
    os.environ.get(LIBRARY_VARIABLE) or Path(__file__).parents[2] / "libarc_ao_cuda.so"
).absolute()
# family of machine code: the compute capabilities that it runs on
FAMILIES = {"100f": ((10, 0), (10, 3)), "120f": ((12, 0), (12, 1))}
NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SCALE_MODES = {"token": 0, "tensor": 1, "static": 2}
BLOCK_SCALES = {"amax": 0, "four_over_six": 1, "mse": 2}
PRODUCERS = {
    name: number
    for number, name in enumerate(
        ("plain", "rms_norm", "add_rms_norm", "silu_mul", "gelu", "tanh_gelu")
    )
}


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Quantize(Structure):
    """ArcQuantize: rows to augmented NVFP4 rows."""

    _fields_ = [
        *_fields(c_void_p, "x other weight sum"),
        *_fields(c_void_p, "act_blocks weight_blocks channel_order act_channels"),
        *_fields(c_void_p, "outer_scale amax qdata scale outer"),
        *_fields(c_int64, "rows channels num_act_blocks num_weight_blocks num_act_channels"),
        *_fields(c_float, "eps"),
        *_fields(c_int32, "number producer scale_mode block_scale swizzled"),
    ]


class Gemm(Structure):
    """ArcGemm: a product of swizzled operands."""

    _fields_ = [
        *_fields(c_void_p, "a a_scale a_outer b b_scale b_outer bias y"),
        *_fields(c_int64, "m n blocks"),
        *_fields(c_int32, "a_outer_per_row bias_number y_number"),
    ]


class Kernel(Structure):
    """ArcKernel: which kernel a product runs on, and the workspace it needs."""

    _fields_ = [*_fields(c_int32, "config family"), *_fields(c_int64, "workspace")]


# name: (result, arguments)
FUNCTIONS = {
    "arc_ao_cuda_architectures": (c_char_p, []),
    "arc_ao_cuda_struct_sizes": (None, [POINTER(c_int64)]),
    "arc_ao_cuda_config": (c_char_p, [c_int32, c_int32, POINTER(c_int32)]),
    "arc_ao_cuda_quantize": (c_char_p, [POINTER(Quantize), c_int32, c_void_p]),
    "arc_ao_cuda_select": (c_char_p, [POINTER(Gemm), c_int32, c_int32, POINTER(Kernel)]),
    "arc_ao_cuda_can_implement": (c_char_p, [POINTER(Gemm), POINTER(Kernel)]),
    "arc_ao_cuda_gemm": (
        c_char_p,
        [POINTER(Gemm), POINTER(Kernel), c_int32, c_int32, c_void_p, c_void_p],
    ),
}


@cache
def load() -> ctypes.CDLL | None:
    """The library, its functions typed; None where there is no file.

    Raises:
        RuntimeError: a library that was built from another version.
    """
    if not LIBRARY.exists():
        if os.environ.get(LIBRARY_VARIABLE):
            raise ValueError(f"{LIBRARY_VARIABLE}: there is no file {LIBRARY}")
        return None
    library = ctypes.CDLL(str(LIBRARY))
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    found = (c_int64 * 3)()
    library.arc_ao_cuda_struct_sizes(found)
    expected = [ctypes.sizeof(kind) for kind in (Quantize, Gemm, Kernel)]
    if list(found) != expected:
        raise RuntimeError(
            f"{LIBRARY.name} was built from another version: its structures have {list(found)} "
            f"bytes, expected {expected}; install arc_ao again with ARC_AO_CUDA=1"
        )
    return library


def architectures() -> list[str]:
    """Families that the library holds machine code for; empty where there is no library."""
    library = load()
    return [] if library is None else library.arc_ao_cuda_architectures().decode().split()


def reason_absent(capability: tuple[int, int]) -> str | None:
    """Why these kernels do not run on a device of a compute capability, or None where they do."""
    name = f"compute capability {capability[0]}.{capability[1]}"
    family = next((f for f, covered in FAMILIES.items() if capability in covered), None)
    if family is None:
        covered = ", ".join(f"{a}.{b}" for pair in FAMILIES.values() for a, b in pair)
        return f"the Blackwell kernels are for compute capability {covered}, not for {name}"
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if load() is None:
        return (
            "the package was built without CUDA kernels; install it again with ARC_AO_CUDA=1 "
            "(needs nvcc of CUDA 13 and the headers of CUTLASS)"
        )
    if family not in architectures():
        return f"{LIBRARY.name} was built for {' '.join(architectures())}, not for {name}"
    return None


def description() -> str:
    """What `arc-ao env` says of the library."""
    if load() is None:
        return "not built (install with ARC_AO_CUDA=1)"
    return f"built for sm_{', sm_'.join(architectures())}"
