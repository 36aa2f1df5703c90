"""Convert linears block by block, rounded with the Hessians of their inputs.

The steps between flow/sequential.py, which says what runs when, and methods/gptq.py.
"""

from collections.abc import Callable

from torch import Tensor, nn

from arc_ao.calibration.data import Batch
from arc_ao.calibration.few_tokens import RoundingNote, warn_of_few_tokens
from arc_ao.calibration.fisher import OutputFisher
from arc_ao.calibration.session import CalibrationSession, Member, detach
from arc_ao.calibration.work_dir import WorkDir
from arc_ao.flow.sequential import quantize_sequentially
from arc_ao.memory import release_memory
from arc_ao.methods.gram import Gram
from arc_ao.methods.hessian import quantize_group
from arc_ao.methods.kronecker import factor_of, token_weights
from arc_ao.methods.weights import LayerPlan
from arc_ao.progress import SILENT, Progress
from arc_ao.tensor import ARCTensor


def convert_blocks(
    model: nn.Module,
    sessions: list[CalibrationSession],
    batches: list[Batch | Tensor],
    swap_weight: Callable[[nn.Linear, ARCTensor], None],
    *,
    work: WorkDir | None = None,
    progress: Progress = SILENT,
) -> dict[str, RoundingNote]:
    """Convert every linear inside the model's blocks; linears outside keep their plans.

    An interrupt leaves the linears it did not reach unquantized and without observers.

    Args:
        sessions: calibrated and planned.
        swap_weight: puts a quantized weight in its place.
        work: finished blocks to take over, and where to keep new ones.

    Returns:
        How each of them was rounded, by name. A warning says where the tokens were few for GPTQ.
    """
    owners = {m.module: session for session in sessions for m in session.members}
    groups = [group for session in sessions for group in session.groups()]

    def plan_of(member: Member) -> LayerPlan:
        return owners[member.module].plans[member.name]

    def fisher_of(member: Member) -> OutputFisher | None:
        found = owners[member.module].fisher
        return None if found is None else found[member.name]

    def convert(group: list[Member], gram: Gram | None) -> dict[str, RoundingNote]:
        weights, notes = [member.module.weight.detach() for member in group], {}
        plans, names = [plan_of(m) for m in group], [m.name for m in group]
        outputs = [factor_of(fisher_of(m), m.module) for m in group]
        rounded = quantize_group(weights, plans, names, gram, outputs)
        for member, result in zip(group, rounded, strict=True):
            finish(member, result.tensor)
            notes[member.name] = result.note
        return notes

    def finish(member: Member, tensor: ARCTensor) -> None:
        del owners[member.module].plans[member.name]
        if (fisher := fisher_of(member)) is not None:
            fisher.drop_products()
        detach(member.module)
        swap_weight(member.module, tensor.packed())
        release_memory()

    try:
        notes = quantize_sequentially(
            model,
            batches,
            groups,
            plan_of,
            convert,
            finish,
            token_weights=lambda group: token_weights([fisher_of(m) for m in group]),
            work=work,
            progress=progress,
        )
    except BaseException:
        for module in owners:
            detach(module)
        raise
    warn_of_few_tokens({name: n for name, n in notes.items() if n.damping is not None})
    return notes
