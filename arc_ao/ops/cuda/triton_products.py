"""arc::nvfp4_gemm on NVIDIA GPUs from sm_80 on: routes by shape, kernels in triton_rows.py
and triton_gemm.py.

Every route accumulates in fp32 and rounds once, behind outer scales and bias. Splitting K adds the
parts in their order in a second pass, so that results do not vary from call to call.
"""

import math
from functools import cache

import torch
import triton
from torch import Tensor

from arc_ao.ops.checks import check
from arc_ao.ops.cuda import triton_gemm as kernels
from arc_ao.ops.cuda import triton_rows
from arc_ao.ops.cuda.device import on_device
from arc_ao.ops.cuda.tuning import Rule, choose
from arc_ao.ops.layout import from_panels
from arc_ao.ops.nvfp4_gemm import check_gemm

BLOCK_BYTES = 8
READ_LAYOUTS = ("plain", "panels")
PROCESSORS_INTERPRETED = 4
PROGRAMS_PER_PROCESSOR = 2  # that a split of K aims at
MIN_STEPS = 4  # of the loop over K in one part
SUMS_BYTES = 16 << 20  # fp32 sums of a chunk of columns: they stay in the L2 of current GPUs
MIN_CHUNK = 256
DECODE_TILE = 256  # blocks
COMBINE_TILE = 1024  # columns


def nvfp4_gemm(
    a: Tensor,
    a_scale: Tensor,
    a_outer: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_outer: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    act_blocks: Tensor | None = None,
    base_blocks: int = 0,
    b_layout: str = "plain",
    *,
    rule: Rule | None = None,
    assembly: bool | None = None,
) -> Tensor:
    """`nvfp4_gemm_eager` by the route that the GPU's table names, or by `rule`; `assembly` False
    runs what stands beside the kernels' PTX, as where they are interpreted."""
    check_gemm(
        a, a_scale, a_outer, b, b_scale, b_outer, bias, out_dtype, act_blocks, base_blocks, b_layout
    )
    check(b_layout in READ_LAYOUTS, f"nvfp4_gemm: Triton reads {READ_LAYOUTS}, got {b_layout!r}")
    if b_layout == "panels":  # of a weight that was packed for a CPU: right, and slow
        b, b_scale = from_panels(b, b_scale)
    y = a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)
    if not y.numel():
        return y
    rule = rule or choose(capability_of(a.device), *y.shape, 2 * a.shape[1])
    left = (aligned(a), a_scale.contiguous())
    right = (aligned(b), b_scale.contiguous())
    repeated = _ids(act_blocks, a), base_blocks
    epilogue = (a_outer, b_outer, None if bias is None else bias.contiguous())
    with on_device(a):
        if rule.route == "decode":
            _by_cublas(left, right, repeated, epilogue, y, rule)
        else:
            assembly = y.is_cuda if assembly is None else assembly
            _in_kernel(left, right, repeated, epilogue, y, rule, assembly)
    return y


Operand = tuple[Tensor, Tensor]  # codes and scales
Repeated = tuple[Tensor, int]  # act_blocks and base_blocks
Epilogue = tuple[Tensor, Tensor, Tensor | None]  # a_outer, b_outer, bias


def _in_kernel(
    left: Operand,
    right: Operand,
    repeated: Repeated,
    epilogue: Epilogue,
    y: Tensor,
    rule: Rule,
    assembly: bool,
) -> None:
    """Routes "row" and "tiles"."""
    rows, columns = y.shape
    blocks = left[1].shape[1]
    tiles = math.ceil(rows / rule.block_m) * math.ceil(columns / rule.block_n)
    steps = math.ceil(blocks / rule.block_k)
    splits, split_steps = parts_of(rule, tiles, steps, y.device)
    partial = splits > 1
    out = y.new_empty((splits, rows, columns), dtype=torch.float32) if partial else y
    kernel = triton_rows.multiply_rows if rule.route == "row" else kernels.multiply_tiles
    a_outer, b_outer, bias = epilogue
    act_blocks, base_blocks = repeated
    kernel[(tiles * splits,)](
        left[0].view(torch.int64), left[1], a_outer, right[0].view(torch.int64), right[1], b_outer,
        a_outer if bias is None else bias, act_blocks, out,
        rows, columns, blocks, base_blocks, act_blocks.shape[0], split_steps * rule.block_k,
        repeats=act_blocks.shape[0] > 0, even=blocks % rule.block_k == 0, partial=partial,
        has_bias=bias is not None, per_row=_per_row(a_outer), assembly=assembly,
        BLOCK_M=rule.block_m, BLOCK_N=rule.block_n, BLOCK_K=rule.block_k,
        num_warps=rule.num_warps, num_stages=rule.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    if partial:
        combine(out, epilogue, y, 1.0)


def parts_of(rule: Rule, tiles: int, steps: int, device: torch.device) -> tuple[int, int]:
    """Parts of K, none of them empty, and steps in each."""
    splits = rule.split or default_splits(tiles, steps, _processors(device))
    split_steps = math.ceil(steps / splits)
    return math.ceil(steps / split_steps), split_steps


def default_splits(tiles: int, steps: int, processors: int) -> int:
    """Parts of K for a grid of `tiles` with `steps` steps each."""
    wanted = PROGRAMS_PER_PROCESSOR * processors // tiles
    return max(1, min(wanted, steps // MIN_STEPS))


def _by_cublas(
    left: Operand, right: Operand, repeated: Repeated, epilogue: Epilogue, y: Tensor, rule: Rule
) -> None:
    """Route "decode". The sums of a chunk of columns leave cuBLAS in fp32, so that outer scales and
    bias still come before the only rounding."""
    a_outer, b_outer, bias = epilogue
    nothing = (repeated[0][:0], 0)
    x = decode(left, nothing)
    chunk = rule.chunk or default_chunk(y.shape[0])
    for start in range(0, y.shape[1], chunk):
        some = slice(start, min(start + chunk, y.shape[1]))
        w = decode((right[0][some], right[1][some]), repeated)
        sums = matmul_fp32(x, w.t())
        part = (a_outer, b_outer, None if bias is None else bias[some])
        combine(sums.unsqueeze(0), part, y[:, some], kernels.TILES_FACTOR.value)


def default_chunk(rows: int) -> int:
    """Columns whose fp32 sums fill SUMS_BYTES, a multiple of MIN_CHUNK."""
    return max(1, SUMS_BYTES // (4 * rows * MIN_CHUNK)) * MIN_CHUNK


def matmul_fp32(x: Tensor, w: Tensor) -> Tensor:
    """[M, K] times [K, n] with sums that stay fp32."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, w, out_dtype=torch.float32)
    return torch.mm(x.float(), w.float())  # kernels are interpreted


def decode(operand: Operand, repeated: Repeated, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """q * s * 2^-7 [rows, 16 * blocks], exact in bf16, fp16 and fp32."""
    qdata, scale = operand
    act_blocks, base_blocks = repeated
    blocks = scale.shape[1] + act_blocks.shape[0]
    out = qdata.new_empty((qdata.shape[0], 16 * blocks), dtype=dtype)
    tile = min(DECODE_TILE, triton.next_power_of_2(blocks))
    kernels.decode_operand[(qdata.shape[0] * math.ceil(blocks / tile),)](
        qdata, scale, act_blocks, out, blocks, base_blocks, act_blocks.shape[0],
        repeats=act_blocks.shape[0] > 0, BLOCK=tile, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def combine(partials: Tensor, epilogue: Epilogue, y: Tensor, factor: float) -> None:
    """y [M, n] (rows may be strided) from fp32 partials [splits, M, n]."""
    splits, rows, columns = partials.shape
    a_outer, b_outer, bias = epilogue
    tile = min(COMBINE_TILE, triton.next_power_of_2(columns))
    kernels.combine[(rows * math.ceil(columns / tile),)](
        partials, a_outer, b_outer, a_outer if bias is None else bias, y,
        rows, columns, splits, y.stride(0),
        factor=factor, has_bias=bias is not None, per_row=_per_row(a_outer), BLOCK=tile,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def aligned(qdata: Tensor) -> Tensor:
    """Contiguous bytes that can be read a block at a time."""
    qdata = qdata.contiguous()
    return qdata.clone() if qdata.data_ptr() % BLOCK_BYTES else qdata


def _per_row(a_outer: Tensor) -> bool:
    """One outer scale for each row; of a single row it is the same."""
    return a_outer.shape[0] > 1


def _ids(act_blocks: Tensor | None, like: Tensor) -> Tensor:
    if act_blocks is None:
        return torch.empty(0, dtype=torch.int32, device=like.device)
    return act_blocks.contiguous()


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Compute capability; None for a CPU, where kernels are interpreted."""
    return _cuda_capability(device.index) if device.type == "cuda" else None


def _processors(device: torch.device) -> int:
    return _processors_of(device.index) if device.type == "cuda" else PROCESSORS_INTERPRETED


@cache
def _cuda_capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@cache
def _processors_of(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
