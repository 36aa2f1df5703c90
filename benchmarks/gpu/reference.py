"""Inputs of the GPU suite's checks, and what their results are compared with."""

import torch
from torch import Tensor

from arc_ao.formats import nvfp4
from arc_ao.ops.nvfp4_gemm import decode_weight
from arc_ao.ops.quant_augment import quant_augment_eager
from benchmarks.gpu.providers import quantized

ROUNDED_EXACTLY = 0.999  # share of elements; the rest may differ by an ulp
ROW_SUM_TOLERANCE = 1e-6


def activations(rows: int, channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows of different size with outlier channels; from the third on one zero row."""
    x = torch.randn(rows, channels, generator=torch.Generator().manual_seed(rows))
    x[:, ::37] *= 20
    x *= torch.logspace(-1, 1, rows).unsqueeze(1)
    x[2:3] = 0
    return x.to(dtype).to(device)


def operands(rows: int, n: int, k: int, device: torch.device, dtype=torch.bfloat16) -> dict:
    """A product with residual blocks of both kinds, bias and one outer scale per row."""
    weight = quantized(activations(n, k, torch.bfloat16, device), 0.06)
    x = activations(rows, k, torch.bfloat16, device)
    a = quant_augment_eager(x, weight.act_blocks, weight.weight_blocks, None, "token")
    return {
        **dict(zip(("a", "a_scale", "a_outer"), a, strict=True)),
        "b": weight.qdata,
        "b_scale": weight.scale,
        "b_outer": weight.outer,
        "bias": activations(1, n, torch.bfloat16, device)[0],
        "out_dtype": dtype,
        "act_blocks": weight.act_blocks,
        "base_blocks": weight.base_blocks,
    }


def exact_operands(rows: int, n: int, k: int, device: torch.device) -> dict:
    """Any codes under scales of 1 and 2: fp32 holds every partial sum of the product up to
    K = 2^14, so that its result depends neither on the order of additions nor on contraction."""
    generator = torch.Generator().manual_seed(k)

    def operand(height: int) -> tuple[Tensor, Tensor]:
        codes = torch.randint(256, (height, k // 2), generator=generator, dtype=torch.uint8)
        powers = torch.randint(2, (height, k // nvfp4.BLOCK_SIZE), generator=generator)
        return codes.to(device), nvfp4.encode_e4m3(1.0 + powers.float()).to(device)

    a, b, one = operand(rows), operand(n), torch.ones(1, device=device)
    return {
        **{"a": a[0], "a_scale": a[1], "a_outer": one.expand(rows).contiguous()},
        **{"b": b[0], "b_scale": b[1], "b_outer": one, "bias": None},
        **{"out_dtype": torch.float32},
    }


def exact_product(args: dict) -> Tensor:
    """fp32 [M, N] of `exact_operands`."""
    left, right = (nvfp4.decode(args[n], args[f"{n}_scale"]).double() for n in ("a", "b"))
    return (left @ right.t()).float()


def assert_same(got: Tensor, expected: Tensor, name: str) -> None:
    """Equal bit for bit, any NaN to any NaN."""
    torch.testing.assert_close(
        got, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{name}: {text}"
    )


def assert_within_the_bound(y: Tensor, args: dict) -> None:
    """99.9 % of the elements equal the float64 product rounded; none is further than one ulp plus
    1e-6 of the sum of its absolute terms. fp32 only has to meet the second."""
    left = nvfp4.decode(args["a"], args["a_scale"]).double()
    right = decode_weight(args["b"], args["b_scale"], args["act_blocks"], args["base_blocks"])
    outer = args["a_outer"].double().unsqueeze(1) * args["b_outer"].double()
    right = right.double().t()
    exact = left @ right * outer + args["bias"].double()
    absolute = left.abs() @ right.abs() * outer
    rounded = exact.to(y.dtype)
    share = (y == rounded).double().mean().item()
    assert y.dtype == torch.float32 or share >= ROUNDED_EXACTLY, f"{share:.5f} rounded exactly"
    info = torch.finfo(y.dtype)
    size = rounded.double().abs().clamp_min(info.tiny)
    allowed = torch.exp2(torch.floor(torch.log2(size))) * info.eps + ROW_SUM_TOLERANCE * absolute
    difference = torch.where(y == rounded, 0.0, (y.double() - rounded.double()).abs())
    assert (difference <= allowed).all(), f"off by up to {(difference / allowed).max():.3g} bounds"
