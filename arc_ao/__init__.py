"""arc_ao: NVFP4 (W4A4) quantization for PyTorch with augmented residual channels."""

from torchao.core.config import ALLOWED_AO_MODULES

from arc_ao.config import ARCConfig
from arc_ao.quantize import quantize_
from arc_ao.summary import QuantizationSummary
from arc_ao.tensor import ARCTensor

__all__ = ["ARCConfig", "ARCTensor", "QuantizationSummary", "quantize_"]

ALLOWED_AO_MODULES.add(__name__)  # torchao's config_from_dict finds ARCConfig here
