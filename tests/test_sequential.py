"""Block by block: what each linear was rounded on, which blocks are found, what is freed."""

import dataclasses
import gc
import weakref

import pytest
import torch
from test_quantize import assert_same_tensors, batches
from tiny_models import tiny_llama
from torch import Tensor, nn
from transformers import BertConfig, BertModel, Gemma3ForCausalLM, Gemma3TextConfig

from arc_ao import ARCConfig, quantize_
from arc_ao.calibration.data import calibrate
from arc_ao.calibration.session import observer_on
from arc_ao.flow import sequential
from arc_ao.methods.gram import Gram
from arc_ao.methods.hessian import quantize_group
from arc_ao.methods.plan import analyse_session, make_plans
from arc_ao.summary import arc_tensors

GPTQ = {"recipe": "balanced", "rounding": "gptq", "budget": 0.2}


def quantized(model: nn.Module, config: ARCConfig, data=None) -> nn.Module:
    quantize_(model, config, calibration_data=data or batches(), progress=False)
    return model


def plans_of(model: nn.Module, config: ARCConfig, data: list) -> dict:
    """Plans of the ordinary calibration, which sequential quantization takes over."""
    nearest = dataclasses.replace(config, rounding="nearest")
    quantize_(model, nearest.with_step("prepare"))
    calibrate(model, data, progress=False)
    linears = [m for m in model.modules() if observer_on(m) is not None]
    session, resolved = observer_on(linears[0]).session, config.resolve()
    return make_plans(analyse_session(session, resolved), resolved)


def inputs_of(model: nn.Module, name: str, data: list[Tensor]) -> list[Tensor]:
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for batch in data:
        model(batch)
    hook.remove()
    return seen


@pytest.mark.parametrize("settings", [{}, {"granularity": "channel"}, {"channel_order": "amax"}])
def test_every_linear_is_rounded_on_what_the_quantized_model_feeds_it(settings):
    """The finished model's own inputs reproduce each weight, bit for bit."""
    config = ARCConfig(**GPTQ | settings)
    original, plans = tiny_llama(), plans_of(tiny_llama(), config, batches())
    model = quantized(tiny_llama(), config)
    assert len(arc_tensors(model)) == 14
    for name, tensor in arc_tensors(model).items():
        plan, gram = plans[name], Gram(plans[name])
        for x in inputs_of(model, name, batches()):
            gram.add(x)
        weight = original.get_submodule(name).weight.detach()
        expected = next(quantize_group([weight], [plan], [name], gram)).tensor
        found = tensor.to_layout("plain")
        assert torch.equal(found.qdata, expected.qdata), name
        assert torch.equal(found.scale, expected.scale), name


def test_twice_gives_the_same_bits():
    """The search again, and its resolved config without a search."""
    config = ARCConfig(recipe="best", budget=0.2, granularity="block")
    model, again = tiny_llama(), tiny_llama()
    summary = quantize_(model, config, calibration_data=batches(), progress=False)
    resolved = ARCConfig(**summary.configs[0]["_data"])
    assert resolved.searched == [] and resolved.rounding == "gptq"
    assert_same_tensors(model, quantized(again, config))
    assert_same_tensors(model, quantized(tiny_llama(), resolved))


def test_gptq_changes_codes_and_nothing_else():
    """Residual blocks, order and size are those of rounding to nearest."""
    data = batches(48)  # 12 tokens for each channel of the widest input
    gptq = quantized(tiny_llama(), ARCConfig(**GPTQ), data)
    nearest = quantized(tiny_llama(), ARCConfig(**GPTQ | {"rounding": "nearest"}), data)
    for name, tensor in arc_tensors(gptq).items():
        other = arc_tensors(nearest)[name]
        assert tensor.input_plan == other.input_plan and tensor.shape == other.shape
        assert torch.equal(tensor.outer_scale, other.outer_scale)
        assert not torch.equal(tensor.qdata, other.qdata), name


class Experts(nn.Module):
    """A layer whose own list of experts holds more linears than the outer list has layers."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 32)) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        return sum(expert(x) for expert in self.experts)


class Chain(nn.Module):
    """Layers in a chain; with `skip`, each also reads the input of the one before."""

    def __init__(self, skip: bool = False) -> None:
        super().__init__()
        self.inlet, self.layers = nn.Linear(16, 32), nn.ModuleList(Experts() for _ in range(3))
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inlet(x)
        for layer in self.layers:
            hidden = layer(hidden) + hidden if self.skip else layer(hidden)
        return hidden


def linears_of(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def test_the_chain_is_the_outermost_list_with_most_linears():
    model = Chain()
    assert sequential.find_blocks(model, linears_of(model)) == list(model.layers)
    llama = tiny_llama()
    assert sequential.find_blocks(llama, linears_of(llama)) == list(llama.model.layers)
    only = [model.layers[1].experts[0][0]]
    assert sequential.find_blocks(model, only) == list(model.layers)
    plain = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    assert sequential.find_blocks(plain, linears_of(plain)) == []


@pytest.mark.parametrize("skip", [False, True])
def test_what_does_not_chain_is_run_as_a_whole(monkeypatch, skip):
    """Blocks that read more than the last output cannot be run alone; all linears are converted,
    those outside the chain too."""
    ran = []
    monkeypatch.setattr(
        sequential, "run_model", lambda *a, f=sequential.run_model: ran.append(1) or f(*a)
    )
    torch.manual_seed(0)
    model, data = Chain(skip), [torch.randn(8, 16), torch.randn(8, 16)]
    quantized(model, ARCConfig(**GPTQ), data)
    assert len(arc_tensors(model)) == 16
    # Two runs record; as a whole, the model then runs for every input on every batch.
    assert len(ran) == (2 + 2 * 4 if skip else 2)


def bert() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return BertModel(BertConfig(vocab_size=257, num_attention_heads=2, **sizes), False).eval()


def gemma() -> nn.Module:
    """Local and global attention: blocks with masks and position embeddings of their own."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "head_dim": 16}
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 4}
    config = Gemma3TextConfig(vocab_size=257, layer_types=types, **sizes, **heads)
    return Gemma3ForCausalLM(config).eval()


@pytest.mark.parametrize("build", [bert, gemma])
def test_other_architectures_run_block_by_block(build):
    """Blocks run alone give what the whole model gives: else the codes would differ."""
    torch.manual_seed(0)
    model = build()
    data = [{"input_ids": b, "attention_mask": torch.ones_like(b)} for b in batches()]
    whole = build()
    whole.load_state_dict(model.state_dict())
    quantized(model, ARCConfig(**GPTQ), data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequential, "find_blocks", lambda *_: [])
        quantized(whole, ARCConfig(**GPTQ), data)
    assert_same_tensors(model, whole)


def test_one_sum_lives_at_a_time_and_none_afterwards(monkeypatch):
    """Memory: the Hessian of one input, whatever the number of blocks."""
    alive, most = [], []
    take = Gram.take

    def watch(self: Gram) -> Tensor | None:
        total = take(self)
        alive.append(weakref.ref(total))
        most.append(sum(ref() is not None for ref in alive))
        return total

    monkeypatch.setattr(Gram, "take", watch)
    quantized(tiny_llama(), ARCConfig(**GPTQ))
    gc.collect()
    assert len(alive) == 8 and max(most) == 1
    assert all(ref() is None for ref in alive)


def test_hooks_modes_and_observers_are_gone():
    model = quantized(tiny_llama().train(), ARCConfig(**GPTQ | {"layer_weights": "fisher"}))
    assert model.training and model.config.use_cache
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert observer_on(module) is None


@pytest.mark.parametrize("token", ["same", "one"])
def test_poor_calibration_data_gives_finite_weights(token):
    """One token, and the same token again and again."""
    data = [torch.full((1, 1 if token == "one" else 16), 7)]
    model = quantized(tiny_llama(), ARCConfig(**GPTQ), data)
    assert all(torch.isfinite(t.dequantize()).all() for t in arc_tensors(model).values())
    assert torch.isfinite(model(batches()[0]).logits).all()
