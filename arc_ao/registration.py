"""Make arc_ao known: its classes to torchao, and its quantization method to transformers.

transformers is not imported for it: the method is registered once transformers can load models,
before or after `import arc_ao`.
"""

from torchao.core.config import ALLOWED_AO_MODULES
from torchao.prototype.safetensors import safetensors_utils

from arc_ao import config_classes
from arc_ao.tensor import ARCTensor
from arc_ao.when_imported import when_imported


def register() -> None:
    """Add to the lists of both libraries; a second call changes nothing."""
    ALLOWED_AO_MODULES.add(config_classes.__name__)
    safetensors_utils.ALLOWED_CLASSES["ARCTensor"] = ARCTensor
    if "ARCTensor" not in safetensors_utils.ALLOWED_TENSORS_SUBCLASSES:
        safetensors_utils.ALLOWED_TENSORS_SUBCLASSES.append("ARCTensor")
    when_imported("transformers.modeling_utils", _register_method)


def _register_method() -> None:
    from arc_ao.integrations.quantizer import register_method

    register_method()


register()
