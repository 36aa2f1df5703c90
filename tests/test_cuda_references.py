"""CUTLASS's and the CUDA toolkit's own headers, compiled for the host, agree with arc_ao's meaning.

No CUDA code runs: the layout, the reference product and the conversions are host code there.
"""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from cuda_tools import header_flags, need
from test_cuda_rows import CXX, call, floats
from torch import Tensor

from arc_ao.formats import nvfp4
from arc_ao.ops.layout import swizzle, swizzled_shape
from arc_ao.ops.nvfp4_gemm import nvfp4_gemm_eager

SOURCE = Path(__file__).parent / "cpp" / "cutlass_host.cpp"
# M, N, K: whole tiles; ragged ones; one row; one pair of blocks.
SHAPES = [(256, 128, 128), (200, 130, 96), (1, 256, 512), (130, 5, 32)]


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> ctypes.CDLL:
    need(CXX, "no C++ compiler")
    target = tmp_path_factory.mktemp("cutlass") / "references.so"
    # CUTLASS's conversions name device intrinsics that the host never runs.
    flags = "-fpermissive -w -std=c++17 -O2 -shared -fPIC".split()
    command = [*CXX, *flags, *header_flags(), str(SOURCE), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return ctypes.CDLL(str(target))


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@pytest.mark.parametrize("shape", SHAPES)
def test_cutlass_reads_scales_where_arc_ao_writes_them(references, shape):
    """0 mismatches, for either operand: scales whose bytes are their own places, swizzled."""
    m, n, k = shape
    for rows, offsets in ((m, references.cutlass_offsets_a), (n, references.cutlass_offsets_b)):
        blocks = k // 16
        found = torch.empty((rows, blocks), dtype=torch.int64)
        offsets(m, n, k, pointer(found))
        assert found.unique().numel() == rows * blocks
        assert found.max() < torch.Size(swizzled_shape(rows, blocks)).numel()
        for byte in range(3):
            plain = (torch.arange(rows * blocks) >> 8 * byte).to(torch.uint8).view(rows, blocks)
            _, tiled = swizzle(torch.zeros(rows, 8 * blocks, dtype=torch.uint8), plain)
            assert torch.equal(tiled.flatten()[found], plain)


def operand(rows: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Any codes; scales of which sums of products are exact in fp32, whatever their order."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, k // 2), generator=generator, dtype=torch.uint8)
    values = nvfp4.encode_e4m3(torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0]))
    picked = torch.randint(0, 5, (rows, k // 16), generator=generator)
    return codes, values[picked]


@pytest.mark.parametrize("shape", SHAPES)
def test_cutlass_reference_product_is_the_eager_one(references, shape):
    """Bit for bit: codes, their order in a byte, scales and layout mean the same to both."""
    m, n, k = shape
    (a, a_scale), (b, b_scale) = operand(m, k, 0), operand(n, k, 1)
    left, right = swizzle(a, a_scale), swizzle(b, b_scale)
    found = torch.zeros((m, n))
    references.cutlass_gemm(m, n, k, *map(pointer, (*left, *right)), pointer(found))
    one = torch.ones(1)
    expected = nvfp4_gemm_eager(
        *left, one, *right, one, None, torch.float32, None, 0, b_layout="swizzled"
    )
    assert torch.equal(found, expected) and found.abs().sum() > 0
    plain = nvfp4_gemm_eager(a, a_scale, one, b, b_scale, one, None, torch.float32)
    assert torch.equal(found, plain)


@pytest.mark.parametrize("author", ["cutlass", "cuda"])
def test_codes_agree_with_nvidias_conversions(references, author):
    """All bf16 numbers and more; NaN has no code, and never comes to be one."""
    v = floats()
    v = v[~v.isnan()].contiguous()
    out = torch.empty(v.shape, dtype=torch.uint8)
    call(getattr(references, f"{author}_e2m1"), v, out)
    assert torch.equal(out & 15, nvfp4.encode_e2m1(v))


@pytest.mark.parametrize("author", ["cutlass", "cuda"])
def test_block_scales_agree_with_nvidias_conversions(references, author):
    """What is finite, and at least arc_ao's least scale of 2^-9."""
    v = floats().abs()
    v = v[v.isfinite() & (v >= nvfp4.F8_E4M3_MIN)].contiguous()
    out = torch.empty(v.shape, dtype=torch.uint8)
    call(getattr(references, f"{author}_e4m3"), v, out)
    assert torch.equal(out, nvfp4.encode_e4m3(nvfp4.round_to_e4m3(v)))
