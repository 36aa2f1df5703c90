"""FqnToConfig: one call, a config per layer, by torchao's own precedence."""

from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from test_refusals import refused
from tiny_models import tiny_llama
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import (
    FqnToConfig,
    Int8Tensor,
    Int8WeightOnlyConfig,
    register_quantize_module_handler,
)
from torchao.quantization import quantize_ as torchao_quantize_

from arc_ao import ARCConfig, ARCTensor, quantize_
from arc_ao.calibration.session import observer_on
from arc_ao.loading import loading_config
from arc_ao.summary import arc_tensors

LAYER = "model.layers.0"
Q, K, O = (f"{LAYER}.self_attn.{p}_proj" for p in "qko")


def batches(count: int = 2) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (2, 16), generator=g) for _ in range(count)]


def explicit(act: int = 16, weight: int = 0) -> ARCConfig:
    return ARCConfig(recipe="balanced", num_act_channels=act, num_weight_channels=weight)


def table(**entries: AOBaseConfig | None) -> FqnToConfig:
    return FqnToConfig(OrderedDict(entries))


def quantized(config: FqnToConfig, **settings) -> tuple[nn.Module, object]:
    model = tiny_llama(num_hidden_layers=1)
    summary = quantize_(model, config, calibration_data=batches(), progress=False, **settings)
    return model, summary


def channels(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(activation, weight) residual channels of each quantized layer, by its last name."""
    return {
        name.rsplit(".", 1)[-1]: (t.num_act_channels, t.num_weight_channels)
        for name, t in arc_tensors(model).items()
    }


def test_exact_names_patterns_none_and_foreign_configs_in_one_call():
    """Every layer gets its own: ARC of several kinds, torchao's int8, or nothing."""
    config = table(
        **{
            Q: explicit(32),
            r"re:.*\.(k|v)_proj": explicit(16, 16),
            O: None,
            f"{LAYER}.mlp.down_proj": Int8WeightOnlyConfig(),
            "_default": explicit(0, 32),
        }
    )
    model, summary = quantized(config)
    kv, rest = (16, 16), (0, 32)
    expected = {"q_proj": (32, 0), "k_proj": kv, "v_proj": kv, "gate_proj": rest, "up_proj": rest}
    assert channels(model) == expected
    assert type(model.get_submodule(O).weight) is nn.Parameter
    assert isinstance(model.get_submodule(f"{LAYER}.mlp.down_proj").weight, Int8Tensor)
    assert type(model.lm_head.weight) is nn.Parameter  # "_default" keeps off the head
    assert summary.skipped[O] == "excluded by its config"
    assert len(summary.configs) == 3
    assert torch.isfinite(model(batches()[0]).logits).all()


@pytest.mark.parametrize(
    "entries, expected",
    [
        ([(Q, 16), (rf"re:{Q}", 32)], 16),
        ([(rf"re:{Q}", 32), (Q, 16)], 16),  # exact before pattern, whatever their order
        ([(Q, 32), (f"{Q}.weight", 16)], 16),  # parameter before module
        ([("re:.*", 32), (r"re:.*\.weight", 16)], 32),  # both match the parameter: first
        ([("re:.*q_proj", 32), (r"re:.*q_proj\.weight", 16)], 16),
        ([("re:.*k_proj", 32), ("_default", 16)], 16),
    ],
)
def test_precedence_is_torchaos(entries, expected):
    """The same layer gets the same config from both `quantize_`."""
    # torchao would apply every pattern that matches a parameter, so it gets only the first.
    configs = {name: explicit(number) for name, number in entries}
    model, _ = quantized(table(**configs), filter_fn=lambda module, name: name == Q)
    assert channels(model) == {"q_proj": (expected, 0)}


def test_a_key_that_matches_no_layer_is_refused():
    """Patterns match the whole name; a typing error must not pass in silence."""
    for key in ("re:q_proj", "model.layers.7.mlp.up_proj"):
        with pytest.raises(ValueError, match=f"{key!r} matches no nn.Linear"):
            quantized(table(**{key: explicit(), "_default": explicit()}))


def test_a_layer_listed_by_name_is_quantized_even_with_the_default_config():
    """Naming lm_head asks for it, also where the same object is the default."""
    same = explicit()
    model, _ = quantized(table(lm_head=same, _default=same))
    assert "lm_head" in channels(model)


def test_layers_of_one_config_object_share_one_budget():
    config = ARCConfig(recipe="balanced", budget=0.25)
    model, summary = quantized(table(**{"re:.*proj": config}))
    assert len(summary.configs) == 1
    assert 0.2 < summary.extra_channels <= 0.25
    whole = tiny_llama(num_hidden_layers=1)
    quantize_(whole, config, calibration_data=batches(), progress=False)
    assert channels(model) == channels(whole)


def test_searching_one_config_does_not_feed_another(monkeypatch):
    """Trials run the model over and over; no observer may see any of it."""
    counts = {}

    def spy(session, config, **kwargs):
        for member in session.members:
            counts.setdefault(member.name, set()).add(observer_on(member.module).count.item())
        return analyse(session, config, **kwargs)

    from arc_ao.flow import planning as module

    analyse = module.analyse_session
    monkeypatch.setattr(module, "analyse_session", spy)
    monkeypatch.setattr("arc_ao.methods.recipe.analyse_session", spy)
    configs = [ARCConfig(budget=b, granularity="block", exchange_rate=1.0) for b in (0.1, 0.2)]
    quantized(table(**{Q: configs[0], O: configs[1]}))
    tokens = sum(b.numel() for b in batches())
    assert counts and all(seen == {tokens} for seen in counts.values())


def test_three_steps_through_torchao_equal_one_call():
    """FqnToConfig of step configs, as torchao's own `quantize_` applies them."""
    first, second = (ARCConfig(recipe="balanced", budget=b) for b in (0.1, 0.3))
    one, _ = quantized(table(**{"re:.*attn.*": first, "re:.*mlp.*": second}))
    three = tiny_llama(num_hidden_layers=1)
    for step in ("prepare", "convert"):
        config = table(
            **{"re:.*attn.*_proj": first.with_step(step), "re:.*mlp.*_proj": second.with_step(step)}
        )
        torchao_quantize_(three, config, filter_fn=None)
        for batch in batches() if step == "prepare" else ():
            three(batch)
    for name, tensor in arc_tensors(one).items():
        other = three.get_submodule(name).weight
        assert torch.equal(tensor.qdata, other.qdata) and torch.equal(tensor.scale, other.scale)
        assert torch.equal(tensor.act_blocks, other.act_blocks)
    assert torch.equal(one(batches()[0]).logits, three(batches()[0]).logits)


def test_loading_configs_per_layer_restore_a_model():
    """Shapes differ by layer; `load_state_dict` copies into them bit for bit."""
    model, _ = quantized(table(**{"re:.*attn.*": explicit(32), "re:.*mlp.*": explicit(0, 16)}))
    layers = {name: loading_config(tensor) for name, tensor in arc_tensors(model).items()}
    loaded = tiny_llama(seed=5, num_hidden_layers=1)
    assert quantize_(loaded, table(**layers)) is None
    assert all(isinstance(loaded.get_submodule(name).weight, ARCTensor) for name in layers)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(batches()[0]).logits, model(batches()[0]).logits)


@dataclass
class BrokenConfig(AOBaseConfig):
    """A config of another package whose handler replaces the module, then fails on one."""

    version: int = 1


@register_quantize_module_handler(BrokenConfig)
def _broken(module: nn.Module, config: BrokenConfig) -> nn.Module:
    if module.out_features == 64:
        raise RuntimeError("not this one")
    return nn.Identity()


@pytest.mark.parametrize("first", [explicit(), Int8WeightOnlyConfig()])
def test_a_foreign_config_that_fails_changes_nothing(first):
    """FqnToConfig: layers already converted, by anyone, come back."""
    config = table(**{"re:.*attn.*": first, "re:.*mlp.*": BrokenConfig()})
    model = tiny_llama(num_hidden_layers=1)
    refused(model, config, match="not this one", error=RuntimeError, calibration_data=batches())


def test_a_refusal_within_a_table_changes_nothing():
    """FqnToConfig: one layer's config cannot be met, another could."""
    model, match = tiny_llama(num_hidden_layers=1), f"^{Q}: asked for 80 act"
    refused(
        model, table(**{O: explicit(), Q: explicit(80)}), match=match, calibration_data=batches()
    )
