"""The CUDA kernels' row functions, compiled for the host, against the eager meaning, bit for bit.

Between the test and those functions lies all that blackwell.py does but the call on a device.
"""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from test_quant_augment import CONFIGS, EMPTY, activations, ids
from torch import Tensor

import build_native
from arc_ao.formats import nvfp4
from arc_ao.ops import producers
from arc_ao.ops.cuda import blackwell, library
from arc_ao.ops.layout import swizzle, to_panels, to_swizzled
from arc_ao.ops.nvfp4_gemm import nvfp4_gemm_eager
from arc_ao.ops.quant_augment import quant_augment_eager

SOURCE = Path(__file__).parent / "cpp" / "cuda_rows.cpp"
CXX = build_native.compiler()
pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ALL_BF16 = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> ctypes.CDLL:
    target = tmp_path_factory.mktemp("rows") / "rows.so"
    flags = "-std=c++17 -O2 -ffp-contract=off -Wall -Wextra -Werror -Wno-unknown-pragmas".split()
    command = [*CXX, *flags, "-shared", "-fPIC", str(SOURCE), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(target))


@pytest.fixture
def on_host(host, monkeypatch) -> None:
    """blackwell.py's calls go to the host's build of the row functions."""
    monkeypatch.setattr(
        blackwell, "_quantize_on_device", lambda q, device, op: host.host_quantize(ctypes.byref(q))
    )
    monkeypatch.setattr(
        blackwell, "_multiply_on_device", lambda g, device: host.host_dot(ctypes.byref(g))
    )


def call(function, *arrays: Tensor, number: int | None = None) -> None:
    """function(first, count, [number,] out)"""
    first, out = arrays
    extra = () if number is None else (ctypes.c_int32(number),)
    count = ctypes.c_int64(first.numel())
    function(ctypes.c_void_p(first.data_ptr()), count, *extra, ctypes.c_void_p(out.data_ptr()))


def floats() -> Tensor:
    """All bf16 numbers, random bit patterns, the ties of e2m1 and e4m3 and their neighbours."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    halves = nvfp4.decode_e4m3(torch.arange(0x7F, dtype=torch.uint8))
    ties = torch.cat((ties, (halves[1:] + halves[:-1]) / 2))
    near = [ties, ties.nextafter(torch.tensor(0.0)), ties.nextafter(torch.tensor(1e9))]
    values = [ALL_BF16.float(), patterns.view(torch.float32), *near, *(-t for t in near)]
    return torch.cat(values).contiguous()


def test_codes_of_every_number(host):
    """e2m1 as nvfp4.encode_e2m1; NaN never comes that far."""
    v = floats()
    v = v[~v.isnan()].contiguous()
    out = torch.empty(v.shape, dtype=torch.uint8)
    call(host.host_e2m1, v, out)
    assert torch.equal(out, nvfp4.encode_e2m1(v))


def test_scales_of_every_number(host):
    """e4m3 as nvfp4.round_to_e4m3, NaN for what is not finite."""
    v = floats().abs()
    out = torch.empty(v.shape, dtype=torch.uint8)
    call(host.host_e4m3, v, out)
    assert torch.equal(out, nvfp4.encode_e4m3(nvfp4.round_to_e4m3(v)))


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_16_bit_numbers_convert_as_in_torch(host, dtype):
    """Both ways, NaN staying NaN."""
    v, number = floats(), library.NUMBERS[dtype]
    raw = torch.empty(v.shape, dtype=torch.uint16)
    call(host.host_narrow, v, raw, number=number)
    found = raw.view(dtype)
    assert torch.equal(found.isnan(), v.isnan())
    kept = ~v.isnan()
    assert torch.equal(found[kept].view(torch.int16), v.to(dtype)[kept].view(torch.int16))
    every = ALL_BF16.view(torch.uint16)
    wide = torch.empty(every.shape)
    call(host.host_widen, every, wide, number=number)
    torch.testing.assert_close(wide, every.view(dtype).float(), rtol=0, atol=0, equal_nan=True)


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for i, (left, right) in enumerate(zip(found, expected, strict=True)):
        assert left.shape == right.shape and left.dtype == right.dtype
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True, msg=str(i))


def arguments(config: dict) -> dict:
    plain = {"act_blocks": EMPTY, "weight_blocks": EMPTY, "outer_scale": None}
    return {**plain, "scale_mode": "token", **config}


@pytest.mark.parametrize("layout", ["plain", "swizzled"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_quantized_rows(on_host, name, dtype, layout):
    """Every option, with and without tiles, on rows that are not aligned, too."""
    how = {**arguments(CONFIGS[name]), "scale_layout": layout}
    x = activations(5, 64, dtype)
    x[3, 7], x[4, 9] = torch.nan, torch.inf
    x[2] = 0
    for rows in (x, activations(9, 64, dtype)[::2], activations(130, 64, dtype)):
        assert_same(blackwell.quant_augment(rows, **how), quant_augment_eager(rows, **how))


@pytest.mark.parametrize("channels", [1, 16, 40, 80])  # ragged; odd numbers of blocks
@pytest.mark.parametrize("block_scale", nvfp4.BLOCK_SCALES)
def test_ragged_rows(on_host, channels, block_scale):
    how = {**arguments({"act_blocks": ids(0)}), "block_scale": block_scale}
    x = activations(3, channels, torch.bfloat16).reshape(3, 1, channels)
    for layout in ("plain", "swizzled"):
        found = blackwell.quant_augment(x, **how, scale_layout=layout)
        assert_same(found, quant_augment_eager(x, **how, scale_layout=layout))


@pytest.mark.parametrize("block_scale", nvfp4.BLOCK_SCALES)
@pytest.mark.parametrize("outer", [None, 0.01])
def test_every_bf16_number_quantizes_alike(on_host, block_scale, outer):
    """Rows of neighbours, so that blocks hold numbers of one size; under a given outer scale, most
    are beyond the largest or below the smallest block scale."""
    x = ALL_BF16.reshape(-1, 256)
    how = arguments({"act_blocks": torch.arange(16, dtype=torch.int32)})
    how["block_scale"] = block_scale
    if outer is not None:
        how |= {"scale_mode": "static", "outer_scale": torch.tensor([outer])}
    assert_same(blackwell.quant_augment(x, **how), quant_augment_eager(x, **how))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["blocks", "channels", "sorted", "tensor"])
def test_fused_producers(on_host, name, dtype):
    """RMSNorm, with and without the addition, and the gated product."""
    tail = tuple(arguments(CONFIGS[name]).get(k) for k in ("act_blocks", "weight_blocks"))
    tail += (None, arguments(CONFIGS[name])["scale_mode"], CONFIGS[name].get("channel_order"))
    tail += (CONFIGS[name].get("act_channels"), CONFIGS[name].get("block_scale", "amax"))
    x, other = activations(5, 64, dtype), activations(10, 64, dtype)[::2]
    weight = activations(1, 64, dtype)[0]
    cases = [
        ("rms_norm_quant_augment", (x, weight, 1e-5)),
        ("add_rms_norm_quant_augment", (x, other, weight, 1e-5)),
        ("silu_mul_quant_augment", (x, other)),
        ("gelu_quant_augment", (x, None, "none")),
        ("gelu_quant_augment", (x, other, "tanh")),
    ]
    for operator, inputs in cases:
        for layout in ("plain", "swizzled"):
            rest = (*tail, "", layout)
            found = getattr(blackwell, operator)(*inputs, *rest)
            assert_same(found, getattr(producers, f"{operator}_eager")(*inputs, *rest))


def test_empty_input_gives_what_the_meaning_gives(on_host):
    for mode in ("token", "tensor"):
        how = {**arguments({"scale_mode": mode}), "scale_layout": "swizzled"}
        for shape in ((0, 32), (2, 0, 32)):
            x = torch.zeros(shape, dtype=torch.bfloat16)
            assert_same(blackwell.quant_augment(x, **how), quant_augment_eager(x, **how))


def product_operands(rows: int, cols: int, blocks: int) -> tuple[tuple, tuple]:
    """Quantized activations and weights of `blocks` blocks, one of them repeated."""
    left = activations(rows, 16 * blocks, torch.bfloat16)
    right = activations(cols, 16 * blocks)
    a = quant_augment_eager(left, ids(1), EMPTY, None, "token")
    b = quant_augment_eager(right, EMPTY, EMPTY, None, "tensor")
    return a, b


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, cols, blocks", [(1, 1, 2), (3, 17, 4), (9, 8, 33), (0, 4, 2)])
def test_products_of_few_rows(on_host, rows, cols, blocks, dtype, per_row):
    """The dot kernel's steps are within the bound of fp32 sums: one ulp of the output's dtype, and
    1e-6 of the row's absolute sum."""
    (a, a_scale, a_outer), (b, b_scale, b_outer) = product_operands(rows, cols, blocks)
    if not per_row:
        a_outer = torch.tensor([0.7])
    b_outer = b_outer / 1024  # within the range of fp16
    bias = torch.linspace(-1, 1, cols).bfloat16()
    left = nvfp4.decode(a, a_scale).double()
    whole = to_swizzled(b, b_scale, ids(1), blocks)
    right = nvfp4.decode(b, b_scale).double().unflatten(1, (-1, 16))
    right = torch.cat((right, right[:, 1:2]), 1).flatten(1)
    outer = (a_outer.unsqueeze(1) * b_outer).double()
    exact = left @ right.t() * outer + bias.double()
    bound = 1e-6 * (left.abs() @ right.abs().t()) * outer
    found = blackwell.nvfp4_gemm(
        *swizzle(a, a_scale), a_outer, *whole, b_outer, bias, dtype, b_layout="swizzled"
    )
    assert found.dtype == dtype and found.shape == (rows, cols)
    ulp = exact.abs() * torch.finfo(dtype).eps
    assert ((found.double() - exact).abs() <= bound + ulp).all()


def test_products_take_weights_in_any_layout(on_host):
    """Plain weights and panels are brought into the swizzled layout first."""
    (a, a_scale, a_outer), (b, b_scale, b_outer) = product_operands(3, 35, 4)
    rest = (b_outer, None, torch.bfloat16, ids(1), 4)
    expected = nvfp4_gemm_eager(a, a_scale, a_outer, b, b_scale, *rest)
    plain = blackwell.nvfp4_gemm(a, a_scale, a_outer, b, b_scale, *rest)
    panels = blackwell.nvfp4_gemm(a, a_scale, a_outer, *to_panels(b, b_scale), *rest, "panels")
    assert torch.equal(plain, panels)
    torch.testing.assert_close(plain, expected, rtol=2**-7, atol=1e-4)


def test_a_token_that_is_not_finite_stays_so(on_host):
    """Its whole row of the output is NaN, and no other."""
    x = activations(3, 64, torch.bfloat16)
    x[1, 5] = torch.inf
    a = quant_augment_eager(x, EMPTY, EMPTY, None, "token", scale_layout="swizzled")
    b = quant_augment_eager(activations(8, 64), EMPTY, EMPTY, None, "tensor")
    right = (*swizzle(*b[:2]), b[2])
    y = blackwell.nvfp4_gemm(*a, *right, None, torch.bfloat16, b_layout="swizzled")
    assert torch.equal(y.isnan().all(1), torch.tensor([False, True, False]))
    assert torch.equal(y.isnan().any(1), y.isnan().all(1))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"act_blocks": torch.zeros(1, dtype=torch.int64)}, "act_blocks must be int32"),
        ({"channel_order": ids(0, 1)}, r"channel_order must be int32 \[64\], got int32 \[2\]"),
        ({"act_blocks": EMPTY.to("meta")}, "act_blocks is on meta, expected cpu"),
        ({"scale_mode": "row"}, "scale_mode must be one of"),
    ],
)
def test_refusals(on_host, change, message):
    with pytest.raises(RuntimeError, match=f"quant_augment: {message}"):
        blackwell.quant_augment(activations(2, 64), **arguments(change))


def test_reasons_name_what_is_lacking(monkeypatch):
    """By capability, torch and library, in this order."""
    assert "for compute capability 10.0, 10.3, 12.0, 12.1, not for compute capability 9.0" in (
        blackwell.reason_absent((9, 0))
    )
    monkeypatch.setattr(torch.version, "cuda", None)
    assert blackwell.reason_absent((12, 0)) == "this torch was built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(library, "load", lambda: None)
    assert "ARC_AO_CUDA=1" in blackwell.reason_absent((10, 3))
    monkeypatch.setattr(library, "load", lambda: object())
    monkeypatch.setattr(library, "architectures", lambda: ["100f"])
    assert blackwell.reason_absent((10, 3)) is None
    assert "built for 100f, not for compute capability 12.1" in blackwell.reason_absent((12, 1))
