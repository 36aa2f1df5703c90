"""The recipe search: what is tried, who wins, and that trying leaves no trace."""

import weakref

import pytest
import torch
from tiny_models import tiny_llama
from torch import nn

from arc_ao import ARCConfig, quantize_
from arc_ao.calibration.data import calibrate
from arc_ao.calibration.session import CalibrationSession, observer_on
from arc_ao.methods import recipe as recipe_module
from arc_ao.methods.plan import analyse_session, make_plans
from arc_ao.methods.recipe import Trial, best, halve, quantized_on_the_fly, search_recipe
from arc_ao.methods.weights import quantize_weight
from arc_ao.outputs.divergence import kl_divergence


def batches(count: int = 2) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (2, 16), generator=g) for _ in range(count)]


def outlier_llama() -> nn.Module:
    """A tiny Llama whose norms blow up scattered channels, as large models do."""
    model = tiny_llama(num_hidden_layers=1)
    model.model.layers[0].input_layernorm.weight.data[[3, 37]] = 20.0
    return model


def session_on(model: nn.Module, config: ARCConfig) -> CalibrationSession:
    """Calibrated session of every linear but the head."""
    quantize_(model, config.with_step("prepare"))
    calibrate(model, batches(), progress=False)
    return observer_on(model.model.layers[0].self_attn.q_proj).session


def key(trial: Trial) -> tuple:
    c = trial.config
    return c.channel_order, c.granularity, c.exchange_rate, c.activation_block_scale


def searched(monkeypatch, divergence, **settings) -> list[Trial]:
    """Trials of a search in which `divergence(config)` stands for running the model."""

    def measure(self, configs: list[ARCConfig], count: int) -> list[Trial]:
        return [Trial(c, divergence(c), count) for c in configs]

    monkeypatch.setattr(recipe_module._Runs, "measure", measure)
    session = CalibrationSession(ARCConfig(**{"layer_weights": "equal"} | settings))
    return search_recipe(nn.Identity(), session, batches(8))


def test_each_field_is_tried_on_the_winner_so_far(monkeypatch):
    """The base, the other order, the other block scales, four rates, then the granularity."""
    fields = {"exchange_rate": 3.0, "granularity": "channel"}
    fields |= {"activation_block_scale": "mse"}

    def divergence(config: ARCConfig) -> float:
        return 1.0 - 0.2 * sum(getattr(config, k) == v for k, v in fields.items())

    winner, *rest = searched(monkeypatch, divergence)
    before = {(order, "block", 1.0, "amax") for order in ("none", "amax", "rms")}
    rates = {("none", "block", rate, "mse") for rate in (0.0, 0.3, 1.0, 3.0, "inf")}
    assert key(winner) == ("none", "channel", 3.0, "mse")
    assert {key(t) for t in rest} == before | rates and len(rest) == 8
    assert [t.divergence for t in rest] == sorted(t.divergence for t in rest)
    assert all(t.config.searched == [] for t in rest)


def test_fewer_rates_are_tried_where_errors_have_one_unit(monkeypatch):
    trials = searched(monkeypatch, lambda config: 1.0, layer_weights="fisher")
    assert {t.config.exchange_rate for t in trials} == {0.3, 1.0, 3.0}


def test_the_better_half_runs_on_all_batches():
    """Four candidates on a quarter of the batches, two of them on the rest, each batch once; the
    others are reported with what they ran on and cannot win."""
    configs = [
        ARCConfig(recipe="balanced", exchange_rate=r).resolve() for r in (1.0, 2.0, 3.0, 4.0)
    ]
    calls = []

    class Runs(recipe_module._Runs):
        def _plans(self, config):
            return config.exchange_rate

        def _reference(self, index):
            return None

        def _divergences(self, plans, batch, reference):
            calls.append((plans, batch))
            # The last is the worst at first and would be the best later.
            return [0.0 if rate == 4.0 and batch > 1 else rate for rate in plans]

    runs = Runs(nn.Identity(), None, list(range(8)), lambda: None)
    trials = halve(runs, configs)
    assert [(t.config.exchange_rate, t.batches) for t in trials] == [
        (1.0, 8), (2.0, 8), (3.0, 2), (4.0, 2)
    ]  # fmt: skip
    assert calls == [([1.0, 2.0, 3.0, 4.0], i) for i in (0, 1)] + [
        ([1.0, 2.0], i) for i in range(2, 8)
    ]
    assert best([*trials, Trial(configs[3], 0.0, 2)]).config is configs[0]


def test_expected_runs_bound_what_a_search_runs(monkeypatch):
    """The bar's total: exactly what is run where every field is searched."""
    ran = []
    monkeypatch.setattr(recipe_module.Reference, "measure", lambda *_: 1.0)
    model = tiny_llama(num_hidden_layers=1)
    config = ARCConfig(channel_order="none")
    session, data = session_on(model, config), batches(8)
    advance = recipe_module._Runs(model, session, data, lambda: ran.append(1))
    recipe_module._search(advance, config)
    assert len(ran) == recipe_module.expected_runs(config, 8)


@pytest.mark.parametrize("field, value", [("channel_order", "amax"), ("exchange_rate", "inf")])
def test_gathering_is_not_tried_where_it_means_nothing(monkeypatch, field, value):
    """Sorted channels share blocks already; "inf" leaves no activation residual to gather."""
    winner, *rest = searched(monkeypatch, lambda c: 1.0 - 0.5 * (getattr(c, field) == value))
    assert getattr(winner.config, field) == value
    assert all(t.config.granularity == "block" for t in rest)


@pytest.mark.parametrize(
    "settings, count",
    [
        ({}, 9),
        ({"granularity": "block", "activation_block_scale": "amax"}, 7),
        ({"channel_order": "none", "exchange_rate": 1.0, "activation_block_scale": "mse"}, 2),
        # Numbers of channels and thresholds leave nothing to exchange: no duplicates.
        ({"num_act_channels": 16, "activation_block_scale": "amax"}, 4),
        ({"num_weight_channels": 16, "activation_block_scale": "amax"}, 3),
        ({"selection": "threshold", "activation_block_scale": "amax"}, 3),
        ({"budget": 0.0}, 1),
    ],
)
def test_given_fields_are_not_searched(monkeypatch, settings, count):
    trials = searched(monkeypatch, lambda config: 1.0, **settings)
    assert len({key(t) for t in trials}) == len(trials) == count
    for name, value in settings.items():
        assert all(getattr(t.config, name) == value for t in trials)


def test_a_search_measures_a_real_model():
    """Divergences are positive and differ; quantize_ converts with the winner."""
    model = outlier_llama()
    config = ARCConfig(budget=0.2, channel_order="none", granularity="block")
    summary = quantize_(model, config, calibration_data=batches(), progress=False)
    trials = summary.trials[0]
    assert len({t["divergence"] for t in trials}) > 3 and all(t["divergence"] > 0 for t in trials)
    for name in ("exchange_rate", "activation_block_scale"):
        assert summary.configs[0]["_data"][name] == trials[0][name]


def trial(divergence: float, **settings) -> Trial:
    return Trial(ARCConfig(recipe="balanced", **settings).resolve(), divergence)


def test_among_equals_the_cheaper_wins():
    """Within 2 % of the least divergence run time decides, and divergence among equal costs."""
    plain, plain_too = trial(1.02), trial(1.018)
    gathered, wide = trial(1.01, granularity="channel"), trial(1.005, activation_block_scale="mse")
    sorted_ = trial(1.0, channel_order="amax")
    assert best([sorted_, wide, gathered, plain]) is plain
    assert best([sorted_, wide, gathered, plain, plain_too]) is plain_too
    assert best([sorted_, wide, gathered, trial(1.03)]) is gathered
    assert best([sorted_, wide]) is wide
    assert best([sorted_, trial(1.021, activation_block_scale="mse")]) is sorted_
    assert best([trial(float("inf")), sorted_]) is sorted_
    assert best([trial(1e-9), trial(0.0, channel_order="amax")]).divergence == 0.0


def test_the_search_leaves_no_trace():
    """Statistics, weights and hooks are as before; the session observes again."""
    model = tiny_llama(num_hidden_layers=1)
    config = ARCConfig(channel_order="none", granularity="block", exchange_rate=1.0)
    session = session_on(model, config)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    search_recipe(model, session, batches())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert session.observing


@pytest.mark.parametrize(
    "settings",
    [{"granularity": "channel", "activation_block_scale": "mse"}, {"channel_order": "amax"}],
)
def test_trying_gives_the_output_of_converting(settings):
    """Quantized on the fly and converted for good: the same logits, bit for bit."""
    model, config = outlier_llama(), ARCConfig(recipe="balanced", budget=0.2, **settings).resolve()
    session = session_on(model, config)
    plans = make_plans(analyse_session(session, config), config)
    session.observing = False
    with quantized_on_the_fly(session, plans):
        tried = model(batches()[0]).logits
    quantize_(model, config.with_step("convert"))
    assert torch.equal(tried, model(batches()[0]).logits)


def test_at_most_one_layer_is_quantized_at_a_time(monkeypatch):
    """Memory: one quantized weight while its linear runs, none later; parameters come back."""
    model, config = tiny_llama(num_hidden_layers=1), ARCConfig(recipe="balanced").resolve()
    session = session_on(model, config)
    plans = make_plans(analyse_session(session, config), config)
    originals = dict(model.named_parameters())
    codes, inside = [], []

    def quantize_and_watch(weight, plan):
        tensor = quantize_weight(weight, plan)
        codes.append(weakref.ref(tensor.qdata))
        return tensor

    def alive(*_) -> None:
        inside.append(sum(code() is not None for code in codes))

    monkeypatch.setattr(recipe_module, "quantize_weight", quantize_and_watch)
    with quantized_on_the_fly(session, plans):
        for member in session.members:
            member.module.register_forward_hook(alive)
        model(batches()[0])
    alive()
    assert len(codes) == len(session.members) == 7 and max(inside) <= 1 and inside[-1] == 0
    assert all(originals[name] is p for name, p in model.named_parameters())


def test_weights_come_back_when_the_forward_raises():
    """Inside a linear, also where the model catches the error and goes on; and between two."""
    linear, config = nn.Linear(32, 32), ARCConfig(recipe="plain", budget=0.0).resolve()
    session = CalibrationSession(config)
    session.attach("linear", linear)
    plans = make_plans(analyse_session(session, config), config)
    session.observing = False
    weight, x = linear.weight, torch.ones(2, 32)
    with pytest.raises(ZeroDivisionError), quantized_on_the_fly(session, plans):
        expected = linear(x)
        with pytest.raises(ValueError, match="31 channels"):
            linear(x[:, 1:])
        assert linear.weight is weight
        assert torch.equal(linear(x), expected)
        raise ZeroDivisionError
    assert linear.weight is weight
    assert not linear._forward_hooks and len(linear._forward_pre_hooks) == 1


# The largest number of evenly spaced batches that fits; one batch even if it alone does not.
@pytest.mark.parametrize(
    "sizes, kept",
    [([30] * 3, 3), ([30] * 5, 3), ([40] * 40, 2), ([200, 300], 1), ([7] * 1000, 14), ([1], 1)],
)
def test_only_so_many_tokens_are_searched(monkeypatch, sizes, kept):
    monkeypatch.setattr(recipe_module, "SEARCH_TOKENS", 100)
    data = [torch.zeros(1, n, dtype=torch.long) for n in sizes]
    assert len(recipe_module.search_batches(data)) == kept


@pytest.mark.parametrize("capped, recordings", [(False, 1), (True, 2)])
def test_the_unquantized_model_runs_once_a_batch(monkeypatch, capped, recordings):
    """Its hidden states are kept; where logits are more than the head's product, they are not."""
    model, recorded = tiny_llama(num_hidden_layers=1), []
    session = session_on(model, ARCConfig(channel_order="none", granularity="block"))
    session.observing = False
    record = lambda *args, f=recipe_module.record_references: recorded.append(1) or f(*args)
    monkeypatch.setattr(recipe_module, "record_references", record)
    if capped:
        cap = lambda _, args, output: type(output)(logits=output.logits.tanh())
        model.register_forward_hook(cap)
    runs = recipe_module._Runs(model, session, batches(), lambda: None)
    for rate in (1.0, 2.0):
        config = ARCConfig(recipe="balanced", exchange_rate=rate).resolve()
        reference = model(batches()[0]).logits
        found = runs.measure([config], 1)[0].divergence
        plans = make_plans(analyse_session(session, config), config)
        with quantized_on_the_fly(session, plans):
            expected = kl_divergence(reference, model(batches()[0]).logits).item()
        assert found == pytest.approx(expected, rel=1e-4)
    assert len(recorded) == recordings
