"""Instructions that the Triton kernels execute for a weight and for an element, by architecture.

    PYTHONPATH=.:tests python tests/triton_counts.py

Counted in the machine code of kernels built ahead of time (triton_build.py), as launched by the
default rules: the loop over K divided by the weights that a thread takes per iteration; for the
quantizer, everything outside of loops divided by the elements of a row that a thread has.
"""

from typing import NamedTuple

from triton_build import WARP_SIZE, Machine, build

from arc_ao.ops.cuda import (
    triton_gemm,
    triton_inputs,
    triton_producers,
    triton_quantize,
    triton_rows,
    tuning,
)

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


def quantizer(
    capability: int,
    kind: str,
    *,
    whole: bool,
    block_scale: str = "amax",
    ordered: bool = False,
) -> Machine:
    """`quantize_row` of a row of 4096 channels, or of one longer than a tile."""
    number = getattr(triton_inputs, kind).value
    is_heavy = triton_producers._is_heavy(number, ordered, block_scale)
    tile, _ = triton_producers.tile_blocks(256 if whole else 2048, is_heavy)
    constants = {
        "kind": number,
        "origin": triton_quantize.ROW_AMAX.value,
        "ordered": ordered,
        "block_scale": block_scale,
        "whole": whole,
        "TILE": tile,
        "FEW": 16,
    }
    warps = triton_producers.num_warps(tile, number, block_scale)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return build(triton_quantize.quantize_row, capability, QUANTIZE_ARGUMENTS, constants, **options)


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


def product(capability: int, rule: tuning.Rule, *, repeats: bool) -> Machine:
    """The kernel of a rule, with residual blocks and ragged K or without."""
    kernel = triton_rows.multiply_rows if rule.route == "row" else triton_gemm.multiply_tiles
    constants = {
        "repeats": repeats,
        "even": not repeats,
        "partial": False,
        "has_bias": True,
        "per_row": True,
        "assembly": True,
        "BLOCK_M": rule.block_m,
        "BLOCK_N": rule.block_n,
        "BLOCK_K": rule.block_k,
    }
    options = launch_options(rule)
    return build(kernel, capability, PRODUCT_ARGUMENTS, constants, **options)


class Count(NamedTuple):
    """A kernel's instructions for a weight, or for an element of a row."""

    name: str
    capability: int
    instructions: float
    registers: int
    spills: int


def count_product(capability: int, rule: tuning.Rule, *, repeats: bool) -> Count:
    """Of the loop over K."""
    machine = product(capability, rule, repeats=repeats)
    weights = 16 * rule.block_n * rule.block_k / (WARP_SIZE * rule.num_warps)
    name = f"{rule.route} {rule.block_m}x{rule.block_n}{', residual blocks' if repeats else ''}"
    return Count(name, capability, machine.loop / weights, machine.registers, machine.spills)


def count_quantizer(capability: int, kind: str, *, block_scale: str = "amax") -> Count:
    """Of a row of 4096 channels in registers."""
    machine = quantizer(capability, kind, whole=True, block_scale=block_scale)
    number = getattr(triton_inputs, kind).value
    warps = triton_producers.num_warps(256, number, block_scale)
    name = f"quantize {kind}{'' if block_scale == 'amax' else f', {block_scale}'}"
    elements = 4096 / (WARP_SIZE * warps)
    return Count(name, capability, machine.straight / elements, machine.registers, machine.spills)


def main() -> None:
    """Print the table."""
    print("| kernel | sm | instructions | registers | spilled |\n| --- | --- | --- | --- | --- |")
    routes = [*rules("row").values(), *rules("tiles").values()]
    for capability in (80, 90):
        counts = [count_product(capability, r, repeats=x) for r in routes for x in (False, True)]
        counts += [count_quantizer(capability, k) for k in ("PLAIN", "RMS_NORM", "ADD_RMS_NORM")]
        counts += [count_quantizer(capability, k) for k in ("SILU_MUL", "GELU_MUL")]
        searched = ("four_over_six", "mse")
        counts += [count_quantizer(capability, "PLAIN", block_scale=s) for s in searched]
        for c in counts:
            numbers = f"{c.instructions:.2f} | {c.registers} | {c.spills}"
            print(f"| {c.name} | {c.capability} | {numbers} |")


if __name__ == "__main__":
    main()
