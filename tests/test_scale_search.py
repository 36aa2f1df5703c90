"""Block scales of weights: the search against brute force over its candidates."""

import pytest
import torch
from torch import Tensor

from arc_ao.config import ARCConfig
from arc_ao.formats import nvfp4
from arc_ao.methods import scale_search
from arc_ao.methods.weights import LayerPlan, analyse_weight, quantize_weight

CANDIDATES = 13


def weight_blocks(seed: int = 0) -> Tensor:
    """fp32 [32, 8, 16] under the outer scale, block sizes from subnormal scales to the largest."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randn(32, 8, 16, generator=generator)
    blocks *= torch.logspace(-4, 3, 32).view(-1, 1, 1)
    return blocks.clamp(-2688, 2688)


def importances(seed: int = 1) -> Tensor:
    return torch.rand(8, 16, generator=torch.Generator().manual_seed(seed)) ** 4


def error(blocks: Tensor, scale: Tensor, importance: Tensor | None = None) -> Tensor:
    """Weighted squared error per block, in float64."""
    values = nvfp4.decode_blocks(nvfp4.encode_blocks(blocks, scale), scale).double()
    squared = (values - blocks.double()).square()
    return (squared if importance is None else squared * importance.double()).sum(-1)


def candidates(blocks: Tensor) -> Tensor:
    """[13, N, K/16] e4m3 values: amax and six codes either way, within [2^-9, 448]."""
    every = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    nearest = (every == nvfp4.block_scale(blocks).unsqueeze(-1)).int().argmax(-1)
    return torch.stack([every[(nearest + o).clamp(0, 125)] for o in range(-6, 7)])


@pytest.mark.parametrize("importance", [None, importances()], ids=["equal", "weighted"])
def test_the_search_finds_the_best_of_its_candidates(importance):
    blocks = weight_blocks()
    chosen = scale_search.choose_scales(blocks, "mse", importance)
    tried = candidates(blocks)
    assert tried.shape[0] == CANDIDATES and (tried == chosen).any(0).all()
    best = torch.stack([error(blocks, s, importance) for s in tried]).amin(0)
    assert (error(blocks, chosen, importance) <= best * (1 + 1e-5)).all()  # sums are fp32


def test_the_local_hessian_weighs_errors_together():
    """The best of the candidates by e H e^T; its diagonal alone gives what "mse" gives."""
    blocks, generator = weight_blocks(), torch.Generator().manual_seed(4)
    x = torch.randn(8, 40, 16, generator=generator) @ torch.randn(8, 16, 16, generator=generator)
    hessian = x.transpose(1, 2) @ x
    chosen = scale_search.choose_scales(blocks, "local_hessian", hessian)

    def cost(scale: Tensor) -> Tensor:
        left = nvfp4.decode_blocks(nvfp4.encode_blocks(blocks, scale), scale) - blocks
        return torch.einsum("nbi,bij,nbj->nb", left.double(), hessian.double(), left.double())

    best = torch.stack([cost(scale) for scale in candidates(blocks)]).amin(0)
    assert (cost(chosen) <= best * (1 + 1e-4) + 1e-12).all()
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    mse = scale_search.choose_scales(blocks, "mse", diagonal)
    assert torch.equal(scale_search.choose_scales(blocks, "mse", hessian), mse)
    assert torch.equal(scale_search.choose_scales(blocks, "local_hessian", diagonal), mse)
    assert not torch.equal(chosen, mse)


@pytest.mark.parametrize("importance", [None, importances()], ids=["equal", "weighted"])
def test_the_search_is_never_worse_than_amax(importance):
    """And clearly better on the whole, or it would not be worth its time."""
    blocks = weight_blocks(seed=3)
    chosen, amax = (scale_search.choose_scales(blocks, m, importance) for m in ("mse", "amax"))
    searched, plain = error(blocks, chosen, importance), error(blocks, amax, importance)
    assert (searched <= plain * (1 + 1e-5)).all()
    assert (searched / plain.clamp_min(1e-30)).mean() < 0.85


def test_importance_moves_the_choice():
    """One block, amax 6 beside fifteen 4.5: the scale that is exact for the important value."""
    block = torch.full((1, 1, 16), 4.5)
    block[..., 0] = 6.0
    first, rest = torch.zeros(1, 16), torch.ones(1, 16)
    first[..., 0], rest[..., 0] = 1, 0
    only_first = scale_search.choose_scales(block, "mse", first)
    only_rest = scale_search.choose_scales(block, "mse", rest)
    assert only_first == 1.0  # 6 * 1 is exact, and among equals amax wins
    assert only_rest == 1.125  # 4 * 1.125 is exact; 6 * 0.75 is too, but further from amax
    assert error(block, only_rest, rest) == 0 < error(block, only_first, rest)


def test_ties_and_zero_importance_keep_the_amax_scale():
    blocks = weight_blocks()
    amax = nvfp4.block_scale(blocks)
    assert torch.equal(scale_search.choose_scales(blocks, "mse", torch.zeros(8, 16)), amax)
    zeros = torch.zeros(2, 3, 16)
    assert (scale_search.choose_scales(zeros, "mse") == 2.0**-9).all()


def test_candidates_stop_at_both_ends_of_e4m3():
    """Nothing beyond 448 and nothing below 2^-9, where the neighbouring codes would be."""
    top = torch.full((1, 1, 16), 2688.0)
    assert scale_search.choose_scales(top, "mse") == 448
    bottom = torch.full((1, 1, 16), 2.0**-9)
    assert scale_search.choose_scales(bottom, "mse") == 2.0**-9
    for scale in scale_search.choose_scales(weight_blocks(), "mse").unique():
        assert 2.0**-9 <= scale <= 448 and scale == scale.to(torch.float8_e4m3fn).float()


def test_amax_and_four_over_six_are_the_formats_own():
    blocks = weight_blocks().clamp(-1536, 1536)
    amax = scale_search.choose_scales(blocks, "amax")
    assert torch.equal(amax, nvfp4.block_scale(blocks))
    wide = scale_search.choose_scales(blocks, "four_over_six")
    quarter = nvfp4.block_scale(blocks, block_max=4.0)
    assert ((wide == amax) | (wide == quarter)).all() and (wide != amax).any()
    assert (error(blocks, wide) <= error(blocks, amax)).all()


@pytest.mark.parametrize("weight_scale", ["amax", "mse", "four_over_six"])
def test_chunking_changes_no_bit(monkeypatch, weight_scale):
    """A weight analysed and quantized at once, and three rows at a time."""
    weight = torch.randn(10, 64, generator=torch.Generator().manual_seed(2))
    amax, mean_square = weight.abs().amax(), importances()[:4].flatten()
    config = ARCConfig(recipe="balanced", weight_scale=weight_scale).resolve()
    picked = torch.tensor([0, 2], dtype=torch.int32)

    def run():
        analysis = analyse_weight(weight, amax, config, mean_square=mean_square)
        plan = LayerPlan(config, amax, analysis.scale, picked, picked, mean_square=mean_square)
        return analysis, quantize_weight(weight, plan)

    whole, tensor = run()
    monkeypatch.setattr("arc_ao.methods.weights.CHUNK_ELEMENTS", 3 * 64)
    parts, chunked = run()
    assert torch.equal(whole.scale, parts.scale)
    torch.testing.assert_close(whole.column_energy, parts.column_energy)
    torch.testing.assert_close(whole.column_error, parts.column_error)
    assert torch.equal(tensor.qdata, chunked.qdata) and torch.equal(tensor.scale, chunked.scale)
