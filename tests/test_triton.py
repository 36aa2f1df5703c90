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
from triton_counts import (  # noqa: E402
    count_product,
    count_quantizer,
    launch_options,
    product,
    quantizer,
    rules,
)

from arc_ao.ops.cuda import triton_weight_only  # noqa: E402

CASES = Path(__file__).with_name("triton_cases.py")
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
LEAST_SHARED = 99 << 10  # bytes that a program has on sm_86, sm_89 and sm_120
FLOAT_ATOMICS = re.compile(r"\b(atom|red)\.")


def test_interpreted_kernels_equal_the_meaning():
    """All of triton_cases.py passes, none is skipped."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "ARC_AO_CPU_LEVEL": "eager"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-8000:]
    assert re.search(r"\d\d passed", done.stdout) and "skipped" not in done.stdout


@pytest.mark.parametrize(
    "capability, kind, whole",
    [
        (80, "PLAIN", True),
        (90, "ADD_RMS_NORM", True),
        (100, "SILU_MUL", True),
        (90, "GELU_MUL", True),
        (120, "PLAIN", False),
        (100, "ADD_RMS_NORM", False),
    ],
)
def test_quantizers_round_as_written(capability, kind, whole):
    """No multiply-add is contracted, no subnormal flushed, nothing spilled, loads are vectors."""
    machine = quantizer(capability, kind, whole=whole)
    assert machine.spills == 0
    assert not re.search(r"\bfma\.rn(\.ftz)?\.f32", machine.ptx)
    assert ".ftz" not in machine.ptx and "div.rn.f32" in machine.ptx
    assert re.search(r"ld\.global\S*\.v[24]\.b(32|64)", machine.ptx)


@pytest.mark.parametrize("name", rules("tiles"))
def test_tiles_run_on_tensor_cores_and_spill_nothing(name):
    """On one architecture per default rule and with residual blocks; the largest on all four."""
    rule = rules("tiles")[name]
    every = {"16x128": (80,), "32x64": (120,), "64x128": (90,), "128x128": (80, 90, 100, 120)}
    for capability in every[name]:
        machine = product(capability, rule, repeats=True)
        expected = TENSOR_CORES[capability] if rule.block_n >= 64 else "HMMA"
        assert machine.opcodes[expected], (capability, machine.opcodes)
        assert machine.spills == 0, capability
        assert machine.shared <= LEAST_SHARED, capability
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
    constants = {"partial": False, "has_bias": True, "assembly": True}
    constants |= {"BLOCK_M": block_m, "BLOCK_N": rule.block_n, "BLOCK_K": rule.block_k}
    options = launch_options(rule)
    machine = build(triton_weight_only.multiply, capability, arguments, constants, **options)
    assert machine.spills == 0 and machine.opcodes[expected] and ".ftz" not in machine.ptx


@pytest.mark.parametrize("capability", [80, 90])
def test_one_row_is_streamed_in_integers(capability):
    """Weights arrive two blocks at a time and meet the row in dp4a; sums are not by atomics."""
    machine = product(capability, rules("row")["1x8"], repeats=False)
    assert machine.spills == 0 and machine.opcodes["IDP"] >= 64
    assert re.search(r"ld\.global\S*\.v2\.b64", machine.ptx)
    assert not FLOAT_ATOMICS.search(machine.ptx) and ".ftz" not in machine.ptx


# Instructions for a weight of which a H200 can issue no more than 4.5 at 75 % of its bandwidth.
@pytest.mark.parametrize(
    "capability, route, name, repeats, most",
    [
        (80, "row", "1x8", False, 2.5),
        (90, "row", "1x8", False, 2.5),
        (90, "row", "1x8", True, 3.0),
        (90, "row", "2x8", False, 3.3),
        (80, "tiles", "16x128", False, 5.6),
        (90, "tiles", "16x128", False, 4.3),
        (90, "tiles", "64x128", False, 5.6),
    ],
)
def test_decoding_takes_few_instructions(capability, route, name, repeats, most):
    """What the loop over K executes for each weight, all rows of the tile included."""
    count = count_product(capability, rules(route)[name], repeats=repeats)
    assert count.spills == 0 and 1 < count.instructions <= most, count


@pytest.mark.parametrize("block_scale", ["four_over_six", "mse"])
@pytest.mark.parametrize("kind", ["RMS_NORM", "ADD_RMS_NORM"])
def test_long_rows_in_another_order_spill_nothing(kind, block_scale):
    """With several roundings of every block: what takes most registers."""
    machine = quantizer(90, kind, whole=False, block_scale=block_scale, ordered=True)
    assert machine.spills == 0


@pytest.mark.parametrize("capability, kind", [(80, "PLAIN"), (100, "SILU_MUL"), (120, "RMS_NORM")])
def test_searched_scales_spill_nothing(capability, kind):
    """Of a row in registers, on every architecture."""
    machine = quantizer(capability, kind, whole=True, block_scale="mse")
    assert machine.spills == 0


# A H200 can issue 26 for an element at 60 % of its bandwidth.
@pytest.mark.parametrize("capability, kind, most", [(80, "PLAIN", 26), (90, "RMS_NORM", 46)])
def test_quantizing_takes_few_instructions(capability, kind, most):
    """What a row of 4096 channels executes for each channel, without residual blocks."""
    count = count_quantizer(capability, kind)
    assert count.spills == 0 and 1 < count.instructions <= most, count


def test_default_rules_are_all_built_here():
    """A rule that is added to the table has to be added to these tests."""
    assert set(rules("tiles")) == {"16x128", "32x64", "64x128", "128x128"}
    assert set(rules("row")) == {"1x8", "2x8"} and len(rules("decode")) == 1
