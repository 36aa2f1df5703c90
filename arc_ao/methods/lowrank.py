"""Low-rank branches: W = U D + R, with U D in 16 bits and only the residual R in NVFP4.

    y = x D^T U^T + Q(x) Q(R)^T            D (down) [r, K], U (up) [N, r], singular values falling

SVDQuant (arXiv 2411.05007) takes the truncated SVD of W and repeats it on what the quantizer of R
leaves: L <- SVD_r(W - Q(W - L)), as long as the layer's output error falls. ARHQ (arXiv 2605.00140)
takes the L that minimises E |e (W - L)^T|^2 for the quantization residual e = x - Q(x) of the
activations: with G = E[e^T e] = C C^T, the SVD of W C, of which C^-1 gives D.

The two combine: SVDQuant's iterations with ARHQ's decomposition (on eight linears of the shipped
model, ranks 32 and 128: 0.10 and 0.37 dB better than SVDQuant, 1.8 and 2.8 dB than ARHQ alone).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_ITERATIONS = 100  # of svd_branch, which ends at the first worsening
RELATIVE_FLOOR = 1e-6  # of G's mean diagonal (the paper's is absolute)


@dataclass(frozen=True)
class LowRank:
    """Factors of a low-rank matrix up @ down, by falling singular value."""

    down: Tensor  # [r, K]
    up: Tensor  # [N, r]

    def matrix(self) -> Tensor:
        """up @ down [N, K] in fp32."""
        return self.up.float() @ self.down.float()

    def truncate(self, rank: int) -> "LowRank":
        """The best of a lower rank by the same measure: a sweep needs one decomposition."""
        return LowRank(self.down[:rank], self.up[:, :rank])

    def balanced(self, dtype: torch.dtype) -> "LowRank":
        """The same product in `dtype`, each pair of factors scaled to equal norms before rounding,
        by a power of two, so that neither leaves the range of fp16."""
        ratio = self.down.norm(dim=1) / self.up.norm(dim=0)
        exponent = torch.log2(ratio.sqrt()).nan_to_num(0.0, 0.0, 0.0).round()
        factor = torch.exp2(exponent)  # [r]
        down = self.down / factor.unsqueeze(1)
        return LowRank(down.to(dtype).contiguous(), (self.up * factor).to(dtype).contiguous())


def truncated_svd(matrix: Tensor, rank: int) -> LowRank:
    """Best approximation of rank min(rank, N, K) to matrix [N, K]: up = U S, down = V^T."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return LowRank(right[:rank], (left * values)[:, :rank])


def sketched_svd(matrix: Tensor, rank: int) -> LowRank:
    """A quick `truncated_svd` (randomised, fixed seed), to compare candidates by."""
    sketch = min(rank + 8, *matrix.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(matrix, q=sketch)
    return LowRank(right.t()[:rank], (left * values)[:, :rank])


def iterated(
    weight: Tensor,
    decompose: Callable[[Tensor], LowRank],
    *,
    quantize: Callable[[Tensor], Tensor],
    error: Callable[[LowRank], float],
    iterations: int = MAX_ITERATIONS,
) -> LowRank:
    """L <- decompose(W - Q(W - L)) as long as it gets better.

    Args:
        weight: fp32 [N, K], smoothed.
        decompose: a matrix [N, K] to its branch: `truncated_svd`, or `weighted_svd` for ARHQ's.
        quantize: Q of a weight [N, K], dequantized.
        error: of the layer's output with a branch; the branch with the least one is kept.
        iterations: decompositions after the first; 0 takes that one. The first that is not better
            ends the search.
    """
    best = decompose(weight)
    least = error(best) if iterations else 0.0
    for _ in range(iterations):
        candidate = decompose(weight - quantize(weight - best.matrix()))
        found = error(candidate)
        if not found < least:
            break
        best, least = candidate, found
    return best


def svd_branch(
    weight: Tensor,
    rank: int,
    *,
    quantize: Callable[[Tensor], Tensor],
    error: Callable[[LowRank], float],
    iterations: int = MAX_ITERATIONS,
) -> LowRank:
    """SVDQuant's branch; arguments as those of `iterated`."""
    decompose = lambda matrix: truncated_svd(matrix, rank)
    return iterated(weight, decompose, quantize=quantize, error=error, iterations=iterations)


def metric_root(gram: Tensor) -> Tensor | None:
    """C (lower, fp64 [K, K]) with C C^T = G up to scale and floor; None where G is zero.

    gram is symmetric, and positive semidefinite but for the rounding of fp32 sums. A floor relative
    to its mean diagonal makes singular ones usable: the least of RELATIVE_FLOOR, ten times that and
    so on that does (equal rows leave a matrix of rank 1, whose rounding needs more than the first).
    """
    gram = gram.double()
    mean = gram.diagonal().mean()
    if not (mean > 0 and torch.isfinite(mean)):
        return None
    gram, floor = gram / mean, RELATIVE_FLOOR
    diagonal = gram.diagonal().clone()
    while True:
        gram.diagonal().copy_(diagonal + floor)
        root, info = torch.linalg.cholesky_ex(gram)
        if info.item() == 0:
            return root
        floor *= 10  # ends: with a floor above the sum of a row's magnitudes it is dominant


def weighted_svd(weight: Tensor, rank: int, root: Tensor | None) -> LowRank:
    """The L of this rank with the least trace((W - L) C C^T (W - L)^T); without C the plain SVD."""
    if root is None:
        return truncated_svd(weight, rank)
    found = truncated_svd((weight.double() @ root).float(), rank)
    down = torch.linalg.solve_triangular(root, found.down.double(), upper=False, left=False)
    return LowRank(down.float(), found.up)


def arhq_branch(weight: Tensor, rank: int, gram: Tensor) -> LowRank:
    """ARHQ's branch of weight fp32 [N, K] (smoothed) for gram [K, K] = E[e^T e], e = x - Q(x).

    Without any residual energy every direction is alike, and it is the plain SVD.
    """
    return weighted_svd(weight, rank, metric_root(gram))
