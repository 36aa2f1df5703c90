"""Which implementation each operator runs, and why: what `arc-ao env` prints."""

import torch

from arc_ao.ops import native
from arc_ao.ops.cuda import dispatch

WEIGHT_ONLY = "arc::nvfp4_weight_only_gemm"  # has no native CPU kernel
# Called only where our kernels are faster than PyTorch's.
UNQUANTIZED = ("arc::attention", "arc::bf16_linear")
# Of weights, while they are quantized: no kernels but those for CPUs.
WEIGHTS = (
    "arc::search_block_scales",
    "arc::encode_blocks",
    "arc::block_residuals",
    "arc::round_columns",
)
OPERATORS = (
    "arc::quant_augment",
    "arc::rms_norm_quant_augment",
    "arc::add_rms_norm_quant_augment",
    "arc::silu_mul_quant_augment",
    "arc::gelu_quant_augment",
    "arc::nvfp4_gemm",
    *UNQUANTIZED,
    *WEIGHTS,
    WEIGHT_ONLY,
)


def preferred_layout(device: torch.device) -> str:
    """The weight layout that the kernels of a device read without rearranging it."""
    if device.type == "cpu":
        return "plain" if native.load() is None else "panels"
    if device.type == "cuda" and torch.cuda.is_available():
        return dispatch.weight_layout(device)
    return "plain"


def backend_report() -> dict[str, dict[str, str]]:
    """Operator name -> {"backend", "reason"}, on the CPU."""
    level = native.cpu_level()
    reason = native.reason_absent() or f"the best of: {native.cpu_features()}"
    backend = "eager" if level == "eager" else f"native CPU, {level}"
    report = {name: {"backend": backend, "reason": reason} for name in OPERATORS}
    report[WEIGHT_ONLY] = {"backend": "eager", "reason": "no native CPU kernel"}
    if backend != "eager" and not native.pairs_are_fast():
        reason = "graphs keep PyTorch's own, but for AVX-512 BF16 without tile registers"
        report |= {name: {"backend": "eager", "reason": reason} for name in UNQUANTIZED}
    return report


def cuda_backend(index: int) -> dict[str, str]:
    """{"backend", "reason"} of every operator on CUDA device `index`."""
    return dispatch.choice_for(index)._asdict()
