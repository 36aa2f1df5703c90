"""llmcompressor's NVFP4 (W4A4): run by run.py inside llmcompressor's environment.

Recipes, all on the package's scheme `NVFP4` and its defaults, calibrated by `oneshot` on the
caller's batches as they are:

    rtn        amax block scales, static outer scale of activations
    rtn-mse    as rtn, ranges of weight blocks by the observer `memoryless_mse`
    rtn-expanded-mse   the same by `nvfp4_expanded_mse`, which tries wider ranges, too
    gptq       GPTQModifier
    gptq-expanded-mse  the same, ranges by `nvfp4_expanded_mse`
    awq        AWQModifier, then as rtn
"""

from typing import Any

from compressed_tensors.quantization import preset_name_to_scheme
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from peer_io import NOT_QUANTIZED, Batches, nvfp4_cost, run
from torch import nn
from torch.utils.data import DataLoader

IGNORE = [f"re:.*{name}.*" for name in NOT_QUANTIZED]
PLAIN = {"scheme": "NVFP4", "targets": "Linear", "ignore": IGNORE}
OBSERVERS = {  # of weights, other than the preset's
    "rtn-mse": "memoryless_mse",
    "rtn-expanded-mse": "nvfp4_expanded_mse",
    "gptq-expanded-mse": "nvfp4_expanded_mse",
}
# BERT has no registered mapping. Its norms feed the residual stream, too, and GELU lies between the
# linears of its MLP: of AWQ's pairs only this one changes nothing before quantization.
BERT_MAPPINGS = [AWQMapping("re:.*self.value$", ["re:.*attention.output.dense$"])]
UNPINNED = "awq: copies into pinned memory left out, which fail where there is no accelerator"


def modifiers(recipe: str, kind: str) -> list[Any]:
    """The package's recipe; ValueError for an unknown name."""
    if recipe == "rtn":
        return [QuantizationModifier(**PLAIN)]
    if recipe in OBSERVERS:
        scheme = preset_name_to_scheme("NVFP4", ["Linear"])
        scheme.weights.observer = OBSERVERS[recipe]
        modifier = GPTQModifier if recipe.startswith("gptq") else QuantizationModifier
        return [modifier(config_groups={"group_0": scheme}, ignore=IGNORE)]
    if recipe == "gptq":
        return [GPTQModifier(**PLAIN)]
    if recipe == "awq":
        mappings = BERT_MAPPINGS if kind == "encoder" else None
        return [AWQModifier(mappings=mappings), QuantizationModifier(**PLAIN)]
    raise ValueError(
        f"llmcompressor: expected rtn, gptq, awq or one of {list(OBSERVERS)}, got {recipe!r}"
    )


def quantize(
    model: nn.Module, recipe: str, kind: str, calibration: Batches
) -> tuple[nn.Module, dict[str, Any]]:
    """Quantize in place; the model then computes as in NVFP4."""
    facts: dict[str, Any] = {}
    if recipe == "awq":
        IntermediatesCache.pin_memory = lambda self, *args, **kwargs: None
        facts["note"] = UNPINNED
    model = oneshot(
        model=model,
        dataset=DataLoader(calibration, batch_size=None),
        recipe=modifiers(recipe, kind),
        num_calibration_samples=len(calibration),
    )
    layers = [m for m in model.modules() if hasattr(m, "quantization_scheme")]
    return model, facts | nvfp4_cost(layers)


if __name__ == "__main__":
    run(quantize, "llmcompressor", "compressed-tensors")
