"""Registered operators `arc::*`: one file each with its eager meaning and its fake."""

from arc_ao.ops.attention import attention
from arc_ao.ops.backends import OPERATORS, backend_report
from arc_ao.ops.bf16_linear import bf16_linear
from arc_ao.ops.encode_blocks import block_residuals, encode_blocks
from arc_ao.ops.input_transform import project_down, transform_input
from arc_ao.ops.nvfp4_gemm import nvfp4_gemm
from arc_ao.ops.nvfp4_weight_only_gemm import nvfp4_weight_only_gemm
from arc_ao.ops.producers import (
    add_rms_norm_quant_augment,
    gelu_quant_augment,
    rms_norm_quant_augment,
    silu_mul_quant_augment,
)
from arc_ao.ops.quant_augment import quant_augment
from arc_ao.ops.round_columns import round_columns
from arc_ao.ops.search_block_scales import search_block_scales

__all__ = [
    "OPERATORS",
    "add_rms_norm_quant_augment",
    "attention",
    "backend_report",
    "bf16_linear",
    "block_residuals",
    "encode_blocks",
    "gelu_quant_augment",
    "nvfp4_gemm",
    "nvfp4_weight_only_gemm",
    "project_down",
    "quant_augment",
    "rms_norm_quant_augment",
    "round_columns",
    "search_block_scales",
    "silu_mul_quant_augment",
    "transform_input",
]
