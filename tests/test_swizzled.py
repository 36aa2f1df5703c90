"""The layout that Blackwell reads, through the operators, weights and passes, on any device."""

import pytest
import torch
import torch.nn.functional as F
from test_passes import BLOCKS, count, norm, quantize, rewritten, silu
from test_passes import inputs as rows_of_64
from test_quant_augment import CONFIGS, EMPTY, activations, augment, ids
from test_tensor import VARIANTS, assert_same, inputs, linear, make_weight, quantized
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import arc_ao.tensor
from arc_ao.formats import nvfp4
from arc_ao.ops import (
    add_rms_norm_quant_augment,
    nvfp4_gemm,
    rms_norm_quant_augment,
    silu_mul_quant_augment,
)
from arc_ao.ops.layout import (
    from_swizzled,
    scale_layout_for,
    swizzle,
    swizzled_shape,
    to_swizzled,
    unswizzle,
)
from arc_ao.ops.nvfp4_gemm import nvfp4_gemm_eager
from arc_ao.ops.quant_augment import quant_augment_eager
from arc_ao.passes.pipeline import run_passes
from arc_ao.passes.share_quantize import share_quantize

ONE = 0x38  # the e4m3 bits of 1: sums of products are exact then


def random_bytes(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, columns), generator=generator, dtype=torch.uint8)


# One tile; a ragged second tile both ways; one row of one block, which is padded to two.
@pytest.mark.parametrize("rows, blocks", [(128, 4), (130, 10), (1, 1), (33, 7)])
def test_scales_lie_where_the_closed_form_says(rows, blocks):
    """Byte off(r, b) holds the scale of row r, block b; every other byte is zero."""
    scale = random_bytes(rows, blocks) | 1
    codes, swizzled = swizzle(random_bytes(rows, 8 * blocks), scale)
    assert codes.shape == (rows, 8 * (blocks + blocks % 2)) and not codes[:, 8 * blocks :].any()
    assert swizzled.shape == swizzled_shape(rows, blocks)
    flat, tiles = swizzled.flatten(), -(-blocks // 4)
    for r in range(rows):
        for b in range(blocks):
            offset = ((r // 128) * tiles + b // 4) * 512 + (r % 32) * 16
            assert flat[offset + (r % 128) // 32 * 4 + b % 4] == scale[r, b]
    assert flat.count_nonzero() == rows * blocks
    assert torch.equal(unswizzle(codes, swizzled)[1][:, :blocks], scale)


@pytest.mark.parametrize("rows", [0, 1, 5, 130])
@pytest.mark.parametrize("name", CONFIGS)
def test_quantizing_into_tiles_is_quantizing_and_then_tiling(name, rows):
    """Bit for bit, by the kernel of this device and by the eager meaning."""
    x, config = activations(rows, 64), CONFIGS[name]
    plain = augment(x, **config)
    expected = (*swizzle(*plain[:2]), plain[2])
    by_kernel = augment(x, **config, scale_layout="swizzled")
    arguments = {"act_blocks": EMPTY, "weight_blocks": EMPTY, "outer_scale": None}
    by_meaning = quant_augment_eager(
        x, **{**arguments, "scale_mode": "token", **config}, scale_layout="swizzled"
    )
    for found in (by_kernel, by_meaning):
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("channels", [33, 64])
def test_fused_producers_tile_as_well(channels):
    """Each gives what it gives in the plain layout, tiled."""
    x, other = (activations(3, channels, torch.bfloat16) * s for s in (1, 0.5))
    weight, tail = torch.ones(channels, dtype=torch.bfloat16), (ids(1), ids(0), None, "token")
    calls = [
        (rms_norm_quant_augment, (x, weight, 1e-6)),
        (add_rms_norm_quant_augment, (x, other, weight, 1e-6)),
        (silu_mul_quant_augment, (x, other)),
    ]
    for operator, producer in calls:
        plain = operator(*producer, *tail)
        found = operator(*producer, *tail, scale_layout="swizzled")
        assert all(map(torch.equal, found, (*swizzle(*plain[:2]), *plain[2:])))


@pytest.mark.parametrize("rows, blocks", [(1, 5), (7, 6), (130, 3)])
def test_products_of_tiled_operands_are_those_of_plain_ones(rows, blocks):
    """With scales of one every sum is exact: bit for bit, by kernel and by meaning."""
    repeated = ids(2, 0)
    b, b_scale = random_bytes(19, 8 * blocks, 1), torch.full((19, blocks), ONE, dtype=torch.uint8)
    a = random_bytes(rows, 8 * (blocks + 2), 2)
    a_scale = torch.full((rows, blocks + 2), ONE, dtype=torch.uint8)
    outer, b_outer = torch.rand(rows), torch.tensor([0.3])
    rest = (torch.arange(19.0), torch.bfloat16, repeated, 3)
    for product in (nvfp4_gemm, nvfp4_gemm_eager):
        expected = product(a, a_scale, outer, b, b_scale, b_outer, *rest)
        left = (*swizzle(a, a_scale), outer)
        right = (*to_swizzled(b, b_scale, *rest[2:]), b_outer)
        found = product(*left, *right, *rest, b_layout="swizzled")
        assert torch.equal(found, expected)


@pytest.mark.parametrize("in_features", [64, 80])  # even and odd numbers of blocks
@pytest.mark.parametrize("name", VARIANTS)
def test_weights_come_back_exactly(name, in_features):
    """Plain to swizzled to plain, to panels and back; the meaning stays."""
    variant = VARIANTS[name]
    if "channel_order" in variant and in_features != 64:
        pytest.skip("the order is of 64 channels")
    weight = quantized(make_weight(in_features), **variant)
    swizzled = weight.to_layout("swizzled")
    assert swizzled.qdata.shape[1] % 16 == 0 and swizzled.weight_layout == "swizzled"
    assert_same(swizzled.to_layout("plain"), weight)
    assert_same(swizzled.to_layout("panels").to_layout("swizzled"), swizzled)
    assert torch.equal(swizzled.dequantize(), weight.dequantize())
    assert_same(swizzled[3:9], weight[3:9])


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_linears_agree_in_both_layouts_compiled_too(name):
    """F.linear, eager and compiled with varying M, within the rounding of fp32 sums."""
    weight = quantized(make_weight(), **VARIANTS[name])
    plain, swizzled = linear(weight), linear(weight.to_layout("swizzled"))
    torch._dynamo.reset()
    compiled = torch.compile(swizzled, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (1, 5, 130):
        x = inputs(rows)
        expected = plain(x)
        torch.testing.assert_close(swizzled(x), expected, rtol=2**-8, atol=1e-3)
        assert torch.equal(compiled(x), swizzled(x))


def test_copies_take_the_layout_that_is_here():
    """Loading a plain weight into a swizzled one."""
    source, target = quantized(make_weight()), quantized(make_weight() * 2).to_layout("swizzled")
    target.copy_(source)
    assert_same(target, source.to_layout("swizzled"))


def test_a_weight_takes_the_layout_of_the_gpu_that_it_moves_to(monkeypatch):
    """Once, on the way; from panels, too. Traced with fake tensors, so that no GPU is needed."""
    weight = quantized(make_weight()).to_layout("panels")
    for layout in ("swizzled", "plain"):
        monkeypatch.setattr(arc_ao.tensor, "preferred_layout", lambda device, it=layout: it)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            moved = mode.from_tensor(weight).to("cuda:0")
        assert moved.device == moved.qdata.device == torch.device("cuda:0")
        assert moved.weight_layout == layout
        assert moved.scale.shape == weight.to_layout(layout).scale.shape


@pytest.mark.parametrize("rows", [0, 5])
def test_opcheck(rows):
    x = activations(rows, 40, torch.bfloat16)
    arguments = (x, ids(1), ids(0), None, "token", None, None, "amax", "", "swizzled")
    torch.library.opcheck(torch.ops.arc.quant_augment.default, arguments)
    left = augment(x, act_blocks=ids(1), weight_blocks=ids(0), scale_layout="swizzled")
    b = random_bytes(24, 8 * 6), torch.full(swizzled_shape(24, 6), ONE, dtype=torch.uint8)
    operands = (*left, *b, torch.ones(1), None, torch.bfloat16, None, 0, "swizzled")
    torch.library.opcheck(nvfp4_gemm, operands)


def test_fake_shapes_of_a_varying_number_of_rows():
    """Traced with symbolic M, the padded shapes follow it."""

    def padded(x):
        return augment(x, scale_layout="swizzled")[1].shape

    compiled = torch.compile(padded, fullgraph=True, backend="eager", dynamic=True)
    for rows in (3, 128, 129):
        assert tuple(compiled(activations(rows, 80))) == swizzled_shape(rows, 5)


def test_refusals_name_what_was_found():
    """By kernel and by meaning."""
    with pytest.raises(RuntimeError, match=r"scale_layout must be one of .*, got 'tiles'"):
        augment(activations(2, 32), scale_layout="tiles")
    a, b = swizzle(random_bytes(3, 32), random_bytes(3, 4)), random_bytes(5, 32)
    b_scale = torch.zeros(swizzled_shape(5, 4), dtype=torch.uint8)
    outers = torch.ones(3), torch.ones(1)
    rest = (None, torch.bfloat16, None, 0, "swizzled")
    for product in (nvfp4_gemm, nvfp4_gemm_eager):
        with pytest.raises(RuntimeError, match=r"a has K_aug = 64, swizzled b has 32"):
            product(*a, outers[0], b[:, :16], b_scale, outers[1], *rest)
        with pytest.raises(RuntimeError, match=r"b has 5 rows .* expected swizzled .*\[128, 4\]"):
            product(*a, outers[0], b, b_scale[:5], outers[1], *rest)


def test_quantizations_into_different_layouts_are_not_shared():
    """Equal digests, but one reader's scales are tiled."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    layouts = ("plain", "swizzled", "swizzled")
    target = torch.ops.arc.quant_augment.default
    rest = (x, None, None, None, "token", None, None, "amax", "digest")
    graph.output([graph.call_function(target, (*rest, layout)) for layout in layouts])
    assert share_quantize(graph) == 1


def test_fused_calls_keep_the_layout():
    """The passes hand every argument on: norm, sum, gated product; bit for bit."""

    def block(x, y, w, q):
        total, how = x + y, {"scale_layout": "swizzled"}
        return quantize(norm(total, w), q, **how), quantize(silu(total) * y, q, plan="r", **how)

    gm, applied = rewritten(block, lambda g: sum(run_passes(g).values()), *rows_of_64(), BLOCKS)
    assert applied == 2
    assert count(gm, torch.ops.arc.add_rms_norm_quant_augment) == 1
    assert count(gm, torch.ops.arc.silu_mul_quant_augment) == 1


def test_plain_and_panels_read_plain_activations():
    assert [scale_layout_for(w) for w in ("plain", "panels", "swizzled")] == [
        "plain",
        "plain",
        "swizzled",
    ]


def test_from_swizzled_drops_the_copies_and_the_padding():
    """B of 3 base blocks and one of its own, one repeated: 5 blocks, padded to 6."""
    b, b_scale = random_bytes(2, 32), random_bytes(2, 4)
    tiled = to_swizzled(b, b_scale, ids(1), 3)
    assert tiled[0].shape == (2, 48)
    assert torch.equal(nvfp4.bytes_of_blocks(tiled[0])[:, 3], nvfp4.bytes_of_blocks(b)[:, 1])
    assert all(map(torch.equal, from_swizzled(*tiled, ids(1), 3, 4), (b, b_scale)))


def test_linear_of_one_row_and_no_rows():
    """M = 0 gives an empty result, as in the plain layout."""
    weight = quantized(make_weight()).to_layout("swizzled")
    assert F.linear(inputs(1)[:0], weight).shape == (0, weight.shape[0])
