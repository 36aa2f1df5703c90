"""Samples of inputs and Gram matrices of few rows."""

import pytest
import torch

from arc_ao.calibration.input_sample import InputSample
from arc_ao.calibration.residual_gram import mean_gram, residual_gram, shrinkage


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(rows: torch.Tensor, tokens: int, sizes: list[int], over: int = 0) -> InputSample:
    sample = InputSample(tokens)
    if over:
        sample.spread_over(over)
    for part in rows.split(sizes):
        sample.add(part)
    return sample


def test_a_sample_is_the_first_rows_whatever_the_batches():
    rows = torch.arange(60.0).view(20, 3)
    for sizes in ([20], [7, 13], [1] * 20):
        sample = filled(rows, 8, sizes)
        assert torch.equal(sample.rows(), rows[:8])
        assert torch.equal(filled(rows, 5, sizes, over=20).rows(), rows[::4])
    assert filled(rows, 0, [20]).rows() is None
    assert filled(rows, 100, [20], over=20).rows().shape == (20, 3)


def test_a_sample_keeps_what_it_saw():
    """Later changes in place of an activation do not reach it; clearing forgets."""
    x = torch.ones(2, 3, 4)
    sample = InputSample(8)
    sample.add(x)
    x.zero_()
    assert torch.equal(sample.rows(), torch.ones(6, 4))
    sample.clear()
    assert sample.rows() is None and sample.kept == 0


def test_merging_fills_up():
    one, other = filled(torch.zeros(3, 2), 4, [3]), filled(torch.ones(3, 2), 4, [3])
    one.merge(other)
    assert one.rows()[:, 0].tolist() == [0, 0, 0, 1]


def test_mean_gram_is_the_average_of_outer_products():
    rows = randn(1500, 5)  # two chunks
    expected = sum(torch.outer(r, r) for r in rows.double()) / 1500
    torch.testing.assert_close(mean_gram(rows), expected.float(), atol=1e-4, rtol=1e-4)
    assert torch.equal(mean_gram(rows[:0]), torch.zeros(5, 5))


def slow_shrinkage(rows: torch.Tensor) -> float:
    """The formula, pair by pair."""
    z = rows / rows.square().mean(0).sqrt()
    m = rows.shape[0]
    variance = squares = 0.0
    for i in range(z.shape[1]):
        for j in range(z.shape[1]):
            if i != j:
                products = z[:, i] * z[:, j]
                variance += products.var(unbiased=True).item() / m
                squares += products.mean().item() ** 2
    return min(1.0, variance / squares)


@pytest.mark.parametrize("common", [0.0, 0.3, 3.0])
def test_shrinkage_is_the_formula(common):
    """Independent channels, weakly and strongly correlated ones, of unequal energies."""
    rows = (randn(50, 6) + common * randn(50, 1, seed=1)) * torch.logspace(-3, 2, 6)
    assert shrinkage(rows, mean_gram(rows)) == pytest.approx(slow_shrinkage(rows), rel=1e-3)


def test_shrinking_brings_few_rows_nearer_to_the_truth():
    """40 rows of 100 channels: white noise loses its chance correlations, real ones stay."""
    white = randn(40, 100)
    error = lambda g, truth: (g - truth).norm().item()
    assert error(residual_gram(white), torch.eye(100)) < 0.5 * error(
        mean_gram(white), torch.eye(100)
    )
    mixed = randn(4000, 100) + randn(4000, 1, seed=1)
    assert shrinkage(mixed, mean_gram(mixed)) < 0.01
    truth = torch.eye(100) + 1
    assert error(residual_gram(mixed), truth) < 1.05 * error(mean_gram(mixed), truth)


@pytest.mark.parametrize("rows", [torch.zeros(4, 3), torch.ones(1, 3), torch.zeros(0, 3)])
def test_degenerate_rows_give_a_diagonal(rows):
    """Nothing but zeros, one token, none: no correlation can be told."""
    gram = residual_gram(rows)
    assert gram.isfinite().all()
    assert torch.equal(gram, torch.diag(gram.diagonal()))
