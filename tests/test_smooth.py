"""Channel scales: the formulas, powers of two, channels about which nothing is known."""

import pytest
import torch

from arc_ao.methods.smooth import (
    awq_scales,
    exponents,
    flatten_scales,
    power_of_two,
    search_awq_scales,
    search_scales,
    smooth_scales,
)


def test_scales_are_the_nearest_powers_of_two():
    given = torch.tensor([1.0, 1.4, 1.5, 0.3, 3.0, 1e9, 1e-9])
    expected = [1.0, 1.0, 2.0, 0.25, 4.0, 2.0**14, 2.0**-14]
    assert power_of_two(given).tolist() == expected


@pytest.mark.parametrize("unusable", [0.0, -1.0, float("nan"), float("inf")])
def test_a_channel_without_a_scale_keeps_one(unusable):
    assert power_of_two(torch.tensor([unusable, 4.0])).tolist() == [1.0, 4.0]


def test_scaling_is_exact_in_16_bits():
    """Dividing by a scale and multiplying again gives the bits back."""
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    scales = flatten_scales(torch.logspace(-3, 3, 64))
    for dtype in (torch.bfloat16, torch.float16):
        scaled = x.to(dtype) * (1 / scales).to(dtype)
        assert torch.equal(scaled * scales.to(dtype), x.to(dtype))


def test_flattening_brings_every_channel_near_one():
    """SERQ's alpha = 1; a channel that never fires keeps its scale."""
    amax = torch.tensor([0.0, 0.01, 0.9, 37.0, 500.0])
    flat = amax / flatten_scales(amax)
    assert flat[0] == 0 and ((flat[1:] >= 0.7) & (flat[1:] <= 1.42)).all()


def test_smooth_scales_follow_the_formula():
    """s = amax_x^a / amax_w^b, up to the common factor that centres it."""
    act, weight = torch.tensor([1.0, 16.0, 256.0]), torch.tensor([1.0, 4.0, 1.0])
    assert smooth_scales(act, weight, 0.5, 0.5).tolist() == [0.25, 0.5, 4.0]  # 1, 2, 16 over 3.2
    assert smooth_scales(act, weight, 0.0, 0.0).tolist() == [1.0, 1.0, 1.0]
    dead = smooth_scales(torch.tensor([0.0, 4.0]), torch.tensor([1.0, 1.0]), 1.0, 0.0)
    assert dead.tolist() == [1.0, 1.0]  # alone, the live channel is the centre
    assert smooth_scales(torch.zeros(2), torch.zeros(2), 0.5, 0.5).tolist() == [1.0, 1.0]


def test_candidates_are_svdquants():
    """(0, 0), (a, 0), (a, 1 - a): 19 more with a grid of 10, plain first."""
    found = list(exponents())
    assert found[0] == (0.0, 0.0) and len(set(found)) == 20
    assert all(b == 0 or a + b == pytest.approx(1) for a, b in found)


def test_the_search_returns_the_least_error_and_the_first_of_equals():
    act, weight = torch.tensor([1.0, 64.0]), torch.ones(2)
    wanted = smooth_scales(act, weight, 0.5, 0.5)
    assert not torch.equal(wanted, torch.ones(2))
    distance = lambda scales: (scales - wanted).abs().sum().item()
    assert torch.equal(search_scales(act, weight, distance), wanted)
    assert torch.equal(search_scales(act, weight, lambda s: 1.0), torch.ones(2))
    nan = search_scales(act, weight, lambda s: float("nan"))
    assert torch.equal(nan, torch.ones(2))  # nothing measurable: no scaling


def test_awq_scales_follow_the_formula():
    """s = mean|x|^a over the geometric mean of the extremes; about a dead channel nothing is known,
    and it does not move the others."""
    mean = torch.tensor([1.0, 4.0, 256.0])
    assert awq_scales(mean, 0.0).tolist() == [1.0, 1.0, 1.0]
    assert awq_scales(mean, 0.5).tolist() == [0.25, 0.5, 4.0]  # 1, 2, 16 over sqrt(1 * 16)
    assert awq_scales(torch.tensor([0.0, 1.0, 4.0, 256.0]), 0.5).tolist() == [1.0, 0.25, 0.5, 4.0]
    assert awq_scales(torch.zeros(2), 0.5).tolist() == [1.0, 1.0]


def test_awq_tries_twenty_scales():
    """a = 0, 0.05, ..., 0.95; the first of equals is none at all."""
    tried, mean = [], torch.tensor([1.0, 2.0**10])
    found = search_awq_scales(mean, lambda s: tried.append(s) or 1.0)
    assert len(tried) == 20 and torch.equal(found, torch.ones(2))
    assert torch.equal(tried[-1], awq_scales(mean, 0.95))
