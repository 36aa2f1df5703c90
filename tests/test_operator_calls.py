"""What operators do with calls that do not fit: refuse them, keep nothing, read nothing."""

import gc
import json
import subprocess
import sys
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from arc_ao.ops import attention, native, nvfp4_gemm, quant_augment, round_columns
from arc_ao.ops.nvfp4_gemm import nvfp4_gemm_eager
from arc_ao.ops.quant_augment import quant_augment_eager
from benchmarks.common.checkout import ROOT
from benchmarks.operators import fuzz

ROWS, COLUMNS, BLOCKS = 3, 20, 4
HUGE = 1 << 50
needs_library = pytest.mark.skipif(native.load() is None, reason="no native library")


def operands() -> dict:
    """Arguments of nvfp4_gemm, in schema order."""
    g = torch.Generator().manual_seed(0)
    codes = lambda *sizes: torch.randint(0, 256, sizes, generator=g, dtype=torch.uint8)
    return {
        "a": codes(ROWS, 8 * (BLOCKS + 1)),
        "a_scale": codes(ROWS, BLOCKS + 1) % 0x7F,
        "a_outer": torch.ones(ROWS),
        "b": codes(COLUMNS, 8 * BLOCKS),
        "b_scale": codes(COLUMNS, BLOCKS) % 0x7F,
        "b_outer": torch.ones(1),
        "bias": torch.ones(COLUMNS),
        "out_dtype": torch.float32,
        "act_blocks": torch.zeros(1, dtype=torch.int32),
        "base_blocks": BLOCKS,
        "b_layout": "plain",
    }


@needs_library
@pytest.mark.parametrize("operand", ["a", "b"])
def test_a_copy_that_fails_keeps_no_argument(operand):
    """Of rows that no memory holds, all of them the same: every other argument is given back, and
    the message names the argument."""
    arguments = operands() | {"a_outer": torch.ones(1), "bias": None}
    for name in (operand, f"{operand}_scale"):
        arguments[name] = arguments[name][:1].expand(HUGE, -1)
    alive = [weakref.ref(x) for x in arguments.values() if isinstance(x, Tensor)]
    with pytest.raises(RuntimeError, match=rf"nvfp4_gemm: {operand}: no contiguous copy of uint8"):
        nvfp4_gemm(*arguments.values())
    arguments.clear()
    gc.collect()
    assert [reference() for reference in alive] == [None] * len(alive)


@pytest.mark.parametrize("name", ["a", "a_scale", "a_outer", "b", "b_scale", "b_outer", "bias"])
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.new_zeros(()),
        lambda t: t.unsqueeze(-1),
        lambda t: t.double(),
        lambda t: t.to_sparse(),
        lambda t: t.float().to_mkldnn(),
        lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
        lambda t: torch.nested.nested_tensor([t.float(), t.float()]),
    ],
    ids=["scalar", "rank", "dtype", "sparse", "mkldnn", "quantized", "nested"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_what_is_no_dense_tensor_of_its_shape_is_refused(name, change):
    """By the kernel, by the meaning, and in tracing where PyTorch can trace it."""
    arguments = operands()
    arguments[name] = change(arguments[name])
    for operator in (nvfp4_gemm, nvfp4_gemm_eager):
        with pytest.raises(RuntimeError, match="nvfp4_gemm"):
            operator(*arguments.values())
    if arguments[name].layout is torch.strided and type(arguments[name]) is Tensor:
        if arguments[name].is_nested or arguments[name].is_quantized:
            return
        mode = FakeTensorMode()
        fake = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments.values()]
        with pytest.raises(RuntimeError, match=f"nvfp4_gemm: {name} "):
            nvfp4_gemm(*fake)


@pytest.mark.parametrize("size", [0, 8])
def test_memory_that_was_given_back_is_not_read(size):
    """As of a parameter whose storage is freed between two uses."""
    x, none = torch.randn(4, 32), torch.zeros(0, dtype=torch.int32)
    x.untyped_storage().resize_(size)
    for operator in (quant_augment, quant_augment_eager):
        with pytest.raises(RuntimeError, match=rf"quant_augment: x .* only {size} bytes of memory"):
            operator(x, none, none, None, "token")


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e300])
def test_an_attention_of_a_scale_that_is_no_number_is_refused(scale):
    query = torch.zeros(1, 1, 2, 4).bfloat16()
    with pytest.raises(RuntimeError, match="attention: scale must be finite, also in fp32"):
        attention(query, query, query, None, False, scale)


def test_sizes_of_nothing_end_at_once():
    """Rows without columns, as many as a size can say."""
    none = torch.empty(0, 1 << 62)
    codes, _, errors = round_columns(none, none, torch.empty(0, 0), none, None, None)
    assert codes.shape == errors.shape == none.shape
    query = torch.empty(1, 1, 1 << 62, 0, dtype=torch.bfloat16)
    key = torch.empty(1, 1, 3, 0, dtype=torch.bfloat16)
    if native.load() is not None:  # PyTorch's own attention goes through all rows
        assert attention(query, key, key, None, False, 1.0).shape == query.shape


class Product(nn.Module):
    """nvfp4_gemm alone, its operands as inputs."""

    def forward(self, a, a_scale, b, b_scale, act_blocks):
        outers = a.new_ones(1, dtype=torch.float32), a.new_ones(1, dtype=torch.float32)
        return torch.ops.arc.nvfp4_gemm(
            a, a_scale, outers[0], b, b_scale, outers[1], None, torch.float32, act_blocks, BLOCKS
        )


@needs_library
@pytest.mark.slow
def test_an_exported_package_refuses_the_same_calls(tmp_path):
    """Ids that b lacks, in a graph that was compiled without looking at them."""
    names = ("a", "a_scale", "b", "b_scale", "act_blocks")
    given = [operands()[name] for name in names]
    program = torch.export.export(Product(), tuple(given))
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "product.pt2")
    )
    run = torch._inductor.aoti_load_package(str(path))
    torch.testing.assert_close(run(*given), Product()(*given))
    with pytest.raises(RuntimeError):
        run(*given[:-1], torch.full((1,), BLOCKS, dtype=torch.int32))
    freed = given[2].clone()
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        run(*given[:2], freed, *given[3:])


def fuzzed(*options: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.operators.fuzz", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_random_calls_are_right_or_refused():
    """The first ones of those that `benchmarks/operators/fuzz.py` makes."""
    counts = fuzzed("--calls", "600")
    assert counts["right"] + counts["refused"] == 600 and counts["right"] > 300


def test_a_call_that_ends_its_process_is_counted(monkeypatch, capsys):
    """The one behind the last number that was printed; the rest are run in a new process."""

    def run(command, **_):
        first, count = int(command[-3]), int(command[-1])
        died = first <= 2 < first + count
        numbers = range(first, 3 if died else first + count)
        lines = [
            f'{n}\n{{"op": "attention", "kind": "right", "why": "", "spoilt": ""}}' for n in numbers
        ]
        lines = lines[:-1] + ["2"] if died else lines
        return subprocess.CompletedProcess(command, -11 if died else 0, "\n".join(lines), "")

    monkeypatch.setattr(fuzz.subprocess, "run", run)
    outcomes = fuzz.run_all(0, 6)
    assert [o["kind"] for o in outcomes] == ["right", "right", "crash", "right", "right", "right"]
    assert fuzz.report(outcomes) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["crash"] == 1
