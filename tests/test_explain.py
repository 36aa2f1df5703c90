"""explain: counts, reasons and text of one compilation."""

import pytest
import torch
from tiny_models import VOCAB_SIZE, tiny_llama
from torch import nn

import arc_ao
from arc_ao.ops import native
from arc_ao.passes import backend

TOKENS = torch.randint(VOCAB_SIZE, (1, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def same_everywhere(monkeypatch):
    """Attention as on most machines."""
    monkeypatch.setattr(native, "pairs_are_fast", lambda: False)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    llama = tiny_llama().bfloat16()
    config = arc_ao.ARCConfig(recipe="balanced", budget=0.2)
    arc_ao.quantize_(llama, config, calibration_data=[TOKENS], progress=False)
    return llama.requires_grad_(False)


def test_a_decoder_in_figures(model):
    before = torch._inductor.config.post_grad_custom_pre_pass
    found = arc_ao.explain(model, TOKENS, use_cache=False)
    assert (found.linears, found.quantizations, found.fused, found.graphs) == (14, 8, 6, 1)
    assert found.operators["nvfp4_gemm"] == 14 and not found.graph_breaks
    assert found.passes == {"share_quantize": 6, "fuse_rms_norm": 4, "fuse_silu_mul": 2}
    assert list(found.skipped) == ["lm_head"]
    assert "arc.add_rms_norm_quant_augment.default" in found.text
    for line in ("14 linears quantized, 1 left alone", "8 quantizations of inputs, 6 fused"):
        assert line in str(found)
    assert torch._inductor.config.post_grad_custom_pre_pass is before


def test_the_flow_of_data_is_drawn(model, tmp_path):
    """Query, key and value follow one quantization, and attention follows them."""
    found = arc_ao.explain(model, TOKENS, use_cache=False)
    labels = {name: data["label"].split("\n") for name, data in found.flow.nodes(data=True)}
    first = next(name for name, label in labels.items() if label[0] == "rms_norm_quant_augment")
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert labels[first][1] == f"[24, {(64 + weight.extra_channels) // 2}]"
    assert [labels[name][0] for name in found.flow.successors(first)] == ["nvfp4_gemm"] * 3
    [attention] = [n for n, label in labels.items() if "scaled_dot" in label[0]][:1]
    assert found.flow.in_degree(attention) == 3
    found.save_svg(tmp_path / "flow.svg")
    text = (tmp_path / "flow.svg").read_text()
    assert text.startswith("<?xml") and text.count("nvfp4_gemm") >= 14


def test_graph_breaks_are_told():
    class Broken(nn.Module):
        def __init__(self, linear: nn.Module) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.linear(x)
            torch._dynamo.graph_break()
            return self.linear(x)

    linear = nn.Sequential(nn.Linear(32, 32)).bfloat16().requires_grad_(False)
    arc_ao.quantize_(linear, arc_ao.ARCConfig(budget=0.0, recipe="plain"), progress=False)
    found = arc_ao.explain(Broken(linear), torch.zeros(2, 32, dtype=torch.bfloat16))
    assert found.graphs == 2 and sum(found.graph_breaks.values()) >= 1
    assert "graph break" in str(found)


def test_while_our_passes_are_enabled_they_run_once(model):
    arc_ao.enable_inductor_passes()
    try:
        found = arc_ao.explain(model, TOKENS, use_cache=False)
        assert torch._inductor.config.post_grad_custom_pre_pass is backend.ARC_PASS
    finally:
        arc_ao.disable_inductor_passes()
    assert found.passes["share_quantize"] == 6
