"""quantize_: one call and torchao's three steps agree; what is chosen, padded and reported."""

import json
import warnings

import pytest
import torch
from tiny_models import byte_tokenizer, tiny_llama
from torch import nn
from torchao.quantization import quantize_ as torchao_quantize_

from arc_ao import ARCConfig, ARCTensor, quantize_
from arc_ao.loading import loading_config, pack_weights_
from arc_ao.summary import arc_tensors, model_bytes

PLAIN = ARCConfig(recipe="plain", budget=0.0)


def batches(count: int = 2) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (2, 16), generator=g) for _ in range(count)]


def small_llama(seed: int = 0) -> nn.Module:
    return tiny_llama(seed, num_hidden_layers=1)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def same_logits(left: nn.Module, right: nn.Module) -> bool:
    return torch.equal(left(batches()[0]).logits, right(batches()[0]).logits)


def assert_same_tensors(left: nn.Module, right: nn.Module) -> None:
    """Every quantized weight, inner tensor by inner tensor and attribute by attribute."""
    theirs = arc_tensors(right)
    assert arc_tensors(left).keys() == theirs.keys() and theirs
    for name, tensor in arc_tensors(left).items():
        assert tensor.__tensor_flatten__() == theirs[name].__tensor_flatten__()
        for inner in tensor.__tensor_flatten__()[0]:
            assert torch.equal(getattr(tensor, inner), getattr(theirs[name], inner)), (name, inner)


def three_steps(model: nn.Module, config: ARCConfig) -> None:
    """torchao's own `quantize_`, which has no names and would take the head too."""
    linears = lambda module, name: isinstance(module, nn.Linear) and name != "lm_head"
    torchao_quantize_(model, config.with_step("prepare"), filter_fn=linears)
    for batch in batches():
        model(batch)
    torchao_quantize_(model, config.with_step("convert"), filter_fn=linears)


@pytest.mark.parametrize(
    "settings",
    [
        {"recipe": "balanced"},
        {"recipe": "paper", "budget": None},
        {"recipe": "balanced", "granularity": "channel", "activation_scale": "static"},
    ],
)
def test_one_call_equals_three_steps_and_a_loaded_checkpoint(settings):
    """Same tensors and logits, bit for bit; so does a model filled by `load_state_dict`."""
    config = ARCConfig(**settings)
    one, three, loaded = small_llama(), small_llama(), small_llama(seed=3)
    quantize_(one, config, calibration_data=batches(), progress=False)
    three_steps(three, config)
    assert_same_tensors(one, three)
    assert same_logits(one, three)
    for name, tensor in arc_tensors(one).items():
        only = lambda module, fqn, name=name: fqn == name
        assert quantize_(loaded, loading_config(tensor), filter_fn=only) is None
    loaded.load_state_dict(one.state_dict())
    assert same_logits(one, loaded)
    assert_same_tensors(one, pack_weights_(loaded))
    assert same_logits(one, loaded)


def searched_llama(**fields) -> tuple[nn.Module, ARCConfig]:
    """A model under a searched recipe, and the resolved config."""
    searched = small_llama()
    data = batches()
    summary = quantize_(searched, ARCConfig(**fields), calibration_data=data, progress=False)
    resolved = ARCConfig(**summary.configs[0]["_data"])
    assert resolved.searched == [] and resolved.step is None
    return searched, resolved


@pytest.mark.parametrize("fields", [{}, {"layer_weights": "equal"}])
def test_the_searched_config_reproduces_the_search(fields):
    """The resolved config of the default, given again, needs no search and gives the same bits."""
    searched, resolved = searched_llama(**fields)
    again = small_llama()
    assert quantize_(again, resolved, calibration_data=batches(), progress=False).trials == [[]]
    assert_same_tensors(searched, again)
    assert same_logits(searched, again)


def test_the_searched_config_in_three_steps():
    """They weigh no layers; apart from that they give the same bits."""
    searched, resolved = searched_llama(layer_weights="equal")
    three = small_llama()
    three_steps(three, resolved)
    assert_same_tensors(searched, three)
    assert same_logits(searched, three)


def test_plain_needs_no_data_and_torchao_alone_will_do():
    mine, theirs = small_llama(), small_llama()
    quantize_(mine, PLAIN, progress=False)
    torchao_quantize_(theirs, PLAIN, filter_fn=lambda m, n: type(m) is nn.Linear and n != "lm_head")
    assert_same_tensors(mine, theirs)
    with pytest.raises(ValueError, match=r"Linear\(64, 64\): expected calibration for residual"):
        torchao_quantize_(small_llama(), ARCConfig())


def test_all_forms_of_data_calibrate_alike(capfd):
    """Ids with and without batch dimension, dicts, a generator, strings; and no progress bar."""
    texts, tokenizer = ["some text", "another text"], byte_tokenizer()
    rows = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
    forms = rows, [r[0] for r in rows], [{"input_ids": r} for r in rows], (r for r in rows), texts
    models = [small_llama() for _ in forms]
    config = ARCConfig(recipe="balanced", weight_scale="amax")
    capfd.readouterr()
    for model, data in zip(models, forms, strict=True):
        quantize_(model, config, calibration_data=data, tokenizer=tokenizer, progress=False)
        assert_same_tensors(models[0], model)
    assert "%|" not in capfd.readouterr().err


class Mixture(nn.Module):
    """A router "gate", layers of ragged width, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.gate_proj = nn.Linear(32, 4), nn.Linear(32, 172)
        self.down_proj, self.narrow = nn.Linear(172, 32), nn.Linear(32, 8)
        self.deep, self.lm_head = nn.Linear(8, 32), nn.Linear(32, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.down_proj(self.gate_proj(x).relu()) * self.gate(x).amax(-1, keepdim=True)
        return self.lm_head(self.deep(self.narrow(hidden)))


def test_heads_routers_and_ragged_layers_are_left_alone_with_one_warning():
    """`gate_proj` is no router; every ragged layer is listed in the one warning."""
    model, config = Mixture(), ARCConfig(recipe="balanced", num_act_channels=16)
    with warnings.catch_warnings(record=True, action="always") as caught:
        summary = quantize_(model, config, calibration_data=[randn(8, 32)], progress=False)
    (warning,) = [w for w in caught if "in_features" in str(w.message)]
    assert str(warning.message).endswith("down_proj (172), deep (8)")
    assert warning.filename == __file__
    assert sorted(arc_tensors(model)) == ["gate_proj", "narrow"]
    assert set(summary.skipped) == {"gate", "lm_head", "down_proj", "deep"}


def test_filter_fn_replaces_the_default_choice():
    model, only = Mixture(), lambda module, name: name in ("gate", "lm_head")
    summary = quantize_(model, PLAIN, filter_fn=only)
    assert sorted(arc_tensors(model)) == ["gate", "lm_head"]
    assert summary.skipped["gate_proj"] == "excluded by filter_fn"


@pytest.mark.parametrize("order", ["none", "amax"])
@pytest.mark.parametrize("kind", ["num_act_channels", "num_weight_channels"])
def test_padding_equals_zero_channels(kind, order):
    """in_features 172 with `pad_in_features`: the bits of a linear padded by hand to 176."""
    ragged, whole = nn.Linear(172, 24), nn.Linear(176, 24)
    whole.weight.data.zero_()[:, :172] = ragged.weight.data
    whole.bias.data.copy_(ragged.bias.data)
    x, padded = randn(8, 172), nn.functional.pad(randn(8, 172), (0, 4))
    config = ARCConfig(recipe="balanced", channel_order=order, pad_in_features=True, **{kind: 32})
    for model, data in ((ragged, x), (whole, padded)):
        quantize_(nn.Sequential(model), config, calibration_data=[data], progress=False)
    assert torch.equal(ragged.weight.qdata, whole.weight.qdata)
    assert torch.equal(ragged(x), whole(padded))


def test_a_layer_with_two_parents_is_quantized_once():
    """Weight sharing between blocks (ALBERT): visited twice, one observer, one ARCTensor."""
    shared, config = nn.Linear(32, 32), ARCConfig(recipe="balanced", budget=0.5)
    model = nn.Sequential(nn.Sequential(shared), nn.Sequential(shared))
    summary = quantize_(model, config, calibration_data=[randn(4, 32)], progress=False)
    assert list(summary.layers) == ["0.0"] and isinstance(shared.weight, ARCTensor)
    assert not shared._modules and not shared._forward_pre_hooks


def test_modes_and_dtypes_are_kept():
    """Layers of three dtypes; a training model with a frozen part stays one."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32).bfloat16(), nn.Linear(32, 16).half())
    for i, linear in enumerate(model):
        linear.register_forward_pre_hook(lambda m, args: (args[0].to(m.bias.dtype),))
        linear.train(i != 1)
    config = ARCConfig(channel_order="none", exchange_rate=1.0)
    quantize_(model, config, calibration_data=[randn(8, 32)], progress=False)
    assert [m.training for m in (model, *model)] == [True, True, False, True]
    assert [m.weight.dtype for m in model] == [torch.float32, torch.bfloat16, torch.float16]
    assert model(randn(8, 32)).dtype == torch.float16


def test_summary_counts_by_hand():
    """One linear 64 -> 32 with 16 + 16 residual channels, a head and a bias left as they are."""
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8, bias=False))
    config = ARCConfig(recipe="balanced", num_act_channels=16, num_weight_channels=16)
    data, only = [randn(8, 64)], lambda _, name: name == "0"
    summary = quantize_(model, config, calibration_data=data, filter_fn=only, progress=False)
    # Codes: 32 x (64 + 16) / 2; scales: 32 x 5; outer scale and two block ids: 3 x 4 bytes.
    stored = 32 * 40 + 32 * 5 + 12
    assert summary.bytes_before == 4 * (64 * 32 + 32 + 32 * 8)
    assert summary.bytes_after == model_bytes(model) == stored + 4 * (32 + 32 * 8)
    assert summary.extra_channels == summary.extra_multiply_adds == 0.5
    assert summary.bits_per_weight == 8 * stored / (64 * 32)
    expected = {"shape": [32, 64], "act_channels": 16, "weight_channels": 16, "rank": 0}
    expected |= {"rounding": "nearest"}
    assert summary.layers == {"0": expected | {"bits_per_weight": summary.bits_per_weight}}
    assert json.loads(json.dumps(summary.to_dict(), allow_nan=False)) == summary.to_dict()
    assert "1 linears quantized, 1 left alone; 50.0% extra channels" in str(summary)
