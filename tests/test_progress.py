"""The bar of a call: shares of stages, nested stages, the time that is left."""

import pytest
from test_recipe import batches
from tiny_models import tiny_llama

from arc_ao import ARCConfig, quantize_
from arc_ao.flow.expected_cost import expected_costs
from arc_ao.progress import Progress


def test_a_stage_moves_the_bar_by_its_expected_cost():
    progress = Progress({"first": 30.0, "second": 10.0})
    bar = progress._bar
    with progress.stage("first") as advance:
        advance(0.5)
        assert bar.n == 15.0
        with progress.stage("part of it") as inner:
            inner(1.0)
        assert bar.n == 15.0
        advance(2.0)  # never more than all of it
        assert bar.n == 30.0
    for _ in progress.steps("second", [1, 2]):
        pass
    assert bar.n == bar.total == 40.0
    assert set(progress.seconds) == {"first", "second"}


def test_a_stage_that_ends_early_or_was_not_expected():
    """What is left of a stage is passed over; a stage without expectation costs nothing."""
    progress = Progress({"first": 3.0, "second": 1.0})
    with progress.stage("first") as advance:
        advance(0.1)
    assert progress._bar.n == 3.0
    for name in ("unknown", "first"):
        with progress.stage(name) as advance:
            advance(1.0)
        assert progress._bar.n == 3.0


def test_a_stage_of_known_time_costs_what_was_done_in_such_a_time():
    """A quarter of what is left goes by after a quarter of its seconds; without a past, or without
    an expectation of its time, it costs what was expected."""
    progress = Progress({"first": 30.0, "second": 10.0, "third": 5.0})
    with progress.stage("first", seconds=7.0):
        pass
    bar, progress.seconds["first"] = progress._bar, 6.0  # 5 a second
    assert bar.n == 30.0 and bar.total == 45.0
    with progress.stage("second", seconds=100.0) as advance:
        assert bar.total == 30.0 + 500.0 + 5.0
        advance(0.25)
        assert bar.n == 30.0 + 125.0
    with progress.stage("third"):
        pass
    assert bar.n == bar.total == 535.0


def test_the_bar_of_a_call_is_there_until_its_last_stage(monkeypatch):
    """Training the codes, after weights were rounded and converted."""
    bars = []
    monkeypatch.setattr(Progress, "close", lambda self: bars.append(dict(self.seconds)))
    config = ARCConfig(recipe="tuned", tuning_minutes=0.005)
    summary = quantize_(
        tiny_llama(num_hidden_layers=2), config, calibration_data=batches(), progress=False
    )
    assert len(bars) == 1 and [*bars[0]][-3:] == ["round weights", "convert", "tune"]
    assert summary.seconds == bars[0]


def test_a_stage_that_fails_still_ends():
    progress = Progress({"first": 1.0})
    with pytest.raises(ZeroDivisionError), progress.stage("first"):
        raise ZeroDivisionError
    with progress.stage("second"):
        pass
    assert list(progress.seconds) == ["first", "second"]


@pytest.mark.parametrize("recipe", ["auto", "best", "balanced", "tuned"])
def test_every_stage_of_a_call_was_expected(recipe):
    """Stages that ran are those that the cost model knows, so that the bar ends where it should."""
    config, data = ARCConfig(recipe=recipe, tuning_minutes=0.005), batches()
    summary = quantize_(
        tiny_llama(num_hidden_layers=2), config, calibration_data=data, progress=False
    )
    ran = set(summary.seconds)
    if config.searched:
        ran.discard("analyse weights")  # anew where the order that was tried last did not win
    assert ran == set(expected_costs([config], tokens=64, batches=2))
    assert all(seconds > 0 for seconds in summary.seconds.values())


def test_costs_grow_with_tokens_and_are_the_largest_of_several_configs():
    few, many = (expected_costs([ARCConfig()], tokens, tokens // 512) for tokens in (2048, 4096))
    assert many["calibrate"] == 2 * few["calibrate"] and many["weigh layers"] > few["weigh layers"]
    both = expected_costs([ARCConfig(), ARCConfig(recipe="best")], 4096, 8)
    assert both == expected_costs([ARCConfig(recipe="best")], 4096, 8)
    assert "round weights" in both and "round weights" not in few
