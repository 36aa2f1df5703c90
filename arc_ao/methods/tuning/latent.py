"""The latent of one weight: where it starts, fixed, plus a product of low rank that is trained.

    u = start + r * (A B)      A [N, R], B [R, T], r [N, T/16] by block, in units of block scales

As LR-QAT (arXiv 2406.06385). A gradient of a few thousand tokens says little about each weight of
its own, and a full-rank latent follows its noise: codes flip at random and undo error feedback. Few
parameters average it. r turns what is of low rank in the weight's own space into units of each
block's scale: the root mean square of all scales over the block's, at most MOST_UNITS, so that a
block of small values does not move by many of its steps at once.
"""

import torch
from torch import Tensor

from arc_ao.formats import nvfp4

RANK = 16  # R
MOST_UNITS = 4.0  # of r
CHUNK_ELEMENTS = 1 << 17  # of a weight at a time: temporaries stay in a core's cache


class LowRankLatent:
    """u [N, T], made of rows when they are needed; codes begin as those of `start`, since B is 0.

    Args:
        start: fp32 [N, T]. scale: uint8 [N, T/16], e4m3 bits. seed: of A.

    Attributes:
        left: A, fp32 parameter [N, R]. right: B, fp32 parameter [R, T].
        unit: root mean square of the block scales.
    """

    def __init__(self, start: Tensor, scale: Tensor, seed: int) -> None:
        self.start, self.scale = start, scale
        generator = torch.Generator().manual_seed(seed)
        left = torch.randn(start.shape[0], RANK, generator=generator) / RANK**0.5
        self.left = torch.nn.Parameter(left.to(start.device))
        self.right = torch.nn.Parameter(start.new_zeros(RANK, start.shape[1]))
        self.unit = nvfp4.decode_e4m3(scale).square().mean().sqrt().item()

    def chunks(self) -> list[slice]:
        """Rows to be made at a time: the same everywhere, so that sums have the same bits."""
        return list(nvfp4.row_chunks(self.start, CHUNK_ELEMENTS))

    @torch.no_grad()
    def rows(self, rows: slice) -> Tensor:
        """u of some rows, fp32 [n, T]."""
        scale = nvfp4.decode_e4m3(self.scale[rows])
        ratio = (self.unit / scale).clamp_(max=MOST_UNITS).nan_to_num_()  # of all zeros: 0 / 0
        change = nvfp4.to_blocks(self.left[rows] @ self.right).mul_(ratio.unsqueeze(-1))
        return change.flatten(1).add_(self.start[rows])

    @torch.no_grad()
    def gradients(self, of_weight: Tensor) -> tuple[Tensor, Tensor]:
        """dL/dA and dL/dB of dL/dW [N, T], W = u * scale in units of the outer scale."""
        of_left, of_right = torch.empty_like(self.left), torch.zeros_like(self.right)
        for rows in self.chunks():
            # W moves by r * scale = min(unit, MOST_UNITS * scale) where A B moves by 1
            step = (nvfp4.decode_e4m3(self.scale[rows]) * MOST_UNITS).clamp_(max=self.unit)
            product = (nvfp4.to_blocks(of_weight[rows]) * step.unsqueeze(-1)).flatten(1)
            torch.mm(product, self.right.t(), out=of_left[rows])
            of_right.addmm_(self.left[rows].t(), product)
        return of_left, of_right
