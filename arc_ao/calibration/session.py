"""CalibrationSession: the linears that are calibrated together and compete for one budget.

`attach` puts an observer on a linear as the submodule `arc_observer`, fed by a forward pre-hook,
so that it moves, saves and copies with the model. A tensor that several linears read is measured
once. Linears whose statistics are equal bit for bit read the same input: they form a group.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from arc_ao.calibration.input_gram import InputGram
from arc_ao.calibration.observer import ARCObserver
from arc_ao.calibration.padding import watch, without_padding
from arc_ao.calibration.shared_inputs import SharedInputs
from arc_ao.config import ARCConfig

OBSERVER = "arc_observer"


@dataclass(frozen=True)
class Member:
    """A linear under calibration."""

    name: str
    module: nn.Linear


@dataclass
class CalibrationSession:
    """Observed linears of one config.

    `sums_products`: whether observers sum E[x^T x], 4 K^2 bytes an input. For a config that needs
    Hessians, unless they are gathered block by block.
    """

    config: ARCConfig
    members: list[Member] = field(default_factory=list)
    shared: SharedInputs = field(default_factory=SharedInputs)
    plans: dict[str, Any] | None = None  # member name -> LayerPlan, made once at convert
    roundings: dict[str, Any] = field(default_factory=dict)  # name -> SharedRounding, as the plans
    sums_products: bool | None = None  # None: as the config needs
    observing: bool = True  # off while candidates are tried on the same inputs
    analyses: tuple[Any, list[Any]] | None = None  # what was last analysed, and its result
    fisher: dict[str, Any] | None = None  # member name -> OutputFisher (calibration/fisher.py)
    mix: Any = None  # methods/mix.py: what each group gets, from its search to its plans
    choices: dict[str, dict[str, Any]] = field(default_factory=dict)  # the same, to be read
    observed: int = 0  # linears that have their observers
    watching: list[RemovableHandle] = field(default_factory=list)  # until they have none

    def __post_init__(self) -> None:
        if self.sums_products is None:
            self.sums_products = self.config.needs_hessian

    def attach(self, name: str, module: nn.Linear) -> None:
        """Start observing `module`."""
        name = self._unique(name)
        observer = ARCObserver(
            module.in_features,
            self._channel_orders(),
            name,
            self.config.sample_tokens,
            self.sums_products,
        )
        observer.session = self
        observer.to(module.weight.device)
        observer.hook = module.register_forward_pre_hook(_observe_input, with_kwargs=True)
        module.register_module(OBSERVER, observer)
        self.members.append(Member(name, module))
        self.observed += 1

    def watch(self, model: nn.Module) -> None:
        """Leave out padding also where the user runs the model, until no linear is observed."""
        self.watching = watch(model)

    def observe(self, observer: ARCObserver, x: Tensor) -> None:
        """Account for x read by the layer of `observer`, less its padding; a tensor is measured
        once."""
        if not self.observing or x.numel() == 0:
            return
        increment = self.shared.find(x)
        if increment is None or not observer.fits(increment):
            rows = without_padding(x)
            increment = observer.measure(rows)
            self.shared.add(x, increment)
            observer.keep(rows)  # by whoever measures it: once for all that share it
        observer.add(increment)

    def groups(self) -> list[list[Member]]:
        """Members by shared input, in the order in which they were attached."""
        grouped: dict[Any, list[Member]] = {}
        for member in self.members:
            observer = observer_on(member.module)
            seen = observer.count > 0
            grouped.setdefault(_digest(observer) if seen else member.name, []).append(member)
        return list(grouped.values())

    def observer_of(self, group: list[Member]) -> ARCObserver:
        """The observer that speaks for a group."""
        return observer_on(group[0].module)

    def fisher_of(self, group: list[Member], channel_order: str) -> list[Any] | None:
        """Of every linear of a group, for blocks formed in `channel_order`; None: layers
        weigh the same."""
        if self.fisher is None or not self.config.weighs_layers:
            return None
        index = self.observer_of(group).channel_orders.index(channel_order)
        return [self.fisher[member.name].of_order(index) for member in group]

    def spread_samples(self, tokens: int) -> None:
        """Before calibrating: let the rows that are kept be of all of so many tokens."""
        for member in self.members:
            observer_on(member.module).sample.spread_over(tokens)

    def sample_of(self, group: list[Member]) -> Tensor | None:
        """Rows [M, K] that were kept of the input of a group."""
        found = [observer_on(member.module).sample.rows() for member in group]
        rows = [r for r in found if r is not None]
        return torch.cat(rows) if rows else None

    def gram_of(self, group: list[Member]) -> InputGram:
        """The sum of the products of the input of a group, handed over."""
        first, *others = [observer_on(member.module).gram for member in group]
        for other in others:
            first.merge(other)
            other.take()
        return first

    def leave(self, names: set[str]) -> None:
        """Let members go that are not to be quantized."""
        for member in self.members:
            if member.name in names:
                detach(member.module)
        self.members = [member for member in self.members if member.name not in names]

    def detach(self) -> None:
        """Remove every observer and hook."""
        for member in self.members:
            detach(member.module)

    def _channel_orders(self) -> tuple[str, ...]:
        config = self.config
        if config.mixes:
            return ("none", "amax")
        if "channel_order" in config.searched:
            return ("none", "amax", "rms")
        return (config.resolve().channel_order,)

    def _unique(self, name: str) -> str:
        taken = {member.name for member in self.members}
        return name if name not in taken else f"{name}#{len(taken)}"


def observer_on(module: nn.Module) -> ARCObserver | None:
    """The observer of a prepared linear, or None."""
    return getattr(module, OBSERVER, None)


def _digest(observer: ARCObserver) -> bytes:
    """Equal for equal statistics."""
    state = [t.detach().cpu().numpy().tobytes() for t in observer.buffers()]
    return hashlib.sha256(b"".join(state)).digest()


def detach(module: nn.Module) -> None:
    """Remove the observer and its hook from a linear; with the last one, what watches the model."""
    observer = observer_on(module)
    if observer is not None:
        observer.hook.remove()
        delattr(module, OBSERVER)
        observer.session.observed -= 1
        if observer.session.observed == 0:
            for handle in observer.session.watching:
                handle.remove()


def _observe_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
    observer = observer_on(module)
    observer.session.observe(observer, args[0] if args else kwargs["input"])
