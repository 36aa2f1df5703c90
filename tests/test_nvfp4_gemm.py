"""arc::nvfp4_gemm against float64: the products are exact, only additions may round."""

import pytest
import torch
from torch import Tensor

from arc_ao.formats import nvfp4
from arc_ao.ops import nvfp4_gemm, quant_augment

BASE_BLOCKS = 6  # K = 96
ACT_BLOCKS = torch.tensor([4, 0, 4], dtype=torch.int32)  # any order, repetition allowed
WEIGHT_BLOCKS = torch.tensor([2, 5], dtype=torch.int32)
EMPTY = torch.zeros(0, dtype=torch.int32)


def operands(rows: int, cols: int, *, act_blocks: Tensor = ACT_BLOCKS, k: int = 96) -> dict:
    """Arguments of the product of [rows, k] activations and [cols, k] weights."""
    generator = torch.Generator().manual_seed(rows + cols)
    x = torch.randn(rows, k, generator=generator) * torch.logspace(-3, 3, rows).unsqueeze(1)
    weight = torch.randn(cols, k, generator=generator) / 10
    a, a_scale, a_outer = quant_augment(x, act_blocks, WEIGHT_BLOCKS, None, "token")
    b, b_scale, b_outer = nvfp4.quantize(weight)
    residual = nvfp4.to_blocks(weight - nvfp4.dequantize(b, b_scale, b_outer))
    residual = residual.index_select(1, WEIGHT_BLOCKS).flatten(1)
    r, r_scale, _ = nvfp4.quantize(residual, amax=weight.abs().amax())
    return {
        "a": a,
        "a_scale": a_scale,
        "a_outer": a_outer,
        "b": torch.cat((b, r), 1),
        "b_scale": torch.cat((b_scale, r_scale), 1),
        "b_outer": b_outer.reshape(1),
        "bias": None,
        "out_dtype": torch.bfloat16,
        "act_blocks": act_blocks,
        "base_blocks": k // 16,
    }


def exact(args: dict) -> tuple[Tensor, Tensor]:
    """The product in float64, and the sum of absolute products of each output."""
    left = nvfp4.decode(args["a"], args["a_scale"]).double()
    right = nvfp4.decode(args["b"], args["b_scale"]).double()
    columns = list(range(args["base_blocks"] * 16))
    columns += [16 * b + i for b in args["act_blocks"].tolist() for i in range(16)]
    columns += range(args["base_blocks"] * 16, right.shape[1])
    right = right[:, columns]
    outer = args["a_outer"].double().unsqueeze(1) * args["b_outer"].double()
    y, absolute = (left @ right.t()) * outer, (left.abs() @ right.t().abs()) * outer
    return (y if args["bias"] is None else y + args["bias"].double()), absolute


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance between neighbours of x in `dtype`, in float64."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(x.abs().double().clamp_min(info.tiny)))
    return torch.exp2(exponent) * info.eps


@pytest.mark.parametrize("rows", [0, 1, 5, 37])  # empty, decode, tiny, ragged
@pytest.mark.parametrize("cols", [1, 19, 64])  # one, not a multiple of 16, a multiple
@pytest.mark.parametrize("with_bias", [False, True])
def test_within_one_rounding_of_float64(rows, cols, with_bias):
    """The contract: 99.9 % equal, the rest within an ulp and 1e-6 of the absolute sum."""
    args = operands(rows, cols)
    if with_bias:
        bias = torch.randn(cols, generator=torch.Generator().manual_seed(3))
        args["bias"] = bias.bfloat16()
    y, (reference, absolute) = nvfp4_gemm(**args), exact(args)
    rounded = reference.bfloat16()
    assert y.dtype == torch.bfloat16 and y.shape == (rows, cols)
    assert (y != rounded).sum() <= 0.001 * y.numel()
    allowed = ulp(rounded, torch.bfloat16) + 1e-6 * absolute
    assert ((y.double() - rounded.double()).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_output_dtypes(dtype):
    """fp32 differs by the order of additions alone; fp16 is rounded once and overflows to Inf."""
    args = {**operands(37, 19), "out_dtype": dtype}
    y, (reference, absolute) = nvfp4_gemm(**args), exact(args)
    assert y.dtype == dtype
    allowed = ulp(reference, dtype) + 1e-6 * absolute
    assert ((y.double() - reference).abs() <= allowed).all()
    huge = nvfp4_gemm(**{**args, "a_outer": args["a_outer"] * 1e8})
    assert huge.isinf().any() == (dtype == torch.float16)


def test_reading_blocks_again_equals_stored_copies():
    """act_blocks saves bytes and changes no bit."""
    args = operands(5, 19)
    base = args["base_blocks"]
    codes, scale = args["b"].unflatten(1, (-1, 8)), args["b_scale"]
    wanted = [*range(base), *ACT_BLOCKS.tolist(), *range(base, scale.shape[1])]
    copies = {"b": codes[:, wanted].flatten(1), "b_scale": scale[:, wanted], "act_blocks": None}
    y = nvfp4_gemm(**args)
    assert torch.equal(nvfp4_gemm(**{**args, **copies, "base_blocks": 0}), y)
    assert torch.equal(nvfp4_gemm(**{**args, **copies, "act_blocks": EMPTY}), y)


def test_decoded_operands_are_multiplied_in_the_stated_order():
    """[base | repeated | rest], one block each: every pairing of columns is another number."""
    a = torch.zeros(1, 3, 8, dtype=torch.uint8)
    a[0, :, 0] = torch.tensor([2, 5, 1])  # 1, 3, 0.5
    b = torch.zeros(1, 2, 8, dtype=torch.uint8)
    b[0, :, 0] = torch.tensor([4, 7])  # 2, 6
    one, outer = torch.full((1, 3), 0x38, dtype=torch.uint8), torch.ones(1)
    operands = (a.flatten(1), one, outer, b.flatten(1), one[:, :2], outer, None, torch.float32)
    first = torch.zeros(1, dtype=torch.int32)
    assert nvfp4_gemm(*operands, act_blocks=first, base_blocks=1) == 1 * 2 + 3 * 2 + 0.5 * 6
    assert nvfp4_gemm(*operands, act_blocks=first + 1, base_blocks=2) == 1 * 2 + 3 * 6 + 0.5 * 6


def test_autocast_does_not_round_the_sums():
    """Inside autocast the operator still accumulates and scales in fp32."""
    args = {**operands(5, 19), "out_dtype": torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = nvfp4_gemm(**args)
    assert torch.equal(y, nvfp4_gemm(**args))


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("repeated", [False, True])
def test_opcheck(rows, repeated):
    args = operands(rows, 19, act_blocks=ACT_BLOCKS if repeated else EMPTY)
    bias = torch.ones(19, dtype=torch.bfloat16) if repeated else None
    torch.library.opcheck(nvfp4_gemm, tuple({**args, "bias": bias}.values()))


def test_schema_is_stable():
    """Exported programs are stored with this signature."""
    assert str(torch.ops.arc.nvfp4_gemm.default._schema) == (
        "arc::nvfp4_gemm(Tensor a, Tensor a_scale, Tensor a_outer, Tensor b, Tensor b_scale, "
        "Tensor b_outer, Tensor? bias, ScalarType out_dtype, Tensor? act_blocks=None, "
        'int base_blocks=0, str b_layout="plain") -> Tensor'
    )


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("a", lambda t: t[:, 8:], r"K_aug = 160, b has 128 plus 3 repeated blocks of 16"),
        ("act_blocks", lambda t: t[:2], r"K_aug = 176, b has 128 plus 2 repeated blocks of 16"),
        ("a_scale", lambda t: t[:, 1:], r"a has 5 rows of 176 codes and 5 rows of 10 block scales"),
        ("b_scale", lambda t: t[1:], r"b has 19 rows of 128 codes and 18 rows of 8 block scales"),
        ("a_outer", lambda t: t[:2], r"a_outer must have shape \[1\] or \[5\], got fp32 \[2\]"),
        ("bias", lambda _: torch.zeros(1), r"bf16, fp16 or fp32 \[19\], got fp32 \[1\]"),
        ("base_blocks", lambda _: 0, r"base_blocks must be 1 to 8, .* got 0"),
        ("base_blocks", lambda _: 9, r"base_blocks must be 1 to 8, .* got 9"),
    ],
)
def test_operands_that_do_not_fit_are_named(name, change, message):
    args = operands(5, 19)
    with pytest.raises(RuntimeError, match=message):
        nvfp4_gemm(**{**args, name: change(args[name])})
