"""Adapters in a model: they train, so they stay as they are; so do modules that they replace."""

from torch import nn

# Children that hold adapters, or a module and its trained copies: PEFT's, torchtune's, Diffusers'.
ADAPTER_NAMES = (
    "lora_A",
    "lora_B",
    "lora_a",
    "lora_b",
    "lora_down",
    "lora_up",
    "modules_to_save",
    "original_module",
)


def adapter_modules(model: nn.Module) -> set[nn.Module]:
    """Every module of an adapter: by its usual name, or by those that a PEFT layer lists."""
    found: set[nn.Module] = set()
    for module in model.modules():
        for name in (*ADAPTER_NAMES, *getattr(module, "adapter_layer_names", ())):
            child = getattr(module, name, None)
            if isinstance(child, nn.Module):
                found.update(child.modules())
    return found
