"""Linears that are more than F.linear of a weight of their own stay as they are, and are listed."""

import warnings

import pytest
import torch
from tiny_models import tiny_llama
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from transformers import (
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)
from transformers.models.falcon.modeling_falcon import FalconLinear

from arc_ao import ARCConfig, ARCTensor, NVFP4Config, quantize_
from arc_ao.flow.trial_run import _WeightReads

BALANCED = ARCConfig(recipe="balanced", budget=0.2)
SIZES = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2}


def token_batches(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(64, (2, 16), generator=generator) for _ in range(count)]


def built(make) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def falcon() -> PreTrainedModel:
    return FalconForCausalLM(FalconConfig(num_attention_heads=4, **SIZES))


def deepseek_v4() -> PreTrainedModel:
    config = DeepseekV4Config(
        moe_intermediate_size=32,
        num_attention_heads=4,
        head_dim=32,
        q_lora_rank=32,
        o_lora_rank=32,
        o_groups=2,
        num_experts_per_tok=2,
        n_routed_experts=4,
        index_n_heads=2,
        index_head_dim=16,
        **SIZES,
    )
    return DeepseekV4ForCausalLM(config)


def mamba() -> PreTrainedModel:
    return MambaForCausalLM(MambaConfig(state_size=16, time_step_rank=16, **SIZES))


def test_a_model_of_own_forwards_alone_is_refused():
    with pytest.raises(ValueError, match=r"h\.0\.mlp.*5 more \(FalconLinear has a forward of its"):
        quantize_(built(falcon), BALANCED, calibration_data=token_batches(), progress=False)


@pytest.mark.parametrize("recipe", ["auto", "balanced", "plain"])
@pytest.mark.parametrize(
    "make, left, reason",
    [
        (deepseek_v4, "model.layers.{}.self_attn.o_a_proj", "has a forward of its own"),
        (mamba, "backbone.layers.{}.mixer.dt_proj", "is read by torch.Tensor.*matmul"),
    ],
)
def test_weights_that_others_read_are_left_and_the_model_runs(make, left, reason, recipe):
    """Without calibration data, too: a text model runs on a few made-up tokens."""
    model = built(make)
    data = None if recipe == "plain" else token_batches()
    config = NVFP4Config() if recipe == "plain" else ARCConfig(recipe=recipe)
    names = [left.format(layer) for layer in range(2)]
    listed = rf"^2 linears stay unquantized: {names[0]}, {names[1]} \(.*{reason}"
    with pytest.warns(UserWarning, match=listed):
        summary = quantize_(model, config, calibration_data=data, progress=False)
    assert all(type(model.get_submodule(name).weight) is nn.Parameter for name in names)
    assert set(names) <= summary.skipped.keys() and summary.layers
    assert torch.isfinite(model(token_batches()[0]).logits).all()


class Elsewhere(nn.Module):
    """Linears whose weight is read by other functions, in other ways, or for its dtype alone."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.transposed, self.joined = (nn.Linear(32, 32) for _ in range(3))
        self.direct, self.functional, self.own = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(x.to(self.plain.weight.dtype)) + self.direct.forward(x)
        x = self.transposed(x) @ self.transposed.weight.T
        x = self.joined(x) + x @ torch.cat([self.joined.weight, self.plain.bias[None]])[:32]
        return self.own(x) + nn.functional.linear(input=x, weight=self.functional.weight)


def test_every_way_to_read_a_weight_is_seen():
    model, data = built(Elsewhere), [torch.randn(4, 32)]
    before = model(data[0])
    with pytest.warns(UserWarning, match="^4 linears stay unquantized"):
        summary = quantize_(model, BALANCED, calibration_data=data, progress=False)
    assert summary.layers.keys() == {"plain", "own"}
    reasons = {name: reason.split()[5] for name, reason in summary.skipped.items()}
    assert reasons == {
        "transposed": "torch.Tensor.T.__get__,",
        "joined": "torch.cat,",
        "direct": "F.linear",
        "functional": "F.linear",
    }
    assert 0 < (model(data[0]) - before).norm() < 0.5 * before.norm()


def test_the_look_at_a_model_leaves_it_as_it_was():
    """Modes, hooks and bits; and a failing forward, too."""
    model = built(lambda: tiny_llama(num_hidden_layers=1)).train()
    model.model.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    handle = model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantize_(model, BALANCED, calibration_data=token_batches(), progress=False)
    handle.remove()
    assert model.training and not model.model.training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class Decaying(nn.Module):
    """A model that changes a weight in place whenever it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        self.inner.weight.mul_(0.5)
        return self.inner(x)


def test_a_quantized_model_that_does_not_run_is_an_error(monkeypatch):
    """Where the look before missed a use of a weight, the run afterwards finds it."""
    monkeypatch.setattr(_WeightReads, "others", lambda self: {})
    with pytest.raises(RuntimeError, match="expected the quantized Decaying to run as it did"):
        quantize_(built(Decaying), NVFP4Config(), calibration_data=[torch.randn(4, 32)])


def test_a_text_model_that_does_not_take_made_up_tokens_is_not_tried():
    model = tiny_llama(num_hidden_layers=1, vocab_size=4)  # the made-up ids go up to 7
    with pytest.warns(UserWarning, match="LlamaForCausalLM is not tried out: .*input_ids"):
        summary = quantize_(model, NVFP4Config(), progress=False)
    assert len(summary.layers) == 7


def test_direct_calls_of_torchao_leave_them_too():
    from torchao.quantization import quantize_ as torchao_quantize_

    model = nn.Sequential(nn.Linear(32, 32), FalconLinear(32, 32))
    with pytest.warns(UserWarning, match=r"Linear\(32, 32\) stays unquantized because FalconLin"):
        torchao_quantize_(model, NVFP4Config())
    assert isinstance(model[0].weight, ARCTensor) and type(model[1].weight) is nn.Parameter


PARAMETRIZED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruning": lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
    "old weight_norm": torch.nn.utils.weight_norm,
    "old spectral_norm": torch.nn.utils.spectral_norm,
}


@pytest.mark.parametrize("kind", PARAMETRIZED)
@pytest.mark.parametrize("config", [NVFP4Config(), BALANCED])
def test_weights_that_are_computed_are_left(kind, config):
    """And give the same bits as before."""
    model = built(lambda: nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the older functions say that they are old
        PARAMETRIZED[kind](model[1])
    x = torch.randn(8, 32)
    expected = model[1](x)
    with pytest.warns(UserWarning, match=r"^1 linears .*: 1 \(its weight is computed when it runs"):
        summary = quantize_(model, config, calibration_data=[x], progress=False)
    assert summary.layers.keys() == {"0", "2"}
    assert torch.equal(model[1](x), expected)


def test_a_permanent_pruning_is_quantized():
    model = nn.Sequential(nn.Linear(32, 32))
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.remove(model[0], "weight")
    assert quantize_(model, NVFP4Config(), progress=False).layers.keys() == {"0"}


def test_a_lazy_linear_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^0: expected a weight with data.* \(LazyLinear\)"):
        quantize_(nn.Sequential(nn.LazyLinear(32)), NVFP4Config())


def test_attention_that_reads_a_weight_without_calling_its_linear_is_listed():
    layer = built(lambda: nn.TransformerEncoderLayer(32, 2, 64, batch_first=True))
    with pytest.warns(UserWarning, match=r"self_attn.out_proj \(nn.MultiheadAttention reads"):
        summary = quantize_(layer, BALANCED, calibration_data=[torch.randn(2, 8, 32)])
    assert summary.layers.keys() == {"linear1", "linear2"}
