"""Graph passes around the operators `arc::*`, and the "arc" backend of torch.compile."""

from arc_ao.passes.backend import arc, disable_inductor_passes, enable_inductor_passes
from arc_ao.passes.pipeline import PASSES, run_passes

__all__ = ["PASSES", "arc", "disable_inductor_passes", "enable_inductor_passes", "run_passes"]
