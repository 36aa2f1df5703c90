"""Triton kernels on a machine without a GPU: interpreted, and compiled ahead of time.

Interpreted kernels run on CPU tensors against the eager meaning (triton_cases.py, in a process of
its own, since triton reads TRITON_INTERPRET when a kernel is defined). Compiled ones have to hold
the instructions that they are meant for, and may not spill registers.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels for NVIDIA GPUs are written in triton")

from triton_build import build  # noqa: E402

from arc_ao.ops.cuda import (
    triton_gemm,
    triton_inputs,
    triton_producers,
    triton_quantize,
    triton_weight_only,
    tuning,
)  # noqa: E402

CASES = Path(__file__).with_name("triton_cases.py")
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
FLOAT_ATOMICS = re.compile(r"\b(atom|red)\.")

QUANTIZE_ARGUMENTS = {
    **dict.fromkeys(("first", "second", "weight", "total"), "*bf16"),
    **dict.fromkeys(("order", "act_blocks", "act_channels", "weight_blocks"), "*i32"),
    **dict.fromkeys(("qdata", "scale"), "*u8"),
    **dict.fromkeys(("scale_in", "outer"), "*fp32"),
    **dict.fromkeys(("blocks", "act_count", "gathered_count", "weight_count"), "i32"),
    **dict.fromkeys(("channels", "first_row_stride", "second_row_stride"), "16"),
    **dict.fromkeys(("first_stride", "second_stride", "weight_stride"), "1"),
    "eps": "fp32",
}
PRODUCT_ARGUMENTS = {
    **dict.fromkeys(("a", "b"), "*i64"),
    **dict.fromkeys(("a_scale", "b_scale"), "*u8"),
    **dict.fromkeys(("a_outer", "b_outer"), "*fp32"),
    **dict.fromkeys(("bias", "y"), "*bf16"),
    **dict.fromkeys(("columns", "blocks", "base_blocks", "split_blocks"), "16"),
    **dict.fromkeys(("rows", "act_count"), "i32"),
    "act_blocks": "*i32",
}


def test_interpreted_kernels_equal_the_meaning():
    """All of triton_cases.py passes, none is skipped."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "ARC_AO_CPU_LEVEL": "eager"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-8000:]
    assert re.search(r"\d\d passed", done.stdout) and "skipped" not in done.stdout


def quantizer(capability: int, kind: str, *, whole: bool, four_over_six: bool = False):
    tile = 256 if whole else 512
    constants = {
        "kind": getattr(triton_inputs, kind).value,
        "origin": triton_quantize.ROW_AMAX.value,
        "ordered": False,
        "four_over_six": four_over_six,
        "whole": whole,
        "TILE": tile,
        "FEW": 16,
    }
    warps = triton_producers.num_warps(tile, constants["kind"])
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return build(triton_quantize.quantize_row, capability, QUANTIZE_ARGUMENTS, constants, **options)


@pytest.mark.parametrize(
    "capability, kind, whole",
    [
        (80, "PLAIN", True),
        (90, "ADD_RMS_NORM", True),
        (100, "SILU_MUL", True),
        (90, "GELU_MUL", True),
        (120, "PLAIN", False),
    ],
)
def test_quantizers_round_as_written(capability, kind, whole):
    """No multiply-add is contracted, no subnormal flushed, nothing spilled, loads are vectors."""
    machine = quantizer(capability, kind, whole=whole)
    assert machine.spills == 0
    assert not re.search(r"\bfma\.rn(\.ftz)?\.f32", machine.ptx)
    assert ".ftz" not in machine.ptx and "div.rn.f32" in machine.ptx
    assert re.search(r"ld\.global\S*\.v[24]\.b(32|64)", machine.ptx)


def rules(route: str) -> dict[str, tuning.Rule]:
    """Rules of the default table by name."""
    table = tuning.read_table(tuning.TABLES / "default.json")
    return {f"{r.block_m}x{r.block_n}": r for r in table if r.route == route}


def launch_options(rule: tuning.Rule) -> dict:
    return {
        "num_warps": rule.num_warps,
        "num_stages": rule.num_stages,
        "enable_fp_fusion": True,
    }


def product(kernel, capability: int, rule: tuning.Rule, *, repeats: bool):
    constants = {
        "repeats": repeats,
        "even": not repeats,
        "partial": False,
        "has_bias": True,
        "per_row": True,
        "BLOCK_M": rule.block_m,
        "BLOCK_N": rule.block_n,
        "BLOCK_K": rule.block_k,
    }
    options = launch_options(rule)
    return build(kernel, capability, PRODUCT_ARGUMENTS, constants, **options)


@pytest.mark.parametrize("name", rules("tiles"))
def test_tiles_run_on_tensor_cores_and_spill_nothing(name):
    """On one architecture per default rule and with residual blocks; the largest on all four."""
    rule = rules("tiles")[name]
    every = {"16x64": (80,), "32x64": (120,), "64x64": (90,), "128x128": (80, 90, 100, 120)}
    for capability in every[name]:
        machine = product(triton_gemm.multiply_tiles, capability, rule, repeats=True)
        expected = TENSOR_CORES[capability] if rule.block_m >= 64 else "HMMA"
        assert machine.opcodes[expected], (capability, machine.opcodes)
        assert machine.spills == 0, capability
        assert not FLOAT_ATOMICS.search(machine.ptx)
        assert ".ftz" not in machine.ptx  # 0.5 is decoded by way of a subnormal


@pytest.mark.parametrize("capability, block_m, expected", [(80, 16, "HMMA"), (90, 128, "HGMMA")])
def test_weight_only_tiles_run_on_tensor_cores(capability, block_m, expected):
    """x in bf16 and the decoded weight meet in a tensor core; nothing is spilled."""
    (rule,) = (r for r in rules("tiles").values() if r.block_m == block_m)
    arguments = {
        **dict.fromkeys(("x", "bias", "y"), "*bf16"),
        **dict.fromkeys(("columns", "channels", "blocks", "base_blocks"), "16"),
        **dict.fromkeys(("split_blocks", "x_row_stride"), "16"),
        **{"b": "*i64", "b_scale": "*u8", "b_outer": "*fp32", "weight_blocks": "*i32"},
        **{"rows": "i32", "x_stride": "1"},
    }
    constants = {"partial": False, "has_bias": True}
    constants |= {"BLOCK_M": block_m, "BLOCK_N": rule.block_n, "BLOCK_K": rule.block_k}
    options = launch_options(rule)
    machine = build(triton_weight_only.multiply, capability, arguments, constants, **options)
    assert machine.spills == 0 and machine.opcodes[expected] and ".ftz" not in machine.ptx


@pytest.mark.parametrize("capability", [80, 90])
def test_one_row_is_streamed_and_spills_nothing(capability):
    """Weights arrive a block at a time, sums are fp32 and not by atomics."""
    (rule,) = rules("row").values()
    machine = product(triton_gemm.multiply_row, capability, rule, repeats=False)
    assert machine.spills == 0 and machine.opcodes["FFMA"] >= 16
    assert re.search(r"ld\.global\S*\.b64", machine.ptx)
    assert not FLOAT_ATOMICS.search(machine.ptx) and ".ftz" not in machine.ptx


def test_default_rules_are_all_built_here():
    """A rule that is added to the table has to be added to these tests."""
    assert set(rules("tiles")) == {"16x64", "32x64", "64x64", "128x128"}
    assert len(rules("row")) == len(rules("decode")) == 1
