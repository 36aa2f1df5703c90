"""arc_ao: NVFP4 (W4A4) quantization for PyTorch with augmented residual channels."""

import importlib
from typing import Any

import arc_ao.quiet_import  # noqa: F401, I001  (before anything imports torchao)
import arc_ao.registration  # noqa: F401  (makes itself known to torchao and transformers)
import arc_ao.tensor_ops  # noqa: F401  (registers them)
import arc_ao.tensor_reads  # noqa: F401  (likewise)
from arc_ao.calibration.data import calibrate
from arc_ao.config import ARCConfig
from arc_ao.config_budget import BudgetConfig
from arc_ao.config_family import ARHQConfig, NVFP4Config, SERQConfig, SVDQuantConfig
from arc_ao.env import env_report
from arc_ao.eval.report import layer_report as report
from arc_ao.loading import pack_weights_
from arc_ao.passes import disable_inductor_passes, enable_inductor_passes
from arc_ao.passes.export.package import export_package, library_path
from arc_ao.passes.export.quantizer import convert_arc, prepare_arc
from arc_ao.quantize import quantize_
from arc_ao.summary import QuantizationSummary
from arc_ao.tensor import ARCTensor

__all__ = [
    "ARCConfig",
    "ARCTensor",
    "ARHQConfig",
    "BudgetConfig",
    "NVFP4Config",
    "QuantizationSummary",
    "SERQConfig",
    "SVDQuantConfig",
    "add_residuals_",
    "calibrate",
    "convert_arc",
    "disable_inductor_passes",
    "enable_inductor_passes",
    "env_report",
    "explain",
    "export_checkpoint",
    "export_package",
    "import_checkpoint",
    "library_path",
    "pack_weights_",
    "prepare_arc",
    "quantize_",
    "report",
    "save_pretrained",
]

# What needs transformers or networkx is imported with its first use.
_LATER = {
    "add_residuals_": "arc_ao.checkpoints.add_residuals",
    "explain": "arc_ao.inspect.explain",
    "export_checkpoint": "arc_ao.checkpoints.export",
    "import_checkpoint": "arc_ao.checkpoints.read",
    "save_pretrained": "arc_ao.integrations.huggingface",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
