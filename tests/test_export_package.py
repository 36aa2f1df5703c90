"""Packages ahead of time: run by a process without our Python, and by a C++ program."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import VOCAB_SIZE, Logits, tiny_llama
from torch import Tensor
from torch.utils import cpp_extension

import arc_ao
import build_native
from arc_ao.ops import native

if native.load() is None:
    pytest.skip(f"no native library: {native.reason_absent()}", allow_module_level=True)

SOURCE = Path(__file__).parent / "cpp" / "run_package.cpp"
TOKENS = torch.randint(VOCAB_SIZE, (2, 48), generator=torch.Generator().manual_seed(0))
SHORT = TOKENS[:, :13].contiguous()
WEIGHT_BYTES_FACTOR, FIXED_BYTES = 1.1, 5_000_000


@pytest.fixture(scope="module")
def model() -> Logits:
    llama = tiny_llama(hidden_size=128, intermediate_size=256).bfloat16()
    config = arc_ao.ARCConfig(recipe="balanced", budget=0.2)
    arc_ao.quantize_(llama, config, calibration_data=[TOKENS], progress=False)
    return Logits(llama)


@pytest.fixture(scope="module")
def package(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("package") / "model.pt2"
    length = torch.export.Dim("length", min=2, max=64)
    with torch._inductor.config.patch(emulate_precision_casts=True):
        return arc_ao.export_package(model, (TOKENS,), path, dynamic=({1: length},))


def in_package(path: Path, ids: Tensor) -> Tensor:
    return torch._inductor.aoti_load_package(str(path))(ids)


@pytest.mark.slow
def test_the_package_gives_the_eager_bits_at_other_lengths_and_is_small(model, package):
    with torch.no_grad():
        assert torch.equal(in_package(package, SHORT), model(SHORT))
        assert torch.equal(in_package(package, TOKENS), model(TOKENS))
    stored = sum(t.nbytes_stored for t in arc_ao.summary.arc_tensors(model).values())
    rest = sum(p.nbytes for p in model.parameters() if not isinstance(p, arc_ao.ARCTensor))
    size = package.stat().st_size
    assert size <= WEIGHT_BYTES_FACTOR * (stored + rest) + FIXED_BYTES


@pytest.mark.slow
def test_a_process_without_our_python_reproduces_the_logits(package, tmp_path):
    torch.save((SHORT, in_package(package, SHORT)), tmp_path / "io.pt")
    program = (
        "import sys, torch\n"
        f"torch.ops.load_library({str(arc_ao.library_path())!r})\n"
        f"ids, expected = torch.load({str(tmp_path / 'io.pt')!r})\n"
        f"run = torch._inductor.aoti_load_package({str(package)!r})\n"
        "assert torch.equal(run(ids), expected) and 'arc_ao' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(build_native.compiler() is None, reason="no C++ compiler")
def test_a_program_in_cpp_reproduces_the_logits(package, tmp_path):
    binary, folders = tmp_path / "run_package", cpp_extension.library_paths()
    command = [*build_native.compiler(), "-std=c++20", "-O1", "-w", str(SOURCE), "-o", str(binary)]
    command += [f"-I{folder}" for folder in cpp_extension.include_paths()]
    command += [f"-L{folder}" for folder in folders] + [f"-Wl,-rpath,{f}" for f in folders]
    command += ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (tmp_path / "ids").write_bytes(SHORT.numpy().tobytes())
    arguments = [arc_ao.library_path(), package, tmp_path / "ids", *SHORT.shape, tmp_path / "out"]
    done = subprocess.run([binary, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logits = torch.frombuffer(bytearray((tmp_path / "out").read_bytes()), dtype=torch.bfloat16)
    assert torch.equal(logits, in_package(package, SHORT).flatten())


def test_a_path_that_is_no_package_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"a path that ends in .pt2, got .*model.bin"):
        arc_ao.export_package(model, (TOKENS,), tmp_path / "model.bin")
