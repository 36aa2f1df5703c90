"""What is trained: latents of all weights and gains of all norms; how they enter and leave a model.

Each has an optimizer of its own that steps as soon as its gradient is complete, inside the backward
pass. Gradients of one layer exist at a time, not of the model.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from arc_ao.methods.tuning.layer import InputCache, TunedForward, TunedWeight

LEARNING_RATE = 0.004  # of latents, in units of their block scales, a step; 0.012 starts by harm
GAIN_RATE = 0.001  # of norms' parameters, over their root mean square
BETAS = (0.9, 0.95)
EPSILON = 1e-20  # gradients of a mean over tokens and a vocabulary are tiny
BYTES_PER_WEIGHT = 17  # latent, moments, bf16 value, codes at the start and at the best
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class Gain:
    """A norm's parameter, trained in fp32 and rounded into the model's dtype."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.latent = nn.Parameter(parameter.detach().float().clone())
        self.unit = self.latent.detach().square().mean().sqrt().item()

    @torch.no_grad()
    def refresh(self) -> None:
        """Round into the model."""
        self.parameter.copy_(self.latent)


class Trainables:
    """Weights and gains of a model under training, by name, with their optimizers."""

    def __init__(self, weights: dict[str, TunedWeight], gains: dict[str, Gain]) -> None:
        self.weights, self.gains = weights, gains
        self.optimizers = {name: _adam(weight.latent, 1.0) for name, weight in weights.items()}
        self.optimizers |= {name: _adam(gain.latent, gain.unit) for name, gain in gains.items()}

    def owners(self) -> Iterator[tuple[str, TunedWeight | Gain]]:
        """Everything that has a latent."""
        yield from self.weights.items()
        yield from self.gains.items()

    def set_rates(self, multiplier: float) -> None:
        """Learning rates of the next step, over those at the start."""
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
        """Latents and moments by name."""
        tensors = {}
        for name, owner in self.owners():
            moments = self.optimizers[name].state.get(owner.latent, {})
            tensors |= {f"{name}:{key}": moments[key] for key in MOMENTS if key in moments}
            tensors[f"{name}:latent"] = owner.latent.detach()
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        for name, owner in self.owners():
            latent = owner.latent
            latent.copy_(tensors[f"{name}:latent"])
            found = {key: tensors.get(f"{name}:{key}") for key in MOMENTS}
            if found["step"] is not None:
                self.optimizers[name].state[latent] = {
                    key: value.to(latent.device) for key, value in found.items()
                }
            owner.refresh()


def _adam(latent: nn.Parameter, rate: float) -> torch.optim.Adam:
    return torch.optim.Adam([latent], lr=rate, betas=BETAS, eps=EPSILON, fused=True)


def trainables(model: nn.Module, names: Iterable[str], originals: dict[str, Tensor]) -> Trainables:
    """Latents of the quantized linears `names` and of all norms.

    Args:
        originals: unquantized weights by name, or some of them; each is let go when it was read.
    """
    weights = {}
    for name in names:
        tensor = model.get_submodule(name).weight.data
        weights[name] = TunedWeight(tensor, originals.pop(name, None))
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
            handles.append(_step_when_ready(owner, trained.optimizers[name]))
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
) -> torch.utils.hooks.RemovableHandle:
    """Step and round as soon as the gradient is complete."""
    trained = owner.parameter.requires_grad_() if isinstance(owner, Gain) else owner.latent

    def step(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad.float(), None
        owner.latent.grad = gradient
        optimizer.step()
        owner.latent.grad = None
        owner.refresh()

    return trained.register_post_accumulate_grad_hook(step)


@torch.no_grad()
def install(model: nn.Module, trained: Trainables, finished: dict[str, Tensor]) -> None:
    """Put codes and norms into the model: weights in the layout they had."""
    for name, weight in trained.weights.items():
        tensor = weight.tensor if name not in finished else weight.finished(finished[name])
        module = model.get_submodule(name)
        module.weight = nn.Parameter(tensor, requires_grad=False)
    for name, gain in trained.gains.items():
        gain.parameter.copy_(finished[name])
