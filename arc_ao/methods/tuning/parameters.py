"""What is trained: factors of weights and gains of norms; how they enter and leave a model.

Each has an optimizer of its own that steps as soon as its gradient is complete, inside the backward
pass. Gradients of one layer exist at a time, not of the model.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from arc_ao.methods.tuning.layer import InputCache, TunedForward, TunedWeight, values_dtype

# Of factors, a step. SmolLM2-135M from "best", 60 steps of 512 tokens: KL on tokens kept aside
# .1118 -> .1080, WikiText-2 .1239 -> .1190, books .1121 -> .1057; 0.002 gains less, 0.01 harms.
# (Latents of full rank: 105 steps at 0.004 gain nothing.)
LEARNING_RATE = 0.003
GAIN_RATE = 0.002  # of norms' parameters, over their root mean square
BETAS = (0.9, 0.99)
EPSILON = 1e-20  # gradients of a mean over tokens and a vocabulary are tiny
# Beside values: where latents start 4, codes of the best and of a new best 1, the rest for factors,
# their moments and block scales.
BYTES_BESIDE_VALUES = 6
RESIDUAL_COLUMNS = 1 / 16  # of the columns, which values have in addition
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def bytes_per_weight(dtype: torch.dtype) -> float:
    """What training holds for a weight of a model in `dtype`, beside the model: 8.1 in bf16."""
    return BYTES_BESIDE_VALUES + values_dtype(dtype).itemsize * (1 + RESIDUAL_COLUMNS)


class Gain:
    """A norm's parameter, trained in fp32 and rounded into the model's dtype."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.latent = nn.Parameter(parameter.detach().float().clone())
        self.unit = self.latent.detach().square().mean().sqrt().item()
        self.parameters = {"latent": self.latent}

    def take_gradient(self) -> None:
        """That of the model's parameter, in fp32."""
        self.latent.grad, self.parameter.grad = self.parameter.grad.float(), None

    @torch.no_grad()
    def refresh(self) -> None:
        """Round into the model."""
        self.parameter.copy_(self.latent)


class Trainables:
    """Weights and gains of a model under training, by name, with their optimizers."""

    def __init__(self, weights: dict[str, TunedWeight], gains: dict[str, Gain]) -> None:
        self.weights, self.gains = weights, gains
        self.optimizers = {name: _adam(owner.parameters.values()) for name, owner in self.owners()}

    def owners(self) -> Iterator[tuple[str, TunedWeight | Gain]]:
        """Everything that is trained."""
        yield from self.weights.items()
        yield from self.gains.items()

    def set_rates(self, multiplier: float) -> None:
        """Learning rates of the next step, over the highest."""
        for name, optimizer in self.optimizers.items():
            group, rate = optimizer.param_groups[0], LEARNING_RATE
            if name in self.gains:
                rate = GAIN_RATE * self.gains[name].unit
            group["lr"] = rate * multiplier

    def finished(self) -> dict[str, Tensor]:
        """Codes of weights and values of norms as they are now, copied."""
        codes = {name: weight.codes() for name, weight in self.weights.items()}
        return codes | self.norms()

    def norms(self) -> dict[str, Tensor]:
        """Values of norms as they are now, copied."""
        return {name: gain.parameter.detach().clone() for name, gain in self.gains.items()}

    def state(self) -> dict[str, Tensor]:
        """Factors, norms and their moments by name."""
        tensors = {}
        for name, part, parameter in self._parameters():
            moments = self.optimizers[name].state.get(parameter, {})
            tensors |= {f"{name}:{part}:{key}": moments[key] for key in MOMENTS if key in moments}
            tensors[f"{name}:{part}"] = parameter.detach()
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        for name, part, parameter in self._parameters():
            parameter.copy_(tensors[f"{name}:{part}"])
            found = {key: tensors.get(f"{name}:{part}:{key}") for key in MOMENTS}
            if found["step"] is not None:
                self.optimizers[name].state[parameter] = {
                    key: value.to(parameter.device) for key, value in found.items()
                }
        for _, owner in self.owners():
            owner.refresh()

    def _parameters(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """Name of an owner, of a part, and its parameter."""
        for name, owner in self.owners():
            for part, parameter in owner.parameters.items():
                yield name, part, parameter


def _adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Adam:
    return torch.optim.Adam(list(parameters), lr=0.0, betas=BETAS, eps=EPSILON, fused=True)


def trainables(model: nn.Module, names: Iterable[str], originals: dict[str, Tensor]) -> Trainables:
    """Factors for the quantized linears `names` and of all norms.

    Args:
        originals: unquantized weights by name, or some of them; each is let go when it was read.
    """
    weights = {}
    for seed, name in enumerate(names):
        tensor = model.get_submodule(name).weight.data
        weights[name] = TunedWeight(tensor, originals.pop(name, None), seed)
    return Trainables(weights, {name: Gain(p) for name, p in norm_parameters(model).items()})


def norm_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of norms: of modules without children whose class says Norm."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if _is_norm(model.get_submodule(name.rpartition(".")[0])) and parameter.is_floating_point()
    }


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and next(module.children(), None) is None


@contextmanager
def under_training(model: nn.Module, trained: Trainables) -> Iterator[InputCache]:
    """Inside, quantized linears run on their latents and a backward pass is a step.

    Afterwards forwards, gradients and requires_grad are as before; norms keep their values.
    """
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    cache, modules, handles = InputCache(), [], []
    try:
        for parameter, *_ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        for name, weight in trained.weights.items():
            module = model.get_submodule(name)
            module.forward = TunedForward(weight, module.bias, cache)
            modules.append(module)
        for name, owner in trained.owners():
            handles += _step_when_ready(owner, trained.optimizers[name])
        with torch.enable_grad():
            yield cache
    finally:
        cache.clear()
        for handle in handles:
            handle.remove()
        for module in modules:
            del module.forward
        for parameter, required, gradient in before:
            parameter.grad = None
            parameter.requires_grad_(required)
            parameter.grad = gradient


def _step_when_ready(
    owner: TunedWeight | Gain, optimizer: torch.optim.Adam
) -> list[torch.utils.hooks.RemovableHandle]:
    """Step and round as soon as the gradients are complete."""
    is_gain = isinstance(owner, Gain)
    leaves = [owner.parameter.requires_grad_()] if is_gain else list(owner.parameters.values())

    def step(_: Tensor) -> None:
        if any(leaf.grad is None for leaf in leaves):
            return  # the other factor's is still to come
        if is_gain:
            owner.take_gradient()
        optimizer.step()
        optimizer.zero_grad()
        owner.refresh()

    return [leaf.register_post_accumulate_grad_hook(step) for leaf in leaves]


@torch.no_grad()
def install(model: nn.Module, trained: Trainables, finished: dict[str, Tensor]) -> None:
    """Put codes and norms into the model: weights in the layout they had."""
    for name, weight in trained.weights.items():
        tensor = weight.tensor if name not in finished else weight.finished(finished[name])
        module = model.get_submodule(name)
        module.weight = nn.Parameter(tensor, requires_grad=False)
    for name, gain in trained.gains.items():
        gain.parameter.copy_(finished[name])
