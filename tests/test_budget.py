"""BudgetConfig: bounds hold exactly, choices follow the errors, every flow takes a mixed model."""

import pytest
import torch
from test_fisher import Branches
from test_quantize import assert_same_tensors, same_logits
from test_refusals import refused
from tiny_models import VOCAB_SIZE, Logits, tiny_llama
from torch import nn
from torchao.quantization import FqnToConfig
from transformers import AutoModelForCausalLM

import arc_ao
from arc_ao import ARCConfig, ARCTensor, BudgetConfig, prepare_arc, quantize_
from arc_ao.cost import extra_cost
from arc_ao.summary import EXCLUDED, arc_tensors

TOKENS = torch.randint(VOCAB_SIZE, (4, 32), generator=torch.Generator().manual_seed(0))
BATCHES = [TOKENS[:2], TOKENS[2:]]
DOWN = "model.layers.0.mlp.down_proj"


def llama() -> nn.Module:
    """A tiny Llama with outlier channels in front of attention, and a loud last projection."""
    model = tiny_llama(num_hidden_layers=1)
    model.model.layers[0].input_layernorm.weight.data[[3, 37]] = 20.0
    model.model.layers[0].mlp.down_proj.weight.data *= 10
    return model


def mixed(**settings) -> tuple[nn.Module, arc_ao.QuantizationSummary]:
    model = llama()
    config = BudgetConfig(**settings)
    return model, quantize_(model, config, calibration_data=BATCHES, progress=False)


@pytest.mark.parametrize(
    "settings",
    [
        {"extra_bits": 0.0, "budget": 0.05, "methods": ["residual"]},
        {"extra_bits": 2.0, "budget": 0.2, "methods": ["residual", "rank"]},
        {"extra_bits": 7.0, "budget": 0.1, "methods": ["smooth", "exclude"]},
        {"extra_bits": 1.0, "budget": 0.2, "methods": ["residual"], "rounding": "gptq"},
        {"extra_bits": 1.0, "budget": 0.2, "methods": [], "activation_scale": "static"},
    ],
)
def test_bounds_hold_exactly_and_the_summary_tells_all(settings):
    """Bits and multiply-adds are those of the tensors that came out, and what was planned."""
    model, summary = mixed(**settings)
    weights = sum(m.weight.numel() for n, m in model.named_modules() if n in summary.choices)
    tensors = arc_tensors(model)
    overhead = 7 * 64 / weights  # outer scales of a static plan, which plain NVFP4 has, too
    assert summary.extra_bits <= settings["extra_bits"] + overhead
    assert summary.extra_multiply_adds <= settings["budget"]
    assert len(summary.choices) == 7
    for name, choice in summary.choices.items():
        if choice["choice"] == "exclude":
            assert name not in tensors and summary.skipped[name] == EXCLUDED
            continue
        assert tensors[name].num_act_channels == 16 * choice["act_blocks"]
        assert tensors[name].num_weight_channels == 16 * choice["weight_blocks"]
        assert tensors[name].rank == choice["rank"]
    planned = sum(
        c["bits_per_weight"] * model.get_submodule(n).weight.numel()
        for n, c in summary.choices.items()
    )
    assert abs(planned / weights - 4.5 - summary.extra_bits) < 1e-9
    adds = sum(
        c["extra_multiply_adds"] * model.get_submodule(n).weight.numel()
        for n, c in summary.choices.items()
    )
    assert abs(adds / weights - summary.extra_multiply_adds) < 1e-9


def test_a_layer_that_dominates_is_excluded():
    """Two layers alike, one of which is heard a hundred times as loud; bits for one in fp32."""
    model = Branches(gain=100.0)
    data = [torch.randn(64, 64, generator=torch.Generator().manual_seed(1))]
    config = BudgetConfig(extra_bits=14.0, budget=0.0)  # (32 - 4.5) / 2 and a little
    summary = quantize_(model, config, calibration_data=data, progress=False)
    assert summary.choices["second"]["choice"] == "exclude"
    assert summary.choices["first"]["choice"] != "exclude"
    assert type(model.second.weight) is nn.Parameter and isinstance(model.first.weight, ARCTensor)


def test_the_best_measured_wins_and_every_mix_is_reported():
    """Trials come by rising divergence, uniform choices among them; the config is a budget."""
    _, summary = mixed(extra_bits=1.0, budget=0.2, methods=["residual"])
    trials = summary.trials[0]
    assert [t["divergence"] for t in trials] == sorted(t["divergence"] for t in trials)
    names = [t["mix"] for t in trials]
    assert any(name.startswith("uniform") for name in names) and "mix" in names
    assert summary.configs[0]["_type"] == "BudgetConfig"


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_mixed_models_load_compile_and_export(rounding, tmp_path):
    """An excluded linear, residuals, branches: bit-equal after loading, compiled, exported."""
    methods = ["residual", "exclude"]
    model, summary = mixed(extra_bits=10.0, budget=0.5, rounding=rounding, methods=methods)
    assert {"exclude"} < {choice["choice"] for choice in summary.choices.values()}
    arc_ao.save_pretrained(model, tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert_same_tensors(model, loaded)
    assert same_logits(model, loaded)
    expected = Logits(model)(TOKENS)
    if rounding == "nearest":  # compiling takes a while, and rounding makes no difference to it
        compiled = torch.compile(Logits(model), backend="arc", fullgraph=True)(TOKENS)
        torch.testing.assert_close(compiled, expected)
    exported = torch.export.export(Logits(model), (TOKENS,)).module()(TOKENS)
    assert torch.equal(exported, expected)


@pytest.mark.parametrize("scale", ["token", "static"])
def test_padding_and_outer_scales_are_in_the_plan(scale):
    """in_features that fill no blocks: planned bits and multiply-adds are those that come out."""
    module = nn.Sequential(nn.Linear(40, 48), nn.ReLU(), nn.Linear(48, 24))
    data = [torch.randn(64, 40, generator=torch.Generator().manual_seed(0))]
    config = BudgetConfig(extra_bits=6.0, budget=0.6, pad_in_features=True, activation_scale=scale)
    summary = quantize_(module, config, calibration_data=data, progress=False)
    sizes = {"0": 40 * 48, "2": 48 * 24}
    for key, found in (
        ("bits_per_weight", 4.5 + summary.extra_bits),
        ("extra_multiply_adds", summary.extra_multiply_adds),
    ):
        planned = sum(choice[key] * sizes[name] for name, choice in summary.choices.items())
        assert abs(planned / sum(sizes.values()) - found) < 1e-9


def test_interrupted_work_is_taken_over(tmp_path):
    """The same call on the folder of a finished one gives the same bits, excluded layers too."""
    config = BudgetConfig(
        extra_bits=10.0, budget=0.3, rounding="gptq", methods=["residual", "exclude"]
    )
    models = [llama(), llama()]
    for model in models:
        quantize_(
            model, config, calibration_data=BATCHES, progress=False, work_dir=tmp_path / "work"
        )
    assert_same_tensors(*models)


def test_a_budget_for_some_layers():
    """FqnToConfig: the bounds are those of the layers that the config is for."""
    model = llama()
    some = BudgetConfig(extra_bits=1.0, budget=0.1, methods=["residual"])
    table = FqnToConfig({"re:.*mlp.*": some, "_default": ARCConfig(recipe="plain", budget=0.0)})
    summary = quantize_(model, table, calibration_data=BATCHES, progress=False)
    assert {name.split(".")[3] for name in summary.choices} == {"mlp"}
    tensors = [t for name, t in arc_tensors(model).items() if "mlp" in name]
    assert extra_cost(tensors).multiply_adds <= 0.1 < extra_cost(tensors).bits_per_weight <= 1.0


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"extra_bits": -1}, "extra_bits is bits per weight"),
        ({"methods": ("rotation",)}, "methods: expected some of"),
        ({"rank": 16}, "rank is chosen for each layer"),
        ({"num_act_channels": 16}, "num_act_channels is chosen"),
        ({"activation": "bf16"}, "activation: expected 'nvfp4'"),
        ({"granularity": "channel"}, "granularity: expected 'block'"),
        ({"recipe": "paper"}, "recipe='balanced' or 'best'"),
    ],
)
def test_what_the_search_settles_is_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        BudgetConfig(**settings)


def test_flows_that_cannot_compare_mixes_refuse():
    """Three steps, the graph flow, and one call without data."""
    refused(
        tiny_llama(num_hidden_layers=1), BudgetConfig(step="prepare"), match="same for all layers"
    )
    refused(tiny_llama(num_hidden_layers=1), BudgetConfig(), match="expected calibration_data")
    program = torch.export.export(nn.Linear(64, 64), (torch.randn(2, 64),))
    with pytest.raises(ValueError, match="found BudgetConfig"):
        prepare_arc(program, BudgetConfig())
