"""arc::bf16_linear and the pass that calls it: linears that stay in bf16, while decoding."""

import pytest
import torch
from pass_tools import count, traced, unknown
from torch import Tensor

from arc_ao.ops import bf16_linear, native
from arc_ao.ops.bf16_linear import MAX_ROWS
from arc_ao.passes import use_native_linear as module
from arc_ao.passes.use_native_linear import use_native_linear

if native.load() is None:
    pytest.skip(f"no native kernels: {native.reason_absent()}", allow_module_level=True)


def tensors(rows: int, cols: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    make = lambda *sizes: torch.randn(*sizes, generator=generator).bfloat16()
    return make(rows, channels), make(cols, channels), make(cols)


def assert_rounded_once(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Half a unit of bf16, and fp32's error of a sum of K products."""
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    sizes = x.double().abs() @ weight.double().abs().t()
    assert found.dtype == torch.bfloat16
    bound = 2**-8 * exact.abs() + x.shape[1] * 2**-24 * sizes
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("channels", [1, 16, 31, 64, 100, 320])
@pytest.mark.parametrize("rows", [1, 3, 8, 19])
def test_linear(level, rows, channels):
    x, weight, bias = tensors(rows, 37, channels)
    assert_rounded_once(bf16_linear(x, weight, None), x, weight, None)
    assert_rounded_once(bf16_linear(x, weight, bias), x, weight, bias)


def test_nothing_to_multiply(level):
    x, weight, bias = tensors(2, 5, 16)
    assert bf16_linear(x[:0], weight, None).shape == (0, 5)
    assert bf16_linear(x, weight[:0], None).shape == (2, 0)
    assert torch.equal(bf16_linear(x[:, :0], weight[:, :0], bias), bias.expand(2, 5))


def test_any_strides_and_threads_give_the_same_bits(level):
    x, weight, bias = tensors(3, 200, 96)
    expected = bf16_linear(x, weight, bias)
    wide = torch.cat([weight, weight], 1)[:, :96]
    assert torch.equal(bf16_linear(x.t().contiguous().t(), wide, bias), expected)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(bf16_linear(x, weight, bias), expected)
    finally:
        torch.set_num_threads(threads)


def test_nan_stays_in_its_row_and_its_column(level):
    x, weight, _ = tensors(3, 9, 40)
    x[1, 39], weight[4, 0] = torch.nan, torch.inf
    found = bf16_linear(x, weight, None)
    assert found[1].isnan().all() and found[0, 4].isinf() and found[2, 4].isinf()
    assert found[0].isfinite().sum() == 8


def test_opcheck():
    torch.library.opcheck(torch.ops.arc.bf16_linear.default, tensors(2, 8, 48))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, b: (x.float(), w, b), r"x must be bf16 \[\*, \*\], got fp32 \[2, 16\]"),
        (lambda x, w, b: (x, w[:, :8], b), r"weight must be bf16 \[\*, 16\], got bf16 \[5, 8\]"),
        (lambda x, w, b: (x, w, b[:4]), r"bias must be bf16 \[5\], got bf16 \[4\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(RuntimeError, match=message):
        bf16_linear(*change(*tensors(2, 5, 16)))


# use_native_linear


@pytest.fixture
def fast(monkeypatch):
    """Our kernel is the faster one, for weights of any size."""
    monkeypatch.setattr(native, "pairs_are_fast", lambda: True)
    monkeypatch.setattr(module, "MIN_WEIGHT", 1)


SERVED = {
    "linear": lambda x, w, b: torch.nn.functional.linear(x, w),
    "with a bias": lambda x, w, b: torch.addmm(b, x, w.permute(1, 0)),
    "of two readers": lambda x, w, b: x @ w.t() + (x * 2) @ w.t(),
}


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.usefixtures("fast")
def test_our_kernel_takes_the_place_of_pytorch_s(name):
    fn, arguments = SERVED[name], tensors(2, 24, 64)
    gm = traced(fn, *arguments)
    products = 2 if name == "of two readers" else 1
    assert use_native_linear(gm.graph) == products
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    assert count(gm, torch.ops.arc.bf16_linear) == products
    assert not count(gm, torch.ops.aten.mm) and not count(gm, torch.ops.aten.addmm)
    exact = fn(*(a.double() for a in arguments))
    assert (gm(*arguments).double() - exact).abs().max() <= 2**-6 * exact.abs().max()


NOT_SERVED = {
    "many rows": (SERVED["linear"], MAX_ROWS + 1),
    "fp32": (lambda x, w, b: x.float() @ w.float().t(), 2),
    "a weight that is not transposed": (lambda x, w, b: x @ w[:, :24].reshape(64, 9), 2),
    "a weight in columns": (lambda x, w, b: x @ w.t().contiguous().t().t(), 2),
    "a bias of another shape": (lambda x, w, b: torch.addmm(b.expand(2, 24), x, w.t()), 2),
    "a scaled product": (lambda x, w, b: torch.addmm(b, x, w.t(), alpha=2), 2),
}


@pytest.mark.parametrize("name", NOT_SERVED)
@pytest.mark.usefixtures("fast")
def test_other_products_stay(name):
    fn, rows = NOT_SERVED[name]
    assert use_native_linear(traced(fn, *tensors(rows, 24, 64)).graph) == 0


@pytest.mark.usefixtures("fast")
def test_without_metadata_products_stay():
    gm = unknown(traced(SERVED["linear"], *tensors(2, 24, 64)))
    assert use_native_linear(gm.graph) == 0


def test_small_weights_and_other_machines_keep_pytorch_s(monkeypatch):
    gm = traced(SERVED["linear"], *tensors(2, 24, 64))
    monkeypatch.setattr(native, "pairs_are_fast", lambda: True)
    assert use_native_linear(gm.graph) == 0
    monkeypatch.setattr(module, "MIN_WEIGHT", 1)
    monkeypatch.setattr(native, "pairs_are_fast", lambda: False)
    assert use_native_linear(gm.graph) == 0
