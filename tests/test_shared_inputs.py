"""Shared inputs: q/k/v and gate/up are found, look-alikes are not, sums stay each layer's own."""

import gc

import pytest
import torch
from tiny_models import tiny_llama
from torch import nn

from arc_ao import ARCConfig, quantize_
from arc_ao.calibration.observer import ARCObserver
from arc_ao.calibration.session import CalibrationSession, observer_on
from arc_ao.calibration.shared_inputs import SharedInputs

K = 32


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def session_of(count: int, **settings) -> tuple[CalibrationSession, list[nn.Linear]]:
    session = CalibrationSession(ARCConfig(**settings))
    linears = [nn.Linear(K, 16) for _ in range(count)]
    for i, linear in enumerate(linears):
        session.attach(f"l{i}", linear)
    return session, linears


def names(session: CalibrationSession) -> list[list[str]]:
    return [[member.name for member in group] for group in session.groups()]


def assert_saw(linear: nn.Linear, *inputs: torch.Tensor) -> None:
    """The observer's statistics are those of exactly these inputs."""
    expected = ARCObserver(K, observer_on(linear).channel_orders)
    for x in inputs:
        expected.observe(x)
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(getattr(observer_on(linear), name), buffer, rtol=0, atol=0)


def llama_batches() -> list[torch.Tensor]:
    return [
        torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(i)) for i in (0, 1)
    ]


def test_projections_of_a_llama_are_grouped():
    """q/k/v and gate/up share their inputs; o and down read their own."""
    model = tiny_llama()
    config = ARCConfig(recipe="balanced", step="prepare")
    quantize_(model, config)
    for batch in llama_batches():
        model(batch)
    expected = []
    for i in range(2):
        layer = f"model.layers.{i}"
        expected.append([f"{layer}.self_attn.{p}_proj" for p in "qkv"])
        expected.append([f"{layer}.self_attn.o_proj"])
        expected.append([f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"])
        expected.append([f"{layer}.mlp.down_proj"])
    session = observer_on(model.model.layers[0].self_attn.q_proj).session
    assert sorted(names(session)) == sorted(expected)


@pytest.mark.parametrize("granularity", ["block", "channel"])
def test_a_group_shares_blocks_and_outer_scale(granularity):
    """Serving engines fuse q/k/v: same residual blocks, same outer scale of the weight."""
    model = tiny_llama()
    config = ARCConfig(
        recipe="balanced", num_act_channels=16, num_weight_channels=16, granularity=granularity
    )
    quantize_(model, config, calibration_data=llama_batches(), progress=False)
    layer = model.model.layers[0]
    q, k, v = (getattr(layer.self_attn, f"{p}_proj").weight for p in "qkv")
    gate, up = layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight
    for first, other in ((q, k), (q, v), (gate, up)):
        assert torch.equal(first.act_blocks, other.act_blocks)
        assert torch.equal(first.weight_blocks, other.weight_blocks)
        assert torch.equal(first.outer_scale, other.outer_scale)
        if granularity == "channel":
            assert torch.equal(first.act_channels, other.act_channels)
    assert not torch.equal(q.outer_scale, gate.outer_scale)
    assert q.extra_channels == gate.extra_channels == 32


@pytest.mark.parametrize("inference", [False, True])  # inference tensors do not count versions
def test_a_tensor_changed_in_place_is_another_input(inference):
    session, (a, b, c) = session_of(3)
    with torch.inference_mode() if inference else torch.no_grad():
        x = randn(8, K).clone()
        first = x.clone()
        a(x)
        x.mul_(3)
        b(x)
        c(x)
    assert_saw(a, first)
    assert_saw(b, 3 * first)
    assert names(session) == [["l0"], ["l1", "l2"]]


def test_a_reused_address_is_another_input():
    """The allocator hands the memory of a dead activation to the next one of its size."""
    session, (a, b) = session_of(2)
    x = torch.from_numpy(randn(64, K).numpy())
    address, first = x.data_ptr(), x.clone()
    memory = x.numpy()
    a(x)
    del x
    gc.collect()
    memory += 1.0
    y = torch.from_numpy(memory)
    assert y.data_ptr() == address and y._version == 0
    b(y)
    assert_saw(a, first)
    assert_saw(b, first + 1)
    assert names(session) == [["l0"], ["l1"]]


@pytest.mark.parametrize("view", ["rows", "transposed"])
def test_another_view_of_the_memory_is_another_input(view):
    """Same address, other shape or strides."""
    session, (a, b) = session_of(2)
    x = randn(K, K)
    a(x)
    y = x[:8] if view == "rows" else x.t()
    b(y)
    assert_saw(b, y)
    assert names(session) == [["l0"], ["l1"]]


def test_each_tensor_is_measured_once(monkeypatch):
    calls = []
    measure = ARCObserver.measure
    monkeypatch.setattr(ARCObserver, "measure", lambda o, x: calls.append(o.name) or measure(o, x))
    session, linears = session_of(3)
    for seed in range(2):
        x = randn(4, K, seed=seed)
        for linear in linears:
            linear(x)
    assert calls == ["l0", "l0"]
    assert names(session) == [["l0", "l1", "l2"]]
    assert_saw(linears[2], randn(4, K), randn(4, K, seed=1))


@pytest.mark.parametrize("order", ["none", "amax"])
def test_a_layer_that_stops_sharing_has_exactly_its_own_inputs(order):
    """Not those that the layer it shared with read since."""
    session, (a, b) = session_of(2, recipe="balanced", channel_order=order)
    x, y, z = (randn(8, K, seed=i) * (i + 1) for i in range(3))
    a(x), b(x)
    a(y), b(z)
    assert_saw(a, x, y)
    assert_saw(b, x, z)
    assert names(session) == [["l0"], ["l1"]]


@pytest.mark.parametrize("order", ["none", "amax"])
def test_a_layer_that_starts_or_pauses_sharing_has_its_own_inputs(order):
    """Reading alone first, or missing a batch, keeps a layer out of the group."""
    session, (a, b, c) = session_of(3, recipe="balanced", channel_order=order)
    x, y, z = (randn(8, K, seed=i) for i in range(3))
    c(10 * z)
    a(x), b(x), c(x)
    a(y), c(y)
    assert_saw(a, x, y)
    assert_saw(b, x)
    assert_saw(c, 10 * z, x, y)
    assert names(session) == [["l0"], ["l1"], ["l2"]]


def test_empty_inputs_are_not_shared():
    """Experts without a token read empty tensors, which all lie at address 0."""
    session, (a, b) = session_of(2)
    empty, other = torch.empty(0, K), torch.empty(0, K)
    a(empty), b(other)
    a(randn(4, K))
    assert names(session) == [["l0"], ["l1"]]
    assert_saw(b)


def test_a_layer_run_twice_counts_twice():
    _, (a,) = session_of(1)
    x = randn(4, K)
    a(x), a(x)
    assert_saw(a, x, x)


def test_remembered_inputs_are_not_kept_alive():
    shared, observer = SharedInputs(), ARCObserver(K)
    x = randn(4, K)
    shared.add(x, observer.measure(x))
    assert shared.find(x) is not None
    del x
    assert shared.find(randn(4, K)) is None
    assert shared._seen == []
