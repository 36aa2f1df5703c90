"""Registered operators `arc::*`: one file each with its eager meaning and its fake."""

from arc_ao.ops.backends import OPERATORS, backend_report
from arc_ao.ops.nvfp4_gemm import nvfp4_gemm
from arc_ao.ops.quant_augment import quant_augment

__all__ = ["OPERATORS", "backend_report", "nvfp4_gemm", "quant_augment"]
