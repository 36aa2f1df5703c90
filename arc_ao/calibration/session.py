"""CalibrationSession: the linears that are calibrated together and compete for one budget.

`attach` puts an observer on a linear as the submodule `arc_observer`, fed by a forward pre-hook,
so that it moves, saves and copies with the model. Linears that read the same tensor share the
first one's statistics; the session finds them out while the model runs.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from arc_ao.calibration.observer import ARCObserver
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
    """Observed linears of one config."""

    config: ARCConfig
    members: list[Member] = field(default_factory=list)
    leaders: dict[str, str] = field(default_factory=dict)  # member name -> name of first reader
    shared: SharedInputs = field(default_factory=SharedInputs)
    plans: dict[str, Any] | None = None  # member name -> LayerPlan, made once at convert
    observing: bool = True  # off while candidates are tried on the same inputs

    def attach(self, name: str, module: nn.Linear) -> None:
        """Start observing `module`."""
        name = self._unique(name)
        observer = ARCObserver(module.in_features, self._channel_orders(), name)
        observer.session = self
        observer.to(module.weight.device)
        observer.hook = module.register_forward_pre_hook(_observe_input, with_kwargs=True)
        module.register_module(OBSERVER, observer)
        self.members.append(Member(name, module))

    def observe(self, observer: ARCObserver, x: Tensor) -> None:
        """Account for x read by the layer of `observer`, once per tensor however many read it."""
        if not self.observing:
            return
        first = self.shared.first_observer(x)
        if first is None or first is observer:
            self._leave(observer)
            observer.observe(x)
            self.shared.add(x, observer)
        elif self.leaders.get(observer.name) == first.name:
            return
        elif observer.count == 0 and observer.name not in self.leaders:
            self.leaders[observer.name] = first.name
        else:
            self._leave(observer)
            observer.observe(x)

    def groups(self) -> list[list[Member]]:
        """Members by shared input, in the order in which they were attached."""
        grouped: dict[str, list[Member]] = {}
        for member in self.members:
            grouped.setdefault(self.leaders.get(member.name, member.name), []).append(member)
        return list(grouped.values())

    def observer_of(self, group: list[Member]) -> ARCObserver:
        """The observer that speaks for a group."""
        leader = self.leaders.get(group[0].name, group[0].name)
        return next(observer_on(m.module) for m in self.members if m.name == leader)

    def detach(self) -> None:
        """Remove every observer and hook."""
        for member in self.members:
            detach(member.module)

    def _leave(self, observer: ARCObserver) -> None:
        """A layer that shared its input so far reads one of its own: go on from a copy."""
        leader = self.leaders.pop(observer.name, None)
        if leader is not None:
            source = next(m for m in self.members if m.name == leader)
            observer.merge(observer_on(source.module))

    def _channel_orders(self) -> tuple[str, ...]:
        if "channel_order" in self.config.searched:
            return ("none", "amax")
        return (self.config.resolve().channel_order,)

    def _unique(self, name: str) -> str:
        taken = {member.name for member in self.members}
        return name if name not in taken else f"{name}#{len(taken)}"


def observer_on(module: nn.Module) -> ARCObserver | None:
    """The observer of a prepared linear, or None."""
    return getattr(module, OBSERVER, None)


def detach(module: nn.Module) -> None:
    """Remove the observer and its hook from a linear."""
    observer = observer_on(module)
    if observer is not None:
        observer.hook.remove()
        delattr(module, OBSERVER)


def _observe_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
    observer = observer_on(module)
    observer.session.observe(observer, args[0] if args else kwargs["input"])
