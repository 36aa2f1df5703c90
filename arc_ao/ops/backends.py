"""Which implementation each operator runs, and why: what `arc-ao env` prints."""

OPERATORS = ("arc::quant_augment", "arc::nvfp4_gemm")


def backend_report() -> dict[str, dict[str, str]]:
    """Operator name -> {"backend", "reason"}."""
    reason = "this version has no native kernels; eager PyTorch is the meaning of the operator"
    return {name: {"backend": "eager", "reason": reason} for name in OPERATORS}
