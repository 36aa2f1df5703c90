"""Linears that no calibration token reaches: left in 16 bit and listed; the rest is quantized."""

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import FqnToConfig
from torchao.quantization import quantize_ as torchao_quantize_

from arc_ao import ARCConfig, ARCTensor, NVFP4Config, quantize_

BALANCED = ARCConfig(recipe="balanced", budget=0.2)
IDLE = "layers.0.experts.2.0, layers.0.experts.2.2, layers.1.experts.2.0, layers.1.experts.2.2"
UNREACHED = {*IDLE.split(", "), "vision"}


class Experts(nn.Module):
    """Of three experts the last is never chosen; nothing reads images."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.proj = nn.Linear(32, 3), nn.Linear(32, 32)
        pair = lambda: nn.Sequential(nn.Linear(32, 48), nn.SiLU(), nn.Linear(48, 32))
        self.experts = nn.ModuleList(pair() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.proj(x)
        chosen = self.router(x)[..., :2].argmax(-1)
        return x + sum(
            torch.zeros_like(x).masked_scatter(mask, expert(x[mask[..., 0]]))
            for mask, expert in ((chosen[..., None] == i, e) for i, e in enumerate(self.experts))
        )


class Model(nn.Module):
    """Two layers of experts, and a linear for images that text does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.vision = nn.Embedding(64, 32), nn.Linear(32, 32)
        self.layers = nn.ModuleList(Experts() for _ in range(2))
        self.lm_head = nn.Linear(32, 64)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.vision(self.embed.weight[:1]) if ids.max() > 63 else self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def model() -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model().eval()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(64, (2, 16), generator=generator) for _ in range(4)]


def state(found: nn.Module) -> dict[str, Tensor]:
    """Bits of every tensor, quantized ones dequantized."""
    tensors = found.state_dict()
    return {n: t.dequantize() if isinstance(t, ARCTensor) else t for n, t in tensors.items()}


def quantized(config: ARCConfig, **kwargs) -> tuple[Model, dict]:
    found = model()
    with pytest.warns(UserWarning, match=f"^5 linears .*: vision, {IDLE} .no calibration token re"):
        summary = quantize_(found, config, calibration_data=batches(), progress=False, **kwargs)
    return found, summary


CONFIGS = {
    "auto": ARCConfig(),
    "best": ARCConfig(recipe="best"),
    "balanced": BALANCED,
}


@pytest.mark.filterwarnings("ignore:rounding='gptq'")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_idle_experts_stay_and_the_others_get_the_bits_that_they_get_alone(config):
    """The reference: the same call that never looks at the idle ones."""
    found, summary = quantized(config)
    assert {name for name in summary.skipped if "token" in summary.skipped[name]} == UNREACHED
    expected, wanted = model(), summary.layers.keys()
    quantize_(
        expected,
        config,
        calibration_data=batches(),
        filter_fn=lambda _, name: name in wanted | (summary.choices.keys() - UNREACHED),
        progress=False,
    )
    assert len(wanted) == 10
    kept = state(expected)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in state(found).items())


def test_a_config_that_needs_no_tokens_quantizes_them_as_before():
    found = model()
    summary = quantize_(found, NVFP4Config(), calibration_data=batches(), progress=False)
    assert len(summary.layers) == 15 and summary.layers.keys() > UNREACHED


@pytest.mark.filterwarnings("ignore:rounding='gptq'")
def test_a_resumed_run_leaves_the_same(tmp_path):
    config = ARCConfig(recipe="balanced", rounding="gptq", budget=0.2)
    first, _ = quantized(config, work_dir=tmp_path)
    again, _ = quantized(config, work_dir=tmp_path)
    kept = state(first)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in state(again).items())


@pytest.mark.filterwarnings("ignore:rounding='gptq'")
@pytest.mark.parametrize("convert", [quantize_, torchao_quantize_])
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_three_steps_leave_them_too(convert, rounding):
    found = model()
    config = ARCConfig(recipe="balanced", budget=0.2, rounding=rounding)
    chosen = lambda module, name: isinstance(module, nn.Linear) and module.out_features > 3
    quantize_(found, config.with_step("prepare"))
    for batch in batches():
        found(batch)
    with pytest.warns(UserWarning, match=f"^5 linears .*: vision, {IDLE} "):
        convert(found, config.with_step("convert"), filter_fn=chosen)
    assert sum(isinstance(m, nn.Linear) for m in found.modules()) == 18
    assert sum(isinstance(p, ARCTensor) for p in found.parameters()) == 10
    assert not any(hasattr(m, "arc_observer") or m._forward_pre_hooks for m in found.modules())


def test_a_convert_that_fails_can_be_repeated_with_data_for_all():
    """The linears that had none then are not forgotten."""
    found = model()
    quantize_(found, BALANCED.with_step("prepare"))
    found(batches()[0])
    weight = found.layers[0].proj.weight.data
    first = weight[0, 0].item()
    weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="proj: expected finite weights"):
        quantize_(found, BALANCED.with_step("convert"), progress=False)
    weight[0, 0] = first
    found.vision(torch.randn(4, 32))
    with pytest.warns(UserWarning, match=f"^4 linears .*: {IDLE} "):
        quantize_(found, BALANCED.with_step("convert"), progress=False)
    assert isinstance(found.vision.weight, ARCTensor)


def test_a_config_whose_linears_are_all_idle_does_not_stop_another():
    """One call and three steps; refused is what reaches nothing at all."""
    table = lambda step: FqnToConfig(
        {"vision": BALANCED.with_step(step), "re:.*proj": ARCConfig(recipe="balanced", step=step)}
    )
    for steps in ([None], ["prepare", "convert"]):
        found = model()
        for step in steps:
            data = {"calibration_data": batches()} if step is None else {}
            if step == "convert":
                found(batches()[0])
            quantize_(found, table(step), progress=False, **data)
        assert type(found.vision.weight) is nn.Parameter
        assert isinstance(found.layers[1].proj.weight, ARCTensor)
