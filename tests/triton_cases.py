"""Triton kernels on CPU tensors, under Triton's interpreter: run by test_triton.py.

    TRITON_INTERPRET=1 pytest tests/triton_cases.py

Interpreted kernels take half a second a program, so shapes are tiny and rows few.
"""

import ptx_model
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from arc_ao.formats import nvfp4
from arc_ao.ops import producers
from arc_ao.ops.cuda import (
    triton_bytes,
    triton_nvfp4,
    triton_producers,
    triton_products,
    triton_weight_only,
)
from arc_ao.ops.cuda.tuning import Rule
from arc_ao.ops.layout import to_panels
from arc_ao.ops.nvfp4_gemm import decode_weight
from arc_ao.ops.nvfp4_weight_only_gemm import nvfp4_weight_only_gemm_eager
from arc_ao.ops.quant_augment import quant_augment_eager

EPS = 1e-6
EMPTY = torch.zeros(0, dtype=torch.int32)


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def activations(rows: int, channels: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Rows of different size with outlier channels; the last row is zero."""
    x = torch.randn(rows, channels, generator=generator())
    x[:, ::11] *= 20
    x *= torch.logspace(-2, 2, rows).unsqueeze(1)
    x[-1] = 0
    return x.to(dtype)


def same_bits(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> None:
    """All tensors equal, NaN to NaN, and of one dtype."""
    for a, b in zip(left, right, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@triton.jit
def convert(values, e4m3, e2m1, rounded, decoded, N: tl.constexpr):
    """Every conversion of triton_nvfp4.py on N fp32 values."""
    i = tl.arange(0, N)
    x = tl.load(values + i)
    tl.store(e2m1 + i, triton_nvfp4.encode_e2m1(x).to(tl.uint8))
    scale = triton_nvfp4.encode_e4m3(tl.where(x < 0, -x, x))
    tl.store(e4m3 + i, scale.to(tl.uint8))
    tl.store(decoded + i, triton_nvfp4.decode_e4m3(scale))
    tl.store(rounded + i, triton_nvfp4.narrow(triton_nvfp4.round_to(x, tl.bfloat16), tl.bfloat16))


def test_conversions_equal_the_meaning_on_all_bf16_and_on_ties():
    """Every bf16 value, ties of e2m1, e4m3 and bf16, their neighbours, and values beyond them."""
    patterns = torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16).float()
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 464.0, 448.0, 1.5 * 2.0**-9])
    ties = torch.cat([ties, 1 + torch.arange(64) / 32, 1 + torch.arange(1024) / 512])
    around = torch.cat([ties, torch.nextafter(ties, ties * 2), torch.nextafter(ties, ties * 0)])
    some = torch.randn((1 << 17) - patterns.numel() - 2 * around.numel(), generator=generator())
    x = torch.cat([patterns, around, -around, some * 300])
    codes = [torch.empty(x.numel(), dtype=torch.uint8) for _ in range(2)]
    rounded, decoded = torch.empty_like(x, dtype=torch.bfloat16), torch.empty_like(x)
    convert[(1,)](x, *codes, rounded, decoded, N=x.numel())
    scale = nvfp4.encode_e4m3(nvfp4.round_to_e4m3(x.abs()))
    same_bits((*codes, rounded), (scale, nvfp4.encode_e2m1(x), x.bfloat16()))
    same_bits((decoded,), (nvfp4.decode_e4m3(scale),))


@triton.jit
def look_up(words, permuted, dotted, N: tl.constexpr):
    """The instructions of triton_bytes.py, spelled out, on N int32 words."""
    i = tl.arange(0, N)
    low, high = tl.load(words + i), tl.load(words + N + i)
    selector = tl.load(words + 2 * N + i)
    tl.store(permuted + i, triton_bytes.permute(low, high, selector, False))
    tl.store(dotted + i, triton_bytes.dot4(low, high, selector, False))


def test_bytes_are_permuted_and_multiplied_as_by_ptx():
    """What the interpreter runs instead of PTX gives the words that PTX gives."""
    words = torch.randint(1 << 32, (3, 1 << 12), generator=generator())
    got = [torch.empty(1 << 12, dtype=torch.int32) for _ in range(2)]
    look_up[(1,)](words.to(torch.int32), *got, N=1 << 12)
    for result, assembly in zip(got, (triton_bytes.PERMUTE, triton_bytes.DOT4), strict=True):
        (expected,) = ptx_model.run(assembly.value, *words, outputs=1)
        assert torch.equal(result, expected.to(torch.int32))


AUGMENTATION = {  # the arguments behind x, in their order
    "act_blocks": EMPTY,
    "weight_blocks": EMPTY,
    "outer_scale": None,
    "scale_mode": "token",
    "channel_order": None,
    "act_channels": None,
    "block_scale": "amax",
}
CONFIGS = {
    "plain": {},
    "blocks": {"act_blocks": ids(0, 2), "weight_blocks": ids(2, 0, 1)},
    "channels": {"act_blocks": ids(1), "weight_blocks": ids(2), "act_channels": ids(*range(3, 35))},
    "sorted": {
        "act_blocks": ids(2),
        "channel_order": torch.randperm(40, generator=generator()).int(),
        "act_channels": ids(*range(39, 23, -1)),
        "block_scale": "four_over_six",
    },
    "searched": {
        "act_blocks": ids(1),
        "weight_blocks": ids(0),
        "act_channels": ids(*range(20, 36)),
        "block_scale": "mse",
    },
    "tensor": {"act_blocks": ids(2), "scale_mode": "tensor"},
    "static": {"act_blocks": ids(2), "scale_mode": "static", "outer_scale": torch.tensor([0.01])},
}


def augmentation(config: str) -> tuple:
    """The arguments behind x."""
    given = AUGMENTATION | CONFIGS[config]
    return tuple(given[name] for name in AUGMENTATION)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("config", CONFIGS)
def test_quantized_rows_are_bit_equal(config, dtype):
    """40 channels: two blocks and a half; every scale mode and every kind of extra column."""
    arguments = (activations(2, 40, dtype), *augmentation(config))
    same_bits(triton_producers.quant_augment(*arguments), quant_augment_eager(*arguments))


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize("mode", ["token", "tensor"])
@pytest.mark.parametrize("block_scale", ["amax", "mse"])
def test_non_finite_rows_are_bit_equal(bad, mode, block_scale):
    """NaN and Inf reach scales and codes as in the meaning; the padding behind them, too."""
    x = activations(2, 40)
    x[0, 35] = bad
    arguments = (ids(1, 2), ids(2), None, mode, None, None, block_scale)
    got = triton_producers.quant_augment(x, *arguments)
    same_bits(got, quant_augment_eager(x, *arguments))
    assert (got[1] == nvfp4.E4M3_NAN).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("config", ["channels", "searched", "tensor"])
def test_fused_producers_are_bit_equal(config, dtype):
    """Norm, sum and norm, gated product: codes, scales and the sum that is returned."""
    x, y = activations(2, 40, dtype), activations(3, 40, dtype)[1:]
    y[-1] = 1
    weight = torch.randn(40, generator=generator()).to(dtype)
    rest = augmentation(config)
    same_bits(
        triton_producers.rms_norm_quant_augment(x, weight, EPS, *rest),
        producers.rms_norm_quant_augment_eager(x, weight, EPS, *rest),
    )
    same_bits(
        triton_producers.add_rms_norm_quant_augment(x, y, weight, EPS, *rest),
        producers.add_rms_norm_quant_augment_eager(x, y, weight, EPS, *rest),
    )
    same_bits(
        triton_producers.silu_mul_quant_augment(x, y, *rest),
        producers.silu_mul_quant_augment_eager(x, y, *rest),
    )
    for up, approximate in ((None, "tanh"), (y, "none")):
        same_bits(
            triton_producers.gelu_quant_augment(x, up, approximate, *rest),
            producers.gelu_quant_augment_eager(x, up, approximate, *rest),
        )


@pytest.mark.parametrize("config", ["channels", "tensor"])
def test_rows_longer_than_a_tile_are_bit_equal(config, monkeypatch):
    """Three tiles, the last one ragged, instead of a row in registers; channels out of order."""
    monkeypatch.setattr(triton_producers, "MAX_TILE", 2)
    monkeypatch.setattr(triton_producers, "LONG_TILE", 2)
    monkeypatch.setattr(triton_producers, "HEAVY_TILE", 2)
    x, y = activations(2, 72), activations(3, 72)[1:]
    weight = torch.randn(72, generator=generator()).bfloat16()
    order = torch.randperm(72, generator=generator()).int()
    rest = (*augmentation(config)[:4], order, CONFIGS[config].get("act_channels"))
    same_bits(triton_producers.quant_augment(x, *rest), quant_augment_eager(x, *rest))
    same_bits(
        triton_producers.add_rms_norm_quant_augment(x, y, weight, EPS, *rest),
        producers.add_rms_norm_quant_augment_eager(x, y, weight, EPS, *rest),
    )


@pytest.mark.parametrize("size", [2.0**-126, 1e-3, 1.0, 300.0, 1e9])
def test_searched_scales_of_every_size_are_bit_equal(size):
    """Under a given outer scale: below the smallest scale, among subnormals, beyond the largest."""
    x = activations(2, 64, torch.float32) * size
    outer = torch.tensor([0.01])
    arguments = (x, ids(1), EMPTY, outer, "static", None, None, "mse")
    same_bits(triton_producers.quant_augment(*arguments), quant_augment_eager(*arguments))


def test_strides_leading_dimensions_and_empty_batches():
    """Views are read where they lie; M = 0 launches nothing and keeps the outer scale's shape."""
    x = activations(4, 40).view(2, 2, 40)
    rest = (ids(1), ids(0), None, "token")
    expected = quant_augment_eager(x, *rest)
    same_bits(triton_producers.quant_augment(x, *rest), expected)
    transposed = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    same_bits(triton_producers.quant_augment(transposed, *rest), expected)
    every_other = torch.stack((x, x), dim=-1).flatten(2)[..., ::2]
    same_bits(triton_producers.quant_augment(every_other, *rest), expected)
    for mode, scale in (("token", None), ("tensor", None), ("static", torch.tensor([2.0]))):
        rest = (ids(1), ids(0), scale, mode)
        none = triton_producers.quant_augment(x[:0], *rest)
        same_bits(none, quant_augment_eager(x[:0], *rest))


def operands(rows: int, cols: int, *, repeated: bool = True) -> dict:
    """A product of 9 base blocks, 3 of them twice, and 2 residual blocks: K_aug = 14 blocks."""
    act_blocks = ids(0, 8, 3) if repeated else EMPTY
    x, w = activations(rows + 1, 144)[:rows], torch.randn(cols, 144, generator=generator())
    base, base_scale, b_outer = nvfp4.quantize(w)
    rest, rest_scale, _ = nvfp4.quantize(torch.randn(cols, 32, generator=generator()) / 30)
    a = quant_augment_eager(x, act_blocks, ids(1, 7), None, "token")
    return {
        **dict(zip(("a", "a_scale", "a_outer"), a, strict=True)),
        "b": torch.cat([base, rest], 1),
        "b_scale": torch.cat([base_scale, rest_scale], 1),
        "b_outer": b_outer.reshape(1),
        "bias": torch.randn(cols, generator=generator()).bfloat16(),
        "out_dtype": torch.bfloat16,
        "act_blocks": act_blocks,
        "base_blocks": 9,
    }


def assert_within_the_bound(y: Tensor, args: dict) -> None:
    """99.9 % equal to the float64 product rounded, the rest within an ulp and 1e-6 of the sums."""
    exact = _exact(args)
    rounded, absolute = exact[0].to(y.dtype), exact[1]
    assert (y != rounded).sum() <= 0.001 * y.numel()
    exponent = torch.floor(torch.log2(rounded.abs().double().clamp_min(1e-30)))
    allowed = torch.exp2(exponent) * torch.finfo(y.dtype).eps + 1e-6 * absolute
    assert ((y.double() - rounded.double()).abs() <= allowed).all()


def _exact(args: dict) -> tuple[Tensor, Tensor]:
    """float64 product and the sum of the absolute values of its terms."""
    left = nvfp4.decode(args["a"], args["a_scale"]).double()
    weight = args["b"], args["b_scale"], args["act_blocks"], args["base_blocks"]
    right = decode_weight(*weight).double()
    outer = args["a_outer"].double().unsqueeze(-1) * args["b_outer"].double()
    y = (left @ right.t()) * outer
    absolute = (left.abs() @ right.abs().t()) * outer
    return (y if args["bias"] is None else y + args["bias"].double()), absolute


RULES = {
    "row": Rule("row", block_m=1, block_n=32, block_k=8),
    "two rows, K in two parts": Rule("row", block_m=2, block_n=32, block_k=4, split=2),
    "tiles": Rule("tiles", block_m=16, block_n=16, block_k=2),
    "tiles, ragged K": Rule("tiles", block_m=16, block_n=32, block_k=4),
    "tiles, K in three parts": Rule("tiles", block_m=16, block_n=16, block_k=4, split=3),
    "decode": Rule("decode"),
    "decode, ragged chunks": Rule("decode", chunk=8),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("repeated", [False, True])
def test_products_are_within_the_bound_on_every_route(rule, repeated):
    """19 columns and few rows: every tile is ragged."""
    args = operands(3 if rule.route == "row" else 17, 19, repeated=repeated)
    assert_within_the_bound(triton_products.nvfp4_gemm(**args, rule=rule), args)


@pytest.mark.parametrize("name", ["two rows, K in two parts", "tiles, ragged K"])
def test_sums_that_fp32_holds_are_exact(name):
    """Any codes, scales of 1 and 2, K = 144: the product is that of float64 bit for bit."""
    codes = torch.randint(256, (22, 72), generator=generator(), dtype=torch.uint8)
    scale = 1.0 + torch.randint(2, (22, 9), generator=generator()).float()
    a, b = zip(codes.split([3, 19]), nvfp4.encode_e4m3(scale).split([3, 19]), strict=True)
    one = torch.ones(1)
    y = triton_products.nvfp4_gemm(*a, one, *b, one, None, torch.float32, rule=RULES[name])
    assert torch.equal(y.double(), nvfp4.decode(*a).double() @ nvfp4.decode(*b).double().t())


@pytest.mark.parametrize("route", ["row", "tiles", "decode"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_outputs_one_outer_scale_and_no_bias(route, dtype):
    """fp16 is rounded once; fp32 differs by the order of additions alone."""
    args = operands(1, 19) | {"bias": None, "out_dtype": dtype}
    y = triton_products.nvfp4_gemm(
        **args, rule=Rule(route, block_m=2 if route == "row" else 16, block_n=32)
    )
    exact, absolute = _exact(args)
    allowed = torch.finfo(dtype).eps * exact.abs() + 1e-6 * absolute
    assert y.dtype == dtype and ((y.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("route", ["row", "tiles", "decode"])
def test_a_token_with_nan_is_nan_and_others_are_not(route):
    """Also where its NaN scale is in one block only."""
    args = operands(2, 19)
    args["a_scale"][1, 5] = nvfp4.E4M3_NAN
    y = triton_products.nvfp4_gemm(
        **args, rule=Rule(route, block_m=2 if route == "row" else 16, block_n=32)
    )
    assert y[1].isnan().all() and y[0].isfinite().all()


def test_products_of_nothing_of_panels_and_of_strided_weights():
    """M = 0 and N = 0 are empty; a weight in panels or a slice of another gives the same bits."""
    args = operands(3, 19)
    rule = Rule("tiles", block_n=32)
    y = triton_products.nvfp4_gemm(**args, rule=rule)
    none = {n: args[n][:0] for n in ("a", "a_scale", "a_outer")}
    assert triton_products.nvfp4_gemm(**args | none).shape == (0, 19)
    none = {n: args[n][:0] for n in ("b", "b_scale", "bias")}
    assert triton_products.nvfp4_gemm(**args | none).shape == (3, 0)
    b, b_scale = to_panels(args["b"], args["b_scale"])
    packed = args | {"b": b, "b_scale": b_scale, "b_layout": "panels"}
    assert torch.equal(triton_products.nvfp4_gemm(**packed, rule=rule), y)
    strided = {n: torch.cat([args[n], args[n]], 1)[:, : args[n].shape[1]] for n in ("b", "b_scale")}
    assert torch.equal(triton_products.nvfp4_gemm(**args | strided, rule=rule), y)


def test_operands_that_do_not_fit_are_refused():
    """With the operators' own messages."""
    args = operands(3, 19)
    with pytest.raises(RuntimeError, match=r"K_aug = 224, b has 176 plus 2 repeated blocks of 16"):
        triton_products.nvfp4_gemm(**args | {"act_blocks": ids(1, 2)})
    with pytest.raises(RuntimeError, match="quant_augment: scale_mode must be one of"):
        triton_producers.quant_augment(activations(1, 16), EMPTY, EMPTY, None, "row")
    with pytest.raises(RuntimeError, match="silu_mul_quant_augment: up must have the shape"):
        x = activations(2, 16)
        triton_producers.silu_mul_quant_augment(x, x[:1], EMPTY, EMPTY, None, "token")


WEIGHT_ONLY_RULES = {
    "tiles": Rule("tiles", block_n=16, block_k=2),
    "tiles, K in two parts": Rule("tiles", block_n=32, block_k=4, split=2),
    "decode, ragged chunks": Rule("decode", chunk=8),
}


@pytest.mark.parametrize("rule", WEIGHT_ONLY_RULES.values(), ids=WEIGHT_ONLY_RULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_weight_only_products_are_within_the_bound(rule, dtype):
    """72 channels, half a block of padding, residual blocks out of order, strided x. (bf16 has no
    matrix product under the interpreter.)"""
    weight = torch.randn(19, 72, generator=generator())
    b, b_scale, outer = nvfp4.quantize(weight)
    rest, rest_scale, _ = nvfp4.quantize(torch.randn(19, 32, generator=generator()) / 30)
    x = torch.randn(72, 17, generator=generator()).to(dtype).t()
    args = (
        x, torch.cat([b, rest], 1), torch.cat([b_scale, rest_scale], 1), outer.reshape(1),
        torch.randn(19, generator=generator()).to(dtype), ids(4, 0),
    )  # fmt: skip
    y = triton_weight_only.multiply_by(*args, rule=rule)
    expected = nvfp4_weight_only_gemm_eager(*args)
    size = x.double().abs() @ weight.double().abs().t()
    assert y.dtype == dtype
    allowed = torch.finfo(dtype).eps * expected.double().abs() + 1e-6 * size
    assert ((y.double() - expected.double()).abs() <= allowed).all()
    assert torch.equal(triton_weight_only.multiply_by(x[:0], *args[1:]), y[:0])
