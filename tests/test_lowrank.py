"""Low-rank branches: what they minimise, against slow references, and data that has nothing."""

import pytest
import torch
from torch import Tensor

from arc_ao.methods.lowrank import (
    LowRank,
    arhq_branch,
    sketched_svd,
    svd_branch,
    truncated_svd,
)

N, K = 24, 40


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def residuals(rows: int = 400) -> Tensor:
    """Correlated, of very unequal energies."""
    mix = randn(K, K, seed=1) * torch.logspace(-2, 1, K)
    return randn(rows, K, seed=2) @ mix


def gram(e: Tensor) -> Tensor:
    return e.t() @ e / e.shape[0]


def weighted_error(weight: Tensor, branch: LowRank, g: Tensor) -> float:
    """trace((W - L) G (W - L)^T) in fp64."""
    rest = (weight - branch.matrix()).double()
    return (rest @ g.double() * rest).sum().item()


def test_truncated_svd_leaves_the_small_singular_values():
    weight = randn(N, K)
    values = torch.linalg.svdvals(weight)
    for rank in (1, 7, N):
        error = (weight - truncated_svd(weight, rank).matrix()).norm()
        torch.testing.assert_close(error, values[rank:].norm(), atol=1e-4, rtol=1e-4)


def test_a_rank_beyond_the_matrix_is_all_of_it():
    branch = truncated_svd(randn(N, K), 1000)
    assert branch.down.shape == (N, K) and branch.up.shape == (N, N)
    torch.testing.assert_close(branch.matrix(), randn(N, K), atol=1e-5, rtol=0.0)


def test_the_sketch_is_near_the_svd_and_leaves_the_random_generator_alone():
    weight = randn(N, 4) @ randn(4, K, seed=3) + 0.01 * randn(N, K, seed=4)
    state = torch.random.get_rng_state()
    first, second = sketched_svd(weight, 4), sketched_svd(weight, 4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.matrix(), second.matrix())
    exact = (weight - truncated_svd(weight, 4).matrix()).norm()
    assert (weight - first.matrix()).norm() < 1.05 * exact


def test_arhq_is_the_best_branch_for_its_measure():
    """The optimum is known: sum of the dropped squared singular values of W G^(1/2), here with the
    root by eigenvectors in fp64 (the code takes Cholesky's)."""
    weight, g = randn(N, K), gram(residuals())
    values, vectors = torch.linalg.eigh(g.double())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.t()
    dropped = torch.linalg.svdvals(weight.double() @ root)
    for rank in (1, 8, 16):
        error = weighted_error(weight, arhq_branch(weight, rank, g), g)
        assert error == pytest.approx(dropped[rank:].square().sum().item(), rel=1e-3)
        assert error < 0.7 * weighted_error(weight, truncated_svd(weight, rank), g)


def test_a_rank_sweep_needs_one_decomposition():
    weight, g = randn(N, K), gram(residuals())
    largest = arhq_branch(weight, 16, g)
    for rank in (2, 9):
        alone = arhq_branch(weight, rank, g)
        torch.testing.assert_close(
            largest.truncate(rank).matrix(), alone.matrix(), atol=1e-4, rtol=1e-3
        )


def test_arhq_does_not_depend_on_the_scale_of_the_residuals():
    """The floor is relative: residuals of 1e-6 give the branch of residuals of 1."""
    weight, g = randn(N, K), gram(residuals())
    small, large = arhq_branch(weight, 4, g * 2.0**-40), arhq_branch(weight, 4, g)
    assert torch.equal(small.matrix(), large.matrix())


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_arhq_of_few_or_zero_residuals_is_finite(rows):
    """A Gram matrix of rank 0, 1 and 5; without residuals it is the plain SVD."""
    weight = randn(N, K)
    g = gram(residuals(rows)) if rows else torch.zeros(K, K)
    branch = arhq_branch(weight, 8, g)
    assert branch.down.isfinite().all() and branch.up.isfinite().all()
    if rows == 0:
        assert torch.equal(branch.matrix(), truncated_svd(weight, 8).matrix())


def test_arhq_of_equal_residuals_is_finite():
    """The rounding of their sums leaves eigenvalues below the floor that serves else."""
    equal = residuals(1).expand(1024, K).contiguous()
    branch = arhq_branch(randn(N, K), 8, gram(equal))
    assert branch.down.isfinite().all() and branch.up.isfinite().all()


def test_zero_and_rank_deficient_weights():
    for weight in (torch.zeros(N, K), torch.ones(N, K), randn(N, 1) @ randn(1, K, seed=2)):
        for branch in (truncated_svd(weight, 8), arhq_branch(weight, 8, gram(residuals()))):
            balanced = branch.balanced(torch.bfloat16)
            assert balanced.down.isfinite().all() and balanced.up.isfinite().all()
            torch.testing.assert_close(balanced.matrix(), weight, atol=2e-2, rtol=2e-2)


def coarse(weight: Tensor) -> Tensor:
    """A quantizer to multiples of 0.5."""
    return (weight * 2).round() / 2


def test_svd_branch_keeps_the_best_and_stops_at_the_first_worsening():
    """Errors 5, 3, 4, 1: the fourth candidate is never made."""
    weight, given, seen = randn(N, K), [5.0, 3.0, 4.0, 1.0], []

    def error(branch: LowRank) -> float:
        seen.append(branch)
        return given[len(seen) - 1]

    best = svd_branch(weight, 4, quantize=coarse, error=error)
    assert len(seen) == 3 and best is seen[1]
    second = truncated_svd(weight - coarse(weight - seen[0].matrix()), 4)
    assert torch.equal(best.matrix(), second.matrix())


def test_svd_branch_improves_what_the_quantizer_leaves():
    weight = randn(N, K)
    left = lambda b: (weight - b.matrix() - coarse(weight - b.matrix())).norm().item()
    once = svd_branch(weight, 8, quantize=coarse, error=left, iterations=0)
    assert torch.equal(once.matrix(), truncated_svd(weight, 8).matrix())
    assert left(svd_branch(weight, 8, quantize=coarse, error=left)) < 0.98 * left(once)


def test_balanced_factors_have_like_norms_and_fit_fp16():
    branch = LowRank(randn(4, K) * 1e-7, randn(N, 4, seed=1) * 1e5)
    balanced = branch.balanced(torch.float16)
    assert balanced.down.isfinite().all() and balanced.up.isfinite().all()
    ratio = balanced.down.float().norm(dim=1) / balanced.up.float().norm(dim=0)
    assert ((ratio > 0.49) & (ratio < 2.01)).all()
    torch.testing.assert_close(balanced.matrix(), branch.matrix(), rtol=0.01, atol=1e-3)
