"""From E[x^T x] of inputs as they are read to the Hessian that a plan's weight columns meet.

    H = P^T H_t P        H_t = T^T E[x^T x] T, T the input's scale and rotation, P order and padding

exactly, since all of this is linear. Rounding of the inputs is not known when the products are
summed (blocks are chosen after calibration) and is left out: base columns meet x instead of Q(x).
Columns copied for `act_channels` meet residuals x - Q(x), whose mean squares calibration knows;
residuals are nearly white (benchmarks/layers/problems.py), so theirs is a diagonal block.

The one call gathers the products of what each stored column really meets (methods/gram.py).

In all flows GPTQ has to leave less error than rounding to nearest on rows that were kept out of the
sums, weight by weight; where it does not, the weight is rounded to nearest.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from arc_ao.calibration.few_tokens import RoundingNote, warn_of_few_tokens
from arc_ao.calibration.input_gram import InputGram
from arc_ao.calibration.session import CalibrationSession, observer_on
from arc_ao.formats.rotation import rotate
from arc_ao.methods.gptq import Rounding, prepare_rounding, round_weight
from arc_ao.methods.gram import Gram
from arc_ao.methods.held_error import held_error, held_rows
from arc_ao.methods.output_factor import OutputFactor
from arc_ao.methods.weights import LayerPlan, in_order, quantize_weight, rows_of
from arc_ao.tensor import ARCTensor

CHOICE_ROWS = 256  # of a weight that damping is chosen on
TINY = torch.finfo(torch.float32).tiny


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
    error = plan.mean_error.index_select(0, plan.act_channels)
    if plan.mean_square is not None:  # of all tokens alike, unlike the sums
        error = error * (gram.diagonal().sum() / plan.mean_square.sum().clamp(min=TINY))
    return torch.block_diag(gram, torch.diag(error))


def taken(gram: InputGram, plan: LayerPlan) -> Tensor | None:
    """The Hessian under a plan, handed over by the sum of an input."""
    total = gram.take()
    return total if total is None or isinstance(gram, Gram) else planned_hessian(total, plan)


@dataclass(frozen=True)
class Rounded:
    """A quantized weight and how it was rounded."""

    tensor: ARCTensor
    note: RoundingNote


class GroupRounding:
    """Rounds the weights of the linears that read one input, given the sum of its products.

    Fitted when the first weight comes: an open damping is chosen by the error of some of its rows.

    Args:
        names: of the linears, for warnings.
        gram: of their input; handed over. None where their plans need none.
    """

    def __init__(self, names: list[str], gram: InputGram | None) -> None:
        self.names, self.gram = names, gram
        self.tokens = 0 if gram is None else gram.count
        self.rounding: Rounding | None = None
        self.rows: Tensor | None = None  # kept aside

    def quantize(
        self, weight: Tensor, plan: LayerPlan, outputs: OutputFactor | None = None
    ) -> Rounded:
        """Weight [N, K] under its plan: by GPTQ or to nearest, as the rows kept aside decide."""
        if self.gram is not None and plan.config.needs_hessian:
            self._fit(weight, plan)
        tensor, channels = quantized(weight, plan, self.rounding, outputs), weight.shape[1]
        if self.rounding is None or self.rounding.lower is None:
            return Rounded(tensor, RoundingNote("nearest", None, self.tokens, channels))
        kept = "gptq"
        if self.rows is not None:
            nearest = quantize_weight(weight, plan)
            gptq, other = (
                held_error(weight, some, plan, self.rows, outputs) for some in (tensor, nearest)
            )
            if other < gptq:
                tensor, kept = nearest, "nearest"
        return Rounded(tensor, RoundingNote(kept, self.rounding.damping, self.tokens, channels))

    def _fit(self, weight: Tensor, plan: LayerPlan) -> None:
        gram, self.gram = self.gram, None
        if plan.config.rounding == "gptq":
            self.rows = held_rows(gram, plan)
        some = slice(None, None, -(-weight.shape[0] // CHOICE_ROWS))
        part, part_plan = weight[some], rows_of(plan, some)

        def error(rounding: Rounding) -> float:
            if rounding.lower is None:
                return math.inf
            return held_error(part, round_weight(part, part_plan, rounding), part_plan, self.rows)

        self.rounding = prepare_rounding(
            lambda: taken(gram, plan),
            plan,
            self.names,
            gram.tokens,
            None if self.rows is None else error,
        )


def quantize_group(
    weights: list[Tensor],
    plans: list[LayerPlan],
    names: list[str],
    gram: InputGram | None,
    outputs: list[OutputFactor | None] | None = None,
) -> Iterator[Rounded]:
    """Weights [N, K] of the linears that read one input, each made when it is asked for."""
    group = GroupRounding(names, gram)
    factors = [None] * len(weights) if outputs is None else outputs
    for weight, plan, factor in zip(weights, plans, factors, strict=True):
        yield group.quantize(weight, plan, factor)


def quantized(
    weight: Tensor,
    plan: LayerPlan,
    rounding: Rounding | None,
    outputs: OutputFactor | None = None,
) -> ARCTensor:
    """Weight [N, K] rounded as planned; to nearest without a `rounding`."""
    if rounding is None:
        return quantize_weight(weight, plan)
    return round_weight(weight, plan, rounding, outputs)


@dataclass
class SharedRounding:
    """Rounding of the linears behind one input that are converted one at a time.

    Factorized for the first of them, freed after the last.
    """

    names: list[str]
    gram: Callable[[], InputGram]  # hands over the sum of the input as it is read
    left: set[str] = field(init=False)
    group: GroupRounding | None = None

    def __post_init__(self) -> None:
        self.left = set(self.names)

    def quantize(self, name: str, weight: Tensor, plan: LayerPlan) -> ARCTensor:
        """The weight [N, K] of one linear."""
        if self.group is None:
            self.group = GroupRounding(self.names, self.gram())
        tensor = self.group.quantize(weight, plan).tensor
        self.left.discard(name)
        if not self.left:
            self.group = None
        return tensor


def shared_roundings(session: CalibrationSession) -> dict[str, SharedRounding]:
    """Name of every linear of a calibrated session -> the rounding of its group.

    Warns once where the tokens are few for GPTQ.

    Raises:
        ValueError: a layer whose inputs were observed without their products, by name.
    """
    found, notes = {}, {}
    for group in session.groups():
        names = [member.name for member in group]
        observers = [observer_on(member.module) for member in group]
        tokens = sum(observer.gram.count for observer in observers)
        if observers[0].count and not tokens:
            raise ValueError(
                f"{names[0]}: expected the sums of input products that rounding='gptq' and "
                "weight_scale='local_hessian' need, found none; ask for them in step='prepare', "
                "too, and run calibration data again (a state_dict does not carry them)"
            )
        shared = SharedRounding(names, partial(session.gram_of, group))
        found |= dict.fromkeys(names, shared)
        note = RoundingNote("gptq", None, tokens, group[0].module.in_features)
        notes |= dict.fromkeys(names, note)
    if session.config.resolve().rounding == "gptq":
        warn_of_few_tokens(notes, judged=False)
    return found
