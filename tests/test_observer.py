"""ARCObserver: its sums against a direct computation, however the tokens arrive."""

import copy
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from arc_ao import ARCConfig, ARCTensor, quantize_
from arc_ao.calibration import observer as observer_module
from arc_ao.calibration.input_sample import InputSample
from arc_ao.calibration.observer import ARCObserver, sorted_order
from arc_ao.calibration.session import observer_on
from arc_ao.formats import nvfp4

BOTH = ("none", "amax")


def activations(rows: int, channels: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    """Normal values of distinct magnitudes by channel, and an outlier channel, negative."""
    x = torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed))
    x[:, 3 % channels] = -40.0 - x[:, 3 % channels].abs()
    return (x * torch.linspace(1, 2, channels)).to(dtype)


def observed(*inputs: torch.Tensor, orders=("none",), name: str = "layer") -> ARCObserver:
    observer = ARCObserver(inputs[0].shape[-1], orders, name)
    for x in inputs:
        observer.observe(x)
    return observer


def direct_error(x: torch.Tensor) -> torch.Tensor:
    """Mean over rows of (x - Q(x))^2, row by row through `nvfp4.quantize`: [K]."""
    rows = [nvfp4.dequantize(*nvfp4.quantize(row))[: x.shape[1]] for row in x.float()]
    return (x.double() - torch.stack(rows).double()).square().mean(0)


def assert_same_statistics(left: ARCObserver, right: ARCObserver, rtol: float = 1e-12) -> None:
    assert torch.equal(left.amax, right.amax)
    assert left.count == right.count
    torch.testing.assert_close(left.square_sum, right.square_sum, rtol=rtol, atol=0)
    torch.testing.assert_close(left.error_sum, right.error_sum, rtol=rtol, atol=1e-300)


# 32 fills blocks, 172 is ragged, 5 is less than one block.
@pytest.mark.parametrize("channels", [32, 172, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_equal_a_direct_computation(channels, dtype):
    """amax, E[x^2] and E[(x - Q(x))^2] of 3-dimensional input; amax is of the absolute value."""
    x = activations(12, channels, dtype=dtype)
    statistics = observed(x.view(3, 4, channels)).statistics()
    assert torch.equal(statistics.amax, x.float().abs().amax(0))
    expected = x.double().square().mean(0).float()
    torch.testing.assert_close(statistics.mean_square, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        statistics.mean_error.double(), direct_error(x), rtol=1e-4, atol=1e-9
    )
    assert statistics.order is None


SIZES = {"amax": lambda x: x.abs().amax(0), "rms": lambda x: x.double().square().sum(0)}


@pytest.mark.parametrize("name, size", SIZES.items())
def test_sorted_blocks_have_the_errors_of_the_sorted_input(name, size):
    """Error statistics of an order are those of x[:, order], put back into natural order."""
    x = activations(16, 48)
    statistics = observed(x, orders=("none", "amax", "rms")).statistics(name)
    order = sorted_order(size(x))
    assert torch.equal(statistics.order, order) and order[0] == 3
    assert not torch.equal(order, sorted_order(SIZES["amax" if name == "rms" else "rms"](x)))
    expected = torch.empty(48, dtype=torch.float64)
    expected[order.long()] = direct_error(x[:, order])
    torch.testing.assert_close(statistics.mean_error.double(), expected, rtol=1e-4, atol=1e-9)


def distance_to_final_order(batches: list[torch.Tensor]) -> float:
    """Relative L1 distance of running "amax" statistics from those of the order at the end."""
    running = observed(*batches, orders=BOTH)
    final = ARCObserver(48, BOTH)
    final.amax.copy_(running.amax)  # the final order from the first token on
    for x in batches:
        final.observe(x)
    running, final = running.statistics("amax"), final.statistics("amax")
    assert torch.equal(running.order, final.order)
    return ((running.mean_error - final.mean_error).abs().sum() / final.mean_error.sum()).item()


def test_sorted_statistics_settle_to_those_of_the_final_order():
    """Batches before the order settles keep their errors, whose share of the mean fades."""
    generator = torch.Generator().manual_seed(0)
    sizes = 1.1 ** torch.arange(48)  # apart enough for one batch to show their order
    batches = [(2 * torch.rand(64, 48, generator=generator) - 1) * sizes for _ in range(24)]
    batches[0] = batches[0].flip(1)
    early, late = distance_to_final_order(batches[:4]), distance_to_final_order(batches)
    assert distance_to_final_order(batches[1:]) < 1e-6
    assert 0 < late < early / 4 and late < 0.05


def test_buffers_do_not_grow_with_tokens():
    """O(K): the same bytes after one token and after ten thousand."""
    one, many = observed(activations(1, 64)), observed(activations(10_000, 64))
    sizes = [sum(b.nbytes for b in o.buffers()) for o in (one, many)]
    assert sizes[0] == sizes[1] == 64 * (4 + 8 + 8) + 8


def test_chunks_and_batches_do_not_change_the_sums(monkeypatch):
    """One batch, four ragged batches, single rows at a time, an empty one among them."""
    x = activations(50, 32)
    whole = observed(x, orders=("none",))
    assert_same_statistics(observed(x[:7], x[7:8], x[8:8], x[8:]), whole)
    monkeypatch.setattr(observer_module, "CHUNK_ELEMENTS", 7 * 32)
    assert_same_statistics(observed(x), whole)


def test_merge_is_observing_both_and_reset_forgets():
    x, y = activations(10, 32), activations(20, 32, seed=1)
    merged = observed(x)
    merged.merge(observed(y))
    assert_same_statistics(merged, observed(x, y))
    merged.reset()
    assert_same_statistics(merged, ARCObserver(32))


def test_missing_statistics_are_refused_by_name():
    with pytest.raises(ValueError, match="^model.q: expected calibration tokens, found none"):
        ARCObserver(16, name="model.q").statistics()
    with pytest.raises(ValueError, match="^layer: expected statistics for channel_order 'amax'"):
        observed(activations(2, 16)).statistics("amax")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_non_finite_input_is_refused_and_changes_nothing(value):
    observer = observed(activations(4, 32), orders=BOTH)
    before = copy.deepcopy(observer.state_dict())
    bad = activations(4, 32, seed=1)
    bad[2, 5] = value
    with pytest.raises(ValueError, match="^layer: calibration input holds NaN or Inf"):
        observer.observe(bad)
    assert all(torch.equal(before[k], v) for k, v in observer.state_dict().items())


def test_changing_the_models_dtype_keeps_the_sums_exact():
    """`model.bfloat16()` must not round statistics, nor those that follow."""
    x = activations(40, 32, dtype=torch.bfloat16)
    observer = observed(x[:20]).bfloat16()
    observer.observe(x[20:])
    assert_same_statistics(observer, observed(x))


def _all_reduced(rank: int, port: int, x: torch.Tensor, path: str) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mine = x[:3] if rank == 0 else x[3:]
    observer = observed(mine)
    observer.sample = InputSample(4)
    observer.sums_products = True
    if rank == 0:  # the other measured nothing itself, as a linear that shares its input
        observer.keep(mine)
    else:
        observer.sample.add(mine)
    observer.all_reduce()
    found = observer.state_dict(), observer.sample.rows(), observer.gram.take()
    torch.save(found, f"{path}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow  # two processes import torch
def test_two_processes_equal_one_on_the_union(tmp_path):
    """all_reduce over gloo, with unequal shares of the tokens."""
    x = activations(20, 32)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_all_reduced, args=(port, x, str(tmp_path)), nprocs=2)
    for rank in range(2):
        observer = ARCObserver(32)
        state, rows, gram = torch.load(tmp_path / f"{rank}.pt")
        observer.load_state_dict(state)
        assert_same_statistics(observer, observed(x))
        assert torch.equal(rows, torch.cat((x[:2], x[3:5])))  # an even share of each
        energy = x[:3].square().sum(1)
        weight = (energy.median() / energy).clamp(max=1)
        expected = (x[:3] * weight.unsqueeze(1)).T @ x[:3] / weight.sum()
        torch.testing.assert_close(gram, expected)


def prepared_model(seed: int = 0) -> tuple[nn.Module, ARCConfig]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
    config = ARCConfig(recipe="balanced", budget=0.3, step="prepare")
    quantize_(model, config)
    return model, config.with_step("convert")


@pytest.mark.parametrize("route", ["state_dict", "deepcopy", "half_way"])
def test_a_prepared_model_survives_copies(route):
    """The copy converts to the same bits as the original, which it leaves prepared."""
    (model, convert), x = prepared_model(), activations(64, 32)
    model(x[:32])
    other = copy.deepcopy(model)
    other(x[32:])
    assert (observer_on(model[0]).count, observer_on(other[0]).count) == (32, 64)
    model(x[32:])
    if route == "deepcopy":
        other = copy.deepcopy(model)
    elif route == "state_dict":
        other, _ = prepared_model(seed=1)
        other.load_state_dict(model.state_dict())
    quantize_(other, convert)
    assert observer_on(model[0]) is not None
    quantize_(model, convert)
    for left, right in ((model[0].weight, other[0].weight), (model[2].weight, other[2].weight)):
        assert isinstance(right, ARCTensor)
        assert torch.equal(left.qdata, right.qdata)
        assert torch.equal(left.act_blocks, right.act_blocks)
