"""PEFT on quantized models, and quantization of models with adapters."""

import copy

import pytest
import torch
from test_gradients import TOKENS, cosine, dequantized, losses
from test_tensor import assert_same
from tiny_models import byte_tokenizer, tiny_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import arc_ao
from arc_ao import ARCConfig, ARCTensor, quantize_
from arc_ao.requantize import requantize

RECIPES = {
    "both residuals": {},
    "sorted, static": {"channel_order": "amax", "activation_scale": "static"},
    "channels": {"granularity": "channel"},
    "smoothed, branch": {"smooth": "search", "rank": 8},
    "rotated": {"rotation": 16},
    "weights alone": {"activation": "bf16"},
}
TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")


def quantized(**options) -> nn.Module:
    model = tiny_llama()
    config = ARCConfig(recipe="balanced", budget=0.3, **options)
    quantize_(model, config, calibration_data=[TOKENS], progress=False)
    return model


def adapted(model: nn.Module, lora_alpha: int = 16, **options) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    shape = {"r": 8, "lora_alpha": lora_alpha, "target_modules": list(TARGETS)}
    config = peft.LoraConfig(**shape, **options)
    return peft.get_peft_model(model, config)


def weights(model: nn.Module) -> dict[str, ARCTensor]:
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and isinstance(module.weight, ARCTensor)
    }


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


@pytest.mark.parametrize("options", RECIPES.values(), ids=RECIPES)
def test_a_weight_that_was_not_changed_is_requantized_to_itself(options):
    """The same blocks, order, input transform and branch, and the same values but where a block
    has a residual, which is rounded anew."""
    for weight in weights(quantized(**options)).values():
        again = requantize(weight.dequantize(torch.float32))
        assert again.input_plan == weight.input_plan and again.weight_layout == weight.weight_layout
        values, expected = (t.dequantize(torch.float32) for t in (again, weight))
        if weight.num_weight_channels:
            assert (values - expected).norm() < 0.01 * expected.norm()
        else:
            torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-6)


def test_requantizing_rounds_a_change_as_plain_nvfp4_would_and_refuses_strangers():
    weight = weights(quantized())["model.layers.0.mlp.up_proj"]
    changed = weight.dequantize(torch.float32)
    changed += 0.1 * torch.randn(changed.shape, generator=torch.Generator().manual_seed(1))
    error = (requantize(changed).dequantize() - changed).norm() / changed.norm()
    assert 0 < error < 0.11  # of normal values in NVFP4: about 0.095
    with pytest.raises(ValueError, match="expected a tensor that ARCTensor.dequantize"):
        requantize(changed.clone())


def test_lora_by_peft_trains_as_on_the_dequantized_model():
    model = quantized()
    ours = losses(adapted(copy.deepcopy(model)), TOKENS, 50)
    theirs = losses(adapted(dequantized(model)), TOKENS, 50)
    print(f"loss {ours[0]:.4f} -> {ours[-1]:.4f}, dequantized {theirs[0]:.4f} -> {theirs[-1]:.4f}")
    assert theirs[-1] < theirs[0] - 1 and abs(ours[-1] - theirs[-1]) < 0.01 * theirs[-1]


@pytest.mark.parametrize("options", RECIPES.values(), ids=RECIPES)
def test_merge_and_unload_merges_and_quantizes_alike(options):
    """The merged weight is the nearest in the same layout to W + s B A."""
    model = quantized(**options)
    before = {name: copy.deepcopy(weight) for name, weight in weights(model).items()}
    peft_model = adapted(model, lora_alpha=2, init_lora_weights=False)
    deltas = {
        name: peft_model.base_model.model.get_submodule(name).get_delta_weight("default")
        for name in before
        if name.endswith(TARGETS)
    }
    expected = logits(peft_model)
    merged = peft_model.merge_and_unload(safe_merge=True)
    assert merged is model and weights(merged).keys() == before.keys()
    for name, weight in weights(merged).items():
        values = before[name].dequantize()
        if name in deltas:
            values += deltas[name]
            assert_same(weight.data, requantize(values))
        else:
            assert_same(weight.data, before[name])
    assert cosine(logits(merged), expected) > 0.95


def test_a_merged_model_is_saved_and_loaded(tmp_path):
    merged = adapted(quantized(), init_lora_weights=False).merge_and_unload()
    arc_ao.save_pretrained(merged, tmp_path / "merged", byte_tokenizer())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert torch.equal(logits(loaded), logits(merged))


@pytest.mark.parametrize("activation", ["nvfp4", "bf16"])
def test_a_loaded_model_takes_adapters_and_a_trainer(tmp_path, activation):
    trainer_utils = pytest.importorskip("transformers.trainer_utils")
    arc_ao.save_pretrained(quantized(activation=activation), tmp_path / "saved", byte_tokenizer())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert not any(weight.requires_grad for weight in weights(model).values())
    peft_model = adapted(model)
    trainer_utils.validate_quantization_for_training(peft_model)
    found = losses(peft_model, TOKENS, 10)
    assert found[-1] < found[0] - 0.1
    peft_model.merge_and_unload()


@pytest.mark.parametrize("recipe", ["balanced", "best"])
def test_adapters_are_not_quantized(recipe):
    """Nor the trained copies of modules; they are listed. Merging them then is refused by name."""
    model = adapted(tiny_llama(), modules_to_save=["lm_head"])
    plain = {n for n, m in tiny_llama().named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    config = ARCConfig(recipe=recipe, damping=0.1, activation_block_scale="amax")
    summary = quantize_(model, config, calibration_data=[TOKENS], progress=False)
    names = {name.removeprefix("base_model.model.") for name in summary.layers}
    assert {name.removesuffix(".base_layer") for name in names} == plain
    adapters = [name for name, reason in summary.skipped.items() if "an adapter" in reason]
    assert len([n for n in adapters if "lora_" in n]) == 2 * 2 * len(TARGETS)
    assert "base_model.model.lm_head.modules_to_save.default" in adapters
    losses(model, TOKENS, 1)
    with pytest.raises(ValueError, match="add_.*merge adapters before a model is quantized"):
        model.merge_and_unload()


def test_lora_by_hand_is_not_quantized():
    """By its usual names, whatever a filter says."""
    model = nn.Module()
    model.base, model.lora_A, model.lora_B = nn.Linear(64, 64), nn.Linear(64, 16), nn.Linear(16, 64)
    options = {"filter_fn": lambda module, name: True, "progress": False}
    summary = quantize_(model, arc_ao.NVFP4Config(), **options)
    assert list(summary.layers) == ["base"] and set(summary.skipped) == {"lora_A", "lora_B"}


def test_other_adapters_read_the_weight():
    """DoRA's norm of the merged weight, and layers kept in 16 bits by PEFT's preparation."""
    peft = pytest.importorskip("peft")
    model = peft.prepare_model_for_kbit_training(quantized())
    weight = weights(model)["model.layers.0.mlp.up_proj"]
    assert weight.dtype == weight.orig_dtype == torch.float32
    found = losses(adapted(model, use_dora=True), TOKENS, 10)
    assert found[-1] < found[0] - 0.1
