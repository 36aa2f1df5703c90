"""From E[x^T x] of inputs as they are read to the Hessian that a plan's weight columns meet.

    H = P^T H_t P        H_t = T^T E[x^T x] T, T the input's scale and rotation, P order and padding

exactly, since all of this is linear. Rounding of the inputs is not known when the products are
summed (blocks are chosen after calibration) and is left out: base columns meet x instead of Q(x).
Columns copied for `act_channels` meet residuals x - Q(x), whose mean squares calibration knows;
residuals are nearly white (benchmarks/layer_problems.py), so theirs is a diagonal block.

The one call gathers the products of what each stored column really meets (calibration/gram.py).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from arc_ao.calibration.session import CalibrationSession, observer_on
from arc_ao.methods.gptq import Rounding, prepare_rounding, round_weight
from arc_ao.methods.rotation import rotate
from arc_ao.methods.weights import LayerPlan, in_order, quantize_weight
from arc_ao.tensor import ARCTensor

Take = Callable[[], Tensor | None]  # hands over a matrix, so that nobody else holds it


def planned_hessian(gram: Tensor, plan: LayerPlan) -> Tensor:
    """Hessian fp32 [A, A], A = K16 + copied columns, from gram fp32 [K, K]; overwrites gram."""
    scale, signs = plan.prepared.input_scale, plan.prepared.rotation
    if scale is not None:
        gram.mul_(scale).mul_(scale.unsqueeze(1))
    if signs is not None:
        gram = rotate(rotate(gram, signs).T, signs)
    gram = in_order(in_order(gram, plan.channel_order).T, plan.channel_order)
    if plan.act_channels is None:
        return gram
    return torch.block_diag(gram, torch.diag(plan.mean_error.index_select(0, plan.act_channels)))


def quantize_group(
    weights: list[Tensor], plans: list[LayerPlan], names: list[str], take: Take
) -> Iterator[ARCTensor]:
    """Weights [N, K] of the linears that read one input, each made when it is asked for.

    Args:
        take: hands over the Hessian under these plans, or None; not called where none is needed.
    """
    rounding = None
    if plans[0].config.needs_hessian:
        rounding = prepare_rounding(take, plans[0], names)
    for weight, plan in zip(weights, plans, strict=True):
        yield quantized(weight, plan, rounding)


def quantized(weight: Tensor, plan: LayerPlan, rounding: Rounding | None) -> ARCTensor:
    """Weight [N, K] rounded as planned; to nearest without a `rounding`."""
    if rounding is None:
        return quantize_weight(weight, plan)
    return round_weight(weight, plan, rounding)


@dataclass
class SharedRounding:
    """Rounding of the linears behind one input that are converted one at a time.

    Factorized for the first of them, freed after the last.
    """

    names: list[str]
    take: Take  # of E[x^T x] as it is read
    left: set[str] = field(init=False)
    rounding: Rounding | None = None
    made: bool = False

    def __post_init__(self) -> None:
        self.left = set(self.names)

    def quantize(self, name: str, weight: Tensor, plan: LayerPlan) -> ARCTensor:
        """The weight [N, K] of one linear."""
        if not self.made:
            self.rounding = prepare_rounding(lambda: taken(self.take, plan), plan, self.names)
            self.made = True
        tensor = quantized(weight, plan, self.rounding)
        self.left.discard(name)
        if not self.left:
            self.rounding = None
        return tensor


def shared_roundings(session: CalibrationSession) -> dict[str, SharedRounding]:
    """Name of every linear of a calibrated session -> the rounding of its group.

    Raises:
        ValueError: a layer whose inputs were observed without their products, by name.
    """
    found = {}
    for group in session.groups():
        names = [member.name for member in group]
        observers = [observer_on(member.module) for member in group]
        if observers[0].count and not any(observer.gram.count for observer in observers):
            raise ValueError(
                f"{names[0]}: expected the sums of input products that rounding='gptq' and "
                "weight_scale='local_hessian' need, found none; ask for them in step='prepare', "
                "too, and run calibration data again (a state_dict does not carry them)"
            )
        shared = SharedRounding(names, partial(session.gram_of, group))
        found |= dict.fromkeys(names, shared)
    return found


def taken(take: Take, plan: LayerPlan) -> Tensor | None:
    """The Hessian under a plan of what `take` hands over."""
    gram = take()
    return None if gram is None else planned_hessian(gram, plan)
