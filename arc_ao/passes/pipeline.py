"""The passes in their order."""

from collections.abc import Callable

from torch._inductor import config
from torch.fx import Graph

from arc_ao.passes.fold_query_groups import fold_query_groups
from arc_ao.passes.fuse_gelu import fuse_gelu
from arc_ao.passes.fuse_rms_norm import fuse_rms_norm
from arc_ao.passes.fuse_silu_mul import fuse_silu_mul
from arc_ao.passes.lower_transforms import fold_input_scale, lower_transforms
from arc_ao.passes.share_quantize import share_quantize
from arc_ao.passes.use_native_attention import use_native_attention
from arc_ao.passes.use_native_linear import use_native_linear

# Sharing comes first: a norm is fused only where one quantization is all that reads it. Scales go
# into a norm before the norm is looked for.
PASSES: tuple[Callable[[Graph], int], ...] = (
    share_quantize,
    fold_input_scale,
    lower_transforms,
    fuse_rms_norm,
    fuse_silu_mul,
)
# Round differently in the last bits: not where Inductor is told to keep those of eager execution.
ROUNDING_PASSES: tuple[Callable[[Graph], int], ...] = (
    fuse_gelu,
    use_native_attention,
    use_native_linear,
    fold_query_groups,
)


def run_passes(graph: Graph) -> dict[str, int]:
    """Run every pass on a graph of aten and arc operators; how often each one applied."""
    passes = PASSES if config.emulate_precision_casts else PASSES + ROUNDING_PASSES
    applied = {rewrite.__name__: rewrite(graph) for rewrite in passes}
    if any(applied.values()):
        graph.eliminate_dead_code()
        graph.lint()
    return applied
