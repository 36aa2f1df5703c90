"""Linears that gpu_suite.py compares.

bf16         F.linear (cuBLAS)
nvfp4        arc::quant_augment, then arc::nvfp4_gemm, without residual channels
arc          the same with RESIDUAL_SHARE extra channels, half of each kind
torchao_fp8  torchao's fp8 weight and fp8 activation, one scale per row, where importable
gemlite      its 16-bit activation, 4-bit weight kernel, where importable

torchao and gemlite are context, not targets: what their packages do by default.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arc_ao.formats import nvfp4
from arc_ao.ops import nvfp4_gemm, quant_augment

RESIDUAL_SHARE = 0.06  # of in_features
OURS = ("nvfp4", "arc")
COLD_L2_TURNS = 3  # the copies of a weight fill the L2 this many times
MAX_COPIES = 64
L2_WITHOUT_GPU = 0


class Weight(NamedTuple):
    """An NVFP4 weight with residual blocks, as ARCTensor stores it."""

    qdata: Tensor
    scale: Tensor
    outer: Tensor
    act_blocks: Tensor
    weight_blocks: Tensor
    base_blocks: int

    def clone(self) -> "Weight":
        """Other memory for what a product streams."""
        return self._replace(qdata=self.qdata.clone(), scale=self.scale.clone())


class Provider(NamedTuple):
    """Copies of one linear, each on its own memory; x [M, K] -> y [M, N]."""

    linears: list[Callable[[Tensor], Tensor]]
    weight_bytes: int
    weights: list  # the copies


def available() -> list[str]:
    """Providers that can be built here."""
    others = {"torchao_fp8": "torchao", "gemlite": "gemlite"}
    present = [name for name, module in others.items() if find_spec(module) is not None]
    return ["bf16", *OURS, *(present if torch.cuda.is_available() else [])]


def build(name: str, weight: Tensor) -> Provider:
    """Copies of a provider's linear for `weight` bf16 [N, K]."""
    if name == "bf16":
        return _copies(weight, weight.nbytes, Tensor.clone, F.linear)
    if name in OURS:
        stored = quantized(weight, RESIDUAL_SHARE if name == "arc" else 0.0)
        size = stored.qdata.nbytes + stored.scale.nbytes
        return _copies(stored, size, Weight.clone, linear)
    if name == "torchao_fp8":
        module = _torchao_fp8(weight)
        return _copies(module.weight, weight.nbytes // 2, lambda w: w.clone(), F.linear)
    module = _gemlite(weight)
    return Provider([module], weight.numel() // 2, [module])


def _copies(weight, size: int, clone: Callable, multiply: Callable) -> Provider:
    device = weight.device if isinstance(weight, Tensor) else weight.qdata.device
    count = min(MAX_COPIES, 1 + COLD_L2_TURNS * l2_bytes(device) // size)
    weights = [weight, *(clone(weight) for _ in range(count - 1))]
    return Provider([lambda x, w=w: multiply(x, w) for w in weights], size, weights)


def l2_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return L2_WITHOUT_GPU
    return torch.cuda.get_device_properties(device).L2_cache_size


def quantized(weight: Tensor, share: float) -> Weight:
    """`weight` [N, K] with `share` of its channels again as residuals, half of each kind.

    Which blocks makes no difference to speed: evenly spaced ones.
    """
    blocks = -(-weight.shape[1] // nvfp4.BLOCK_SIZE)
    count = min(blocks, round(share * blocks / 2))
    ids = torch.linspace(0, blocks - 1, count, device=weight.device).int()
    qdata, scale, outer = nvfp4.quantize(weight)
    if count:
        values = nvfp4.to_blocks(weight.float()) - nvfp4.to_blocks(
            nvfp4.dequantize(qdata, scale, outer)
        )
        residual = values.index_select(1, ids).flatten(1)
        rest, rest_scale, _ = nvfp4.quantize(residual, amax=outer * nvfp4.NVFP4_MAX)
        qdata, scale = torch.cat([qdata, rest], 1), torch.cat([scale, rest_scale], 1)
    return Weight(qdata, scale, outer.reshape(1), ids, ids, blocks)


def quantize_input(x: Tensor, weight: Weight) -> tuple[Tensor, Tensor, Tensor]:
    """A_aug for `weight`, one outer scale per token."""
    return quant_augment(x, weight.act_blocks, weight.weight_blocks, None, "token")


def linear(x: Tensor, weight: Weight) -> Tensor:
    """x [M, K] times an NVFP4 weight: what an ARCTensor does in F.linear."""
    return nvfp4_gemm(
        *quantize_input(x, weight), weight.qdata, weight.scale, weight.outer, None, x.dtype,
        act_blocks=weight.act_blocks, base_blocks=weight.base_blocks,
    )  # fmt: skip


def _linear_with(weight: Tensor) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return module


def _torchao_fp8(weight: Tensor) -> nn.Linear:
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        PerRow,
        quantize_,
    )

    module = _linear_with(weight)
    quantize_(module, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    return module


def _gemlite(weight: Tensor) -> nn.Module:
    from gemlite.helper import A16W4_HQQ_INT  # 4-bit integers in groups, fp16 or bf16 activations

    return A16W4_HQQ_INT(device=str(weight.device)).from_linear(_linear_with(weight))
