"""Native CPU kernels at every level that this machine has, against the eager meaning."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from arc_ao.formats import nvfp4
from arc_ao.ops import (
    add_rms_norm_quant_augment,
    gelu_quant_augment,
    native,
    nvfp4_gemm,
    producers,
    quant_augment,
    rms_norm_quant_augment,
    silu_mul_quant_augment,
)
from arc_ao.ops.layout import from_panels, to_panels
from arc_ao.ops.quant_augment import quant_augment_eager

if native.load() is None:
    pytest.skip(f"no native kernels: {native.reason_absent()}", allow_module_level=True)

LEVELS = native.available_levels()
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EMPTY = torch.zeros(0, dtype=torch.int32)


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


AUGMENTATIONS = {  # of K = 200: blocks 0 to 12, the last one half padding
    "plain": {},
    "blocks": {"act_blocks": ids(12, 0, 12), "weight_blocks": ids(3, 12)},
    "channels": {"act_channels": torch.arange(0, 96, 3, dtype=torch.int32)},
    "sorted": {
        "act_blocks": ids(1),
        "channel_order": torch.randperm(200, generator=generator(0)).int(),
    },
    "four_over_six": {
        "act_blocks": ids(5),
        "act_channels": torch.arange(16, dtype=torch.int32),
        "block_scale": "four_over_six",
    },
    "searched": {
        "act_blocks": ids(12, 5),
        "act_channels": torch.arange(32, dtype=torch.int32),
        "weight_blocks": ids(0),
        "block_scale": "mse",
    },
    "searched, static": {  # some blocks beyond the largest scale, some below the smallest
        "act_blocks": ids(3),
        "block_scale": "mse",
        "scale_mode": "static",
        "outer_scale": torch.tensor([0.003]),
    },
    "tensor": {"act_blocks": ids(2), "scale_mode": "tensor"},
    "static": {"act_blocks": ids(2), "scale_mode": "static", "outer_scale": torch.tensor([0.003])},
    "static zero": {"scale_mode": "static", "outer_scale": torch.zeros(1)},
}


def arguments(**changes) -> tuple:
    """Everything behind the input of `quant_augment`, by position."""
    given = {"act_blocks": EMPTY, "weight_blocks": EMPTY, "outer_scale": None}
    given |= {"scale_mode": "token", "channel_order": None, "act_channels": None}
    return tuple((given | {"block_scale": "amax"} | changes).values())


def assert_same_bits(native_outputs, eager_outputs) -> None:
    for mine, meaning in zip(native_outputs, eager_outputs, strict=True):
        assert mine.shape == meaning.shape and mine.dtype == meaning.dtype
        assert torch.equal(mine.nan_to_num(7.0), meaning.nan_to_num(7.0))
        assert torch.equal(mine.isnan(), meaning.isnan())


def hard_rows(dtype: torch.dtype) -> Tensor:
    """[*, 200]: ties, subnormals, zeros of both signs, extremes, NaN, Inf, and random rows."""
    steps = torch.arange(200) % 33 * 0.25 * torch.tensor([1.0, -1.0]).repeat(100)  # all ties
    tiny = torch.finfo(dtype).smallest_normal
    rows = [steps, steps * 448, steps * tiny, torch.zeros(200), torch.full((200,), -0.0)]
    rows += [torch.full((200,), torch.finfo(dtype).max), torch.linspace(-1, 1, 200) * 2.0**-118]
    for special in (math.nan, math.inf, -math.inf):
        row = torch.randn(200, generator=generator(1))
        row[37] = special
        rows.append(row)
    spread = torch.randn(6, 200, generator=generator(2)) * torch.logspace(-4, 4, 200)
    return torch.stack([*rows, *spread, *(spread[:, torch.randperm(200)])]).to(dtype)


@pytest.mark.parametrize("config", AUGMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quant_augment_bits(level, dtype, config):
    x, rest = hard_rows(dtype), arguments(**AUGMENTATIONS[config])
    assert_same_bits(quant_augment(x, *rest), quant_augment_eager(x, *rest))


@pytest.mark.parametrize("shape", [(0, 64), (1, 16), (3, 1), (2, 3, 40), (5, 4096)])
def test_quant_augment_shapes(level, shape):
    x = torch.randn(shape, generator=generator(3)).bfloat16()
    assert_same_bits(quant_augment(x, *arguments()), quant_augment_eager(x, *arguments()))


def test_quant_augment_reads_any_strides(level):
    x = torch.randn(64, 48, generator=generator(4))
    for view in (x.t(), x[::2, ::3], x[:, 5:37], x.expand(2, 64, 48), x[:1].expand(9, 48)):
        assert_same_bits(quant_augment(view, *arguments()), quant_augment_eager(view, *arguments()))


@pytest.mark.parametrize("block_scale", nvfp4.BLOCK_SCALES)
@pytest.mark.parametrize("outer", [None, 0.01])
def test_quant_augment_bits_of_every_bf16_number(level, block_scale, outer):
    """In rows of neighbours; under a given outer scale, most are beyond the largest or below the
    smallest block scale."""
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    x = x.reshape(-1, 256)
    changes = {"act_blocks": torch.arange(16, dtype=torch.int32), "block_scale": block_scale}
    if outer is not None:
        changes |= {"scale_mode": "static", "outer_scale": torch.tensor([outer])}
    rest = arguments(**changes)
    assert_same_bits(quant_augment(x, *rest), quant_augment_eager(x, *rest))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    channels=st.integers(1, 80),
    exponent=st.integers(-130, 120),
    spread=st.integers(0, 20),
    block_scale=st.sampled_from(nvfp4.BLOCK_SCALES),
    dtype=st.sampled_from(DTYPES),
)
def test_quant_augment_bits_of_anything(seed, channels, exponent, spread, block_scale, dtype):
    """Random magnitudes over random ranges, at every level."""
    random = generator(seed)
    powers = torch.randint(0, spread + 1, (4, channels), generator=random) + exponent
    x = torch.ldexp(torch.randn(4, channels, generator=random), powers).to(dtype)
    blocks = -(-channels // 16)
    rest = arguments(act_blocks=ids(blocks - 1), block_scale=block_scale)
    meaning = quant_augment_eager(x, *rest)
    for name in LEVELS:
        with native.capped_at(name):
            assert_same_bits(quant_augment(x, *rest), meaning)


def test_every_half_and_bf16_number_is_read_and_written(level):
    """All 65536 patterns as input, and as the output of a product with 1."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        x = patterns.view(dtype).view(-1, 16)
        assert_same_bits(quant_augment(x, *arguments()), quant_augment_eager(x, *arguments()))
        x = x[x.isfinite().all(1)]
        weight = rms_norm_quant_augment(x, torch.ones(16, dtype=dtype), 0.0, *arguments())
        meaning = producers.rms_norm_quant_augment_eager(
            x, torch.ones(16, dtype=dtype), 0.0, *arguments()
        )
        assert_same_bits(weight, meaning)


@pytest.mark.parametrize("config", ["plain", "blocks", "sorted", "tensor"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_producers_bits(level, dtype, config):
    x, other = hard_rows(dtype), hard_rows(dtype).roll(3, 0)
    weight, rest = hard_rows(dtype)[-1], arguments(**AUGMENTATIONS[config])
    for operator, eager, inputs in (
        (rms_norm_quant_augment, producers.rms_norm_quant_augment_eager, (x, weight, 1e-5)),
        (
            add_rms_norm_quant_augment,
            producers.add_rms_norm_quant_augment_eager,
            (x, other, weight, 1e-6),
        ),
        (silu_mul_quant_augment, producers.silu_mul_quant_augment_eager, (x, other)),
        (gelu_quant_augment, producers.gelu_quant_augment_eager, (x, None, "none")),
        (gelu_quant_augment, producers.gelu_quant_augment_eager, (x, other, "tanh")),
    ):
        assert_same_bits(operator(*inputs, *rest), eager(*inputs, *rest))


def weight_operand(cols: int, blocks: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random codes and random scales from 2^-9 to 448."""
    qdata = torch.randint(0, 256, (cols, blocks * 8), generator=generator(seed), dtype=torch.uint8)
    scale = torch.randint(0, 0x7F, (cols, blocks), generator=generator(seed + 1), dtype=torch.uint8)
    return qdata, scale


def exact_product(a, b, columns: list[int], bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """In float64, and the sum of absolute products of each output."""
    left, right = (nvfp4.decode(*operand[:2]).double() for operand in (a, b))
    right = nvfp4.to_blocks(right)[:, columns].flatten(1)
    outer = a[2].double().unsqueeze(1) * b[2].double()
    y, absolute = (left @ right.t()) * outer, (left.abs() @ right.t().abs()) * outer
    return (y if bias is None else y + bias.double()), absolute


def assert_close_enough(
    y: Tensor, exact: Tensor, absolute: Tensor, *, equal: float = 0.999
) -> None:
    """At least 99.9 % equal the rounded exact product, none is off by more than one ulp
    and 1e-6 of the absolute sum."""
    rounded = exact.to(y.dtype)
    exponent = torch.floor(torch.log2(rounded.abs().double().clamp_min(1e-300)))
    ulp = torch.exp2(exponent) * torch.finfo(y.dtype).eps
    assert ((y.double() - exact).abs() <= ulp + 1e-6 * absolute).all()
    if y.dtype != torch.float32 and y.numel() >= 10_000:
        assert (y == rounded).double().mean() >= equal


@pytest.mark.parametrize("layout", ["plain", "panels"])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 8, 9, 37, 130])
@pytest.mark.parametrize("cols", [1, 15, 16, 100, 256])
def test_gemm(level, rows, cols, layout):
    """Ragged M and N, repeated base blocks, a bias, both layouts."""
    base, act = 13, ids(12, 0, 12, 5)
    x = torch.randn(rows, 16 * base, generator=generator(rows)).bfloat16()
    a = quant_augment(x, *arguments(act_blocks=act, weight_blocks=ids(2, 7)))
    b = (*weight_operand(cols, base + 2, cols), torch.tensor([0.01]))
    stored = (*(to_panels(*b[:2]) if layout == "panels" else b[:2]), b[2])
    bias = torch.randn(cols, generator=generator(5)).bfloat16() if cols % 2 else None
    columns = [*range(base), *act.tolist(), base, base + 1]
    exact, absolute = exact_product(a, b, columns, bias)
    for dtype in DTYPES:
        y = nvfp4_gemm(*a, *stored, bias, dtype, act, base, layout)
        assert y.shape == (rows, cols) and y.dtype == dtype
        assert_close_enough(y, exact, absolute)


@pytest.mark.parametrize("blocks", [1, 2, 3, 257])
def test_gemm_of_any_k(level, blocks):
    """K from 16 up; enough outputs to count how many are rounded correctly."""
    x = torch.randn(80, 16 * blocks, generator=generator(6)).bfloat16()
    a = quant_augment(x, *arguments())
    b = (*weight_operand(160, blocks, 7), torch.tensor([1e-3]))
    exact, absolute = exact_product(a, b, list(range(blocks)), None)
    y = nvfp4_gemm(*a, *b, None, torch.bfloat16)
    # One block: x is bf16, so its dequantized values lie within fp32 rounding of ties in bf16.
    assert_close_enough(y, exact, absolute, equal=0.99 if blocks == 1 else 0.999)


def test_gemm_of_every_number_of_rows(level):
    """Tiles of 16 rows, strips of 32 and groups of 8, each with every remainder."""
    x = torch.randn(130, 80, generator=generator(17)).bfloat16()
    a = quant_augment(x, *arguments())
    b = (*weight_operand(49, 5, 18), torch.tensor([1e-3]))
    exact, absolute = exact_product(a, b, list(range(5)), None)
    for rows in range(1, 131):
        first = [t[:rows] for t in a]
        y = nvfp4_gemm(*first, *b, None, torch.float32)
        assert_close_enough(y, exact[:rows], absolute[:rows])


BLOCKED_SHAPES = {  # rows, columns, blocks: what is cut for caches and threads
    "two passes over the rows": (2049, 40, 17),
    "columns in parts and K in slabs": (70, 1130, 131),
    "rows and columns in parts": (1040, 600, 33),
    "decoded panels, K in chunks": (101, 72, 150),
    "whole multiples of everything": (1024, 512, 64),
}


@pytest.mark.parametrize("layout", ["plain", "panels"])
@pytest.mark.parametrize("shape", BLOCKED_SHAPES)
def test_gemm_of_blocked_shapes(level, shape, layout):
    """Right, and the same bits with one thread and with four."""
    rows, cols, base = BLOCKED_SHAPES[shape]
    act = torch.randint(0, base, (7,), generator=generator(19), dtype=torch.int32)
    x = torch.randn(rows, 16 * base, generator=generator(20)).bfloat16()
    a = quant_augment(x, *arguments(act_blocks=act))
    b = (*weight_operand(cols, base, 21), torch.tensor([1e-3]))
    stored = (*(to_panels(*b[:2]) if layout == "panels" else b[:2]), b[2])
    bias = torch.randn(cols, generator=generator(22))
    exact, absolute = exact_product(a, b, [*range(base), *act.tolist()], bias)
    before = torch.get_num_threads()
    try:
        products = []
        for threads in (1, 4):
            torch.set_num_threads(threads)
            products.append(nvfp4_gemm(*a, *stored, bias, torch.bfloat16, act, base, layout))
    finally:
        torch.set_num_threads(before)
    assert_close_enough(products[0], exact, absolute)
    assert torch.equal(*products)


def test_layouts_give_the_same_bits(level):
    a = quant_augment(torch.randn(11, 64, generator=generator(8)), *arguments())
    b = weight_operand(40, 4, 9)
    products = [
        nvfp4_gemm(*a, *stored, torch.ones(1), None, torch.float32, None, 0, layout)
        for stored, layout in ((b, "plain"), (to_panels(*b), "panels"))
    ]
    assert torch.equal(*products)


@pytest.mark.parametrize("cols", [3, 16, 40])
def test_panels_are_what_the_layout_says_and_come_back(cols):
    qdata, scale = weight_operand(cols, 3, 10)
    packed, packed_scale = to_panels(qdata, scale)
    whole = cols // 16 * 16
    for p, b, h, r, i in ((0, 0, 0, 0, 0), (0, 2, 1, 15, 3), (1, 1, 0, 7, 2)):
        if p * 16 + r < whole:
            flat = packed[p * 16 : p * 16 + 16].flatten()
            assert flat[((b * 2 + h) * 16 + r) * 4 + i] == qdata[16 * p + r, 8 * b + 4 * h + i]
            scales = packed_scale[p * 16 : p * 16 + 16].flatten()
            assert scales[b * 16 + r] == scale[16 * p + r, b]
    assert torch.equal(packed[whole:], qdata[whole:])
    back = from_panels(packed, packed_scale)
    assert torch.equal(back[0], qdata) and torch.equal(back[1], scale)


def test_a_rows_nan_stays_in_its_row_and_a_scales_nan_in_its_column(level):
    x = torch.randn(9, 32, generator=generator(11))
    x[4, 20] = math.nan
    a = quant_augment(x, *arguments())
    qdata, scale = weight_operand(20, 2, 12)
    scale[17, 1] = nvfp4.E4M3_NAN
    y = nvfp4_gemm(*a, qdata, scale, torch.ones(1), None, torch.float32)
    expected = torch.zeros(9, 20, dtype=torch.bool)
    expected[4], expected[:, 17] = True, True
    assert torch.equal(y.isnan(), expected)


def test_gemm_reads_any_strides(level):
    a = quant_augment(torch.randn(6, 64, generator=generator(13)), *arguments())
    b, b_scale = weight_operand(32, 4, 14)
    strided = [t.t().contiguous().t() for t in (*a[:2], b, b_scale)]
    y = nvfp4_gemm(*a, b, b_scale, torch.ones(1), None, torch.float32)
    other = nvfp4_gemm(
        strided[0], strided[1], a[2], *strided[2:], torch.ones(1), None, torch.float32
    )
    assert torch.equal(y, other)


def test_bits_do_not_depend_on_threads_or_batch(level):
    """A row's bits are its own: alone, in a batch, with one thread or two."""
    x = torch.randn(130, 320, generator=generator(15)).bfloat16()
    b, b_scale = weight_operand(96, 20, 16)

    def product(rows: Tensor) -> Tensor:
        a = quant_augment(rows, *arguments())
        return nvfp4_gemm(*a, b, b_scale, torch.ones(1), None, torch.float32)

    whole, before = product(x), torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(product(x), whole)
    finally:
        torch.set_num_threads(before)
    few = product(x[:7])
    assert torch.equal(torch.cat([product(row) for row in x[:7].split(1)]), few)
    if level != "amx":  # with tile registers many rows are added up in another order
        assert torch.equal(whole[:7], few)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"act_blocks": ids(13)}, "act_blocks holds 13, expected 0 to 12"),
        ({"weight_blocks": ids(-1)}, "weight_blocks holds -1, expected 0 to 12"),
        ({"act_blocks": torch.tensor([0])}, "act_blocks must be int32"),
        ({"channel_order": ids(1, 0)}, r"channel_order must be int32 \[200\], got int32 \[2\]"),
    ],
)
def test_ids_outside_are_refused(changes, message):
    """By kernels, which must not read there, and by the eager meaning."""
    for operator in (quant_augment, quant_augment_eager):
        with pytest.raises(RuntimeError, match=message):
            operator(torch.zeros(2, 200), *arguments(**changes))


def test_a_level_that_is_not_here_is_refused():
    with pytest.raises(ValueError, match=r"level: expected one of \['portable'.*got 'sse9'"):
        with native.capped_at("sse9"):
            pass
