"""Layer problems: a weight, and what a linear reads in calibration and in evaluation.

Constructed ones take the channel profiles of real models from importance matrices (sqnr.py
says how). `common` mixes the heavy-tailed channels with 32 factors that all channels load on:

    x[m, k] = rms[k] * (sqrt(1 - common) * t[m, k] + sqrt(common) * sum_f load[k, f] z[m, f])

In the encoder all-MiniLM-L6-v2 and in the shipped Llama the first 32 principal components hold 0.57
and 0.61 of the (standardised) inputs' variance, median over linears, so 0.57 is realistic. The
quantization residuals x - Q(x) of the same inputs are white: their mean squared correlation over
8192 tokens is 0.0001 to 0.0003 (0.0008 for one linear of twelve), and 0.0001 is what independent
channels would show. Independent channels (common 0) thus lose nothing that ARHQ could use: its gain
over SVDQuant is in the residuals' energies by channel.

Real ones are the linears of a model on a text.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.layers.sqnr import KINDS, activations, profiles, random_weight

FACTORS = 32
NEIGHBOURS = 128  # kept together where a profile is thinned; a multiple of every block


@dataclass(frozen=True)
class Problem:
    """One linear: weight [N, K], inputs [M, K]; all fp32."""

    kind: str
    weight: Tensor
    calibration: Tensor
    evaluation: Tensor


def constructed(
    rms_by_name: dict[str, Tensor],
    *,
    kinds: list[str],
    every: int,
    tokens: int,
    out_features: int,
    weights: str,
    common: float,
    generator: torch.Generator,
    max_channels: int | None = None,
) -> Iterator[Problem]:
    """Problems with the channel profiles of every `every`-th layer; of at most `max_channels`
    channels, blocks of 128 neighbours taken evenly."""
    for kind in kinds:
        for profile in profiles(rms_by_name, kind, every):
            rms = thinned(profile, max_channels)
            weight = random_weight(rms, out_features, weights, generator)
            both = _mixed(rms, 2 * tokens, common, generator)
            yield Problem(kind, weight, both[:tokens], both[tokens:])


def thinned(rms: Tensor, max_channels: int | None) -> Tensor:
    """Evenly spaced blocks of NEIGHBOURS channels of rms [K], at most max_channels together."""
    if max_channels is None or rms.numel() <= max_channels:
        return rms
    blocks, count = rms.numel() // NEIGHBOURS, max(1, max_channels // NEIGHBOURS)
    chosen = torch.arange(count) * blocks // count
    return rms[: blocks * NEIGHBOURS].view(blocks, NEIGHBOURS)[chosen].flatten()


def _mixed(rms: Tensor, tokens: int, common: float, generator: torch.Generator) -> Tensor:
    own = activations(rms, tokens, generator)
    if not common:
        return own
    load = torch.randn(rms.numel(), FACTORS, generator=generator)
    load = load / load.norm(dim=1, keepdim=True)
    factors = torch.randn(tokens, FACTORS, generator=generator)
    return (1 - common) ** 0.5 * own + common**0.5 * rms * (factors @ load.t())


@torch.no_grad()
def of_model(
    model: nn.Module,
    kinds: dict[str, str],
    run: tuple[Callable[[], None], Callable[[], None]],
    every: int = 1,
) -> list[Problem]:
    """Problems of a model's linears.

    Args:
        kinds: ending of a linear's name -> kind.
        run: forward passes over the calibration and the evaluation data.
        every: take every n-th linear of a kind.
    """
    chosen = []
    for ending, kind in kinds.items():
        found = [n for n, m in model.named_modules() if n.endswith(ending) and _is_linear(m)]
        chosen += [(name, kind) for name in found[::every]]
    inputs = [_capture(model, [name for name, _ in chosen], forward) for forward in run]
    weights = {name: model.get_submodule(name).weight.detach().float() for name, _ in chosen}
    return [Problem(k, weights[n], inputs[0][n], inputs[1][n]) for n, k in chosen]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _capture(model: nn.Module, names: list[str], forward: Callable[[], None]) -> dict[str, Tensor]:
    """What each named linear reads, [M, K]."""
    read: dict[str, list[Tensor]] = {name: [] for name in names}
    keep = lambda name: lambda module, args: read[name].append(args[0].float().flatten(0, -2))
    handles = [model.get_submodule(n).register_forward_pre_hook(keep(n)) for n in names]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(chunks) for name, chunks in read.items()}


LLAMA_KINDS = {
    "q_proj": "attention input",
    "o_proj": "attention output",
    "up_proj": "MLP input",
    "down_proj": "MLP middle",
}
BERT_KINDS = {
    "attention.self.query": "attention input",
    "attention.output.dense": "attention output",
    "intermediate.dense": "MLP input",
    "1.output.dense": "MLP middle",
    "4.output.dense": "MLP middle",
}
assert set(LLAMA_KINDS.values()) == set(KINDS)
