"""ARCConfig: what it refuses, what it fills in, when it must see data, how it serialises."""

import copy
import dataclasses
import json
import pickle
from collections import OrderedDict

import pytest
from torch import nn
from torchao.core.config import config_from_dict, config_to_dict
from torchao.quantization import FqnToConfig
from torchao.quantization import quantize_ as torchao_quantize_
from torchao.quantization.quantize_.common.quantization_step import QuantizationStep

from arc_ao import ARCConfig, BudgetConfig, NVFP4Config
from arc_ao.recipes import RECIPES

NAN = float("nan")


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("recipe", "first", r"recipe must be one of \('balanced', .*got 'first'"),
        ("selection", "random", r"selection must be one of \('energy', 'threshold', .*'random'"),
        ("channel_order", "sorted", r"channel_order must be one of \('none', 'amax', .*'sorted'"),
        ("granularity", "row", r"granularity must be one of \('block', 'channel', .*'row'"),
        ("weight_scale", "max", r"weight_scale must be one of \('amax', 'mse', .*'max'"),
        ("activation_scale", "row", r"activation_scale must be one of \('token', .*'row'"),
        ("step", "observe", r"step must be one of \('prepare', 'convert', .*'observe'"),
        ("activation_block_scale", 6, r"activation_block_scale must be one of \('amax', .*got 6"),
        ("four_over_six", "yes", r"four_over_six must be one of \(True, False, .*'yes'"),
        ("pad_in_features", "no", r"pad_in_features must be one of \(True, False\), got 'no'"),
        ("budget", -0.01, r"budget is extra channels .*expected 0 to 2 \(0.06 is 6 %\), got -0.01"),
        ("budget", 2.5, r"budget is extra channels .*got 2.5"),
        ("budget", NAN, r"budget is extra channels .*got nan"),
        ("budget", "6%", r"budget is extra channels .*got '6%'"),
        ("budget", None, r"budget=None is the paper's rule and needs selection='threshold'"),
        ("exchange_rate", -1.0, r"exchange_rate must be >= 0 or 'inf', got -1.0"),
        ("exchange_rate", NAN, r"exchange_rate must be >= 0 or 'inf', got nan"),
        ("exchange_rate", "much", r"exchange_rate must be >= 0 or 'inf', got 'much'"),
        ("num_act_channels", 24, r"num_act_channels must be a non-negative multiple of 16, got 24"),
        ("num_act_channels", 16.0, r"num_act_channels must be .*got 16.0"),
        ("rounding", "up", r"rounding must be one of \('nearest', 'gptq', .*'up'"),
        ("layer_weights", "some", r"layer_weights must be one of \('equal', 'fisher', .*'some'"),
        ("damping", 0, r"damping is relative .*more than 0 and at most 10, got 0"),
        ("damping", NAN, r"damping is relative .*got nan"),
        ("num_weight_channels", -16, r"num_weight_channels must be .*got -16"),
    ],
)
def test_an_invalid_field_is_refused_by_name(field, value, message):
    """The message names the field, what is allowed and what was given."""
    with pytest.raises(ValueError, match=f"ARCConfig.{message}"):
        ARCConfig(**{field: value})


def test_the_papers_rule_needs_no_budget():
    assert ARCConfig(budget=None, recipe="paper").resolve().selection == "threshold"
    assert ARCConfig(budget=None, selection="threshold").resolve().budget is None


@pytest.mark.parametrize("recipe", RECIPES)
def test_resolve_leaves_no_field_open_and_keeps_the_users(recipe):
    """A field given by the user wins over a measured one, that over the recipe's."""
    resolved = ARCConfig(recipe=recipe).resolve()
    expected = RECIPES.get(recipe, RECIPES["balanced"])
    assert {name: getattr(resolved, name) for name in expected} == expected
    assert resolved.searched == []
    mine = ARCConfig(recipe=recipe, granularity="channel", activation_block_scale="amax")
    found = {"granularity": "block", "channel_order": "amax", "activation_block_scale": "mse"}
    measured = mine.resolve(**found)
    assert (measured.granularity, measured.channel_order) == ("channel", "amax")
    assert measured.activation_block_scale == "amax"
    assert mine.channel_order is None  # a copy


SCALES = "activation_block_scale"
ALL = ["channel_order", "granularity", "exchange_rate", SCALES]


@pytest.mark.parametrize(
    "settings, searched, needs",
    [
        ({}, ALL, True),
        ({"recipe": "balanced"}, [], True),
        ({"recipe": "paper"}, [], True),
        ({"recipe": "paper", "budget": 0.0}, [], True),  # sorting needs the amax of each channel
        ({"recipe": "plain"}, [], False),  # plain means no residuals
        ({"recipe": "plain", "num_act_channels": 16}, [], True),  # unless asked for by number
        ({"recipe": "plain", "budget": 0.0}, [], False),
        ({"recipe": "plain", "budget": 0}, [], False),
        ({"recipe": "plain", "budget": 0.0, "activation_scale": "static"}, [], True),
        ({"recipe": "plain", "budget": 0.0, "channel_order": "amax"}, [], True),
        ({"budget": 0.0}, [], False),
        ({"budget": 0.0, "weight_scale": "amax"}, [], False),  # plain NVFP4, nothing to measure
        ({"granularity": "block"}, ["channel_order", "exchange_rate", SCALES], True),
        # Numbers per layer and kind: there is nothing to exchange.
        ({"num_act_channels": 16}, ["channel_order", "granularity", SCALES], True),
        ({"num_weight_channels": 16}, ["channel_order", SCALES], True),
        ({"num_act_channels": 0, "recipe": "plain"}, [], False),
        # The threshold selects activation blocks only.
        ({"selection": "threshold"}, ["channel_order", SCALES], True),
    ],
)
def test_what_is_searched_and_what_needs_data(settings, searched, needs):
    """Only fields that make a difference are measured; plain NVFP4 needs no data."""
    config = ARCConfig(**settings)
    assert config.searched == searched
    assert config.needs_calibration is needs


@pytest.mark.parametrize("rate", ["inf", float("inf"), "Infinity"])
def test_an_infinite_rate_survives_strict_json(rate):
    """JSON has no infinity, so every spelling of it is kept as a string."""
    config = ARCConfig(exchange_rate=rate)
    text = json.dumps(config_to_dict(config), allow_nan=False)
    assert config.exchange_rate == "inf"
    assert config_from_dict(json.loads(text)) == config


def test_nested_configs_round_trip_through_json():
    """FqnToConfig keeps each layer's ARCConfig, None included, and their order."""
    table = OrderedDict(
        [
            (
                "re:.*mlp.*",
                ARCConfig(budget=0.1, exchange_rate="inf", activation_block_scale="mse"),
            ),
            ("lm_head", None),
            ("_default", ARCConfig(budget=None, recipe="paper", step="prepare")),
        ]
    )
    data = json.loads(json.dumps(config_to_dict(FqnToConfig(table))))
    restored = config_from_dict(data)
    assert list(restored.fqn_to_config.items()) == list(table.items())


@pytest.mark.parametrize("old, method", [(True, "four_over_six"), (False, "amax")])
@pytest.mark.parametrize("kind", [ARCConfig, NVFP4Config, BudgetConfig])
def test_the_old_spelling_of_block_scales_is_taken(kind, old, method):
    """As an argument and in stored configs; what is written is the new field alone."""
    config = kind(four_over_six=old)
    assert config == kind(activation_block_scale=method)
    assert dataclasses.replace(config, damping=0.05).activation_block_scale == method
    stored = config_to_dict(config)
    assert "four_over_six" not in stored["_data"]
    del stored["_data"]["activation_block_scale"]
    assert config_from_dict(stored | {"_data": stored["_data"] | {"four_over_six": old}}) == config


def test_two_spellings_that_disagree_are_refused():
    assert ARCConfig(four_over_six=False, activation_block_scale="amax").searched == ALL[:3]
    message = "four_over_six=True is the old spelling of .*'four_over_six', got .*='mse', too"
    with pytest.raises(ValueError, match=message):
        ARCConfig(four_over_six=True, activation_block_scale="mse")


@pytest.mark.parametrize("name", ["prepare", "convert", "prepare_for_loading"])
def test_torchaos_step_enum_is_kept_as_a_string(name):
    """The enum would serialise to something that torchao cannot read back."""
    config = ARCConfig(step=QuantizationStep(name))
    assert type(config.step) is str and config.step == name
    assert config_from_dict(config_to_dict(config)) == config


def test_a_config_never_carries_the_model_away():
    """The session of a prepared model is neither serialised, copied, pickled nor compared."""
    config = ARCConfig(recipe="balanced", step="prepare")
    before = config_to_dict(config)
    model = nn.Sequential(nn.Linear(16, 16))
    torchao_quantize_(model, config)
    assert "_session" in vars(config)
    assert config_to_dict(config) == before
    assert config == ARCConfig(recipe="balanced", step="prepare")
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), config.resolve()):
        assert "_session" not in vars(other)
    assert copy.deepcopy(config) == config
    model(model[0].weight.detach())
    torchao_quantize_(model, ARCConfig(recipe="balanced", step="convert"))
    assert "_session" not in vars(config)


@pytest.mark.parametrize(
    "settings, hessian, weighs",
    [
        ({}, False, True),
        ({"layer_weights": "equal"}, False, False),
        ({"recipe": "best"}, True, True),
        ({"recipe": "best", "rounding": "nearest", "weight_scale": "amax"}, False, True),
        ({"recipe": "plain", "rounding": "gptq"}, True, False),
        ({"recipe": "balanced", "weight_scale": "local_hessian"}, True, False),
        ({"recipe": "best", "num_act_channels": 16}, True, False),  # nothing competes
    ],
)
def test_what_needs_hessians_and_layer_weights(settings, hessian, weighs):
    config = ARCConfig(**settings)
    assert (config.needs_hessian, config.weighs_layers) == (hessian, weighs)
    assert config.needs_calibration or not hessian
    assert ARCConfig(recipe="best").searched == ARCConfig().searched
