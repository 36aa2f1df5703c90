"""Which CUDA backend is taken and why; which route multiplies. No GPU is needed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from arc_ao.ops.backends import OPERATORS, UNQUANTIZED, WEIGHTS
from arc_ao.ops.cuda import dispatch, tuning
from arc_ao.ops.cuda.tuning import Rule

ROOT = Path(__file__).parent.parent
PYTORCH_S = [name.removeprefix("arc::") for name in (*UNQUANTIZED, *WEIGHTS)]
QUANTIZED = [name for name in OPERATORS if name not in (*UNQUANTIZED, *WEIGHTS)]


@pytest.mark.parametrize(
    "absent, expected",
    [
        ((None, None), "blackwell"),
        (("not built", None), "triton"),
        (("not built", "not installed"), "eager"),
        ((None, "not installed"), "blackwell"),
    ],
)
def test_the_best_present_backend_is_taken(absent, expected):
    """And the reason names what every better one lacks."""
    choice = dispatch.choose((12, 0), blackwell_absent=absent[0], triton_absent=absent[1])
    assert choice.backend == expected and choice.reason.startswith("sm_120")
    better = dispatch.BACKENDS[: dispatch.BACKENDS.index(expected)]
    assert all(f"no {name}: not " in choice.reason for name in better)


def test_a_wanted_backend_is_taken_or_refused():
    """The variable is obeyed; what cannot run says why, what does not exist says what does."""
    absent = {"blackwell_absent": "not built", "triton_absent": None}
    assert dispatch.choose((9, 0), **absent, wanted="eager").backend == "eager"
    with pytest.raises(ValueError, match="ARC_AO_CUDA_BACKEND=blackwell: not built"):
        dispatch.choose((9, 0), **absent, wanted="blackwell")
    with pytest.raises(ValueError, match="expected one of .*'triton'.* got 'cutlass'"):
        dispatch.choose((9, 0), **absent, wanted="cutlass")


@pytest.fixture
def device(monkeypatch):
    """Function that makes torch report a GPU of some capability."""

    def report(capability: tuple[int, int], *, has_triton: bool) -> None:
        monkeypatch.delenv(dispatch.BACKEND_VARIABLE, raising=False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        present = {"triton"} if has_triton else set()
        monkeypatch.setattr(dispatch, "find_spec", lambda name: name in present or None)

    dispatch.choice_for.cache_clear()
    yield report
    dispatch.choice_for.cache_clear()


def test_a_gpu_without_kernels_warns_once(device):
    """A slow GPU is never silent: too old, or triton missing; the second call says nothing."""
    device((7, 5), has_triton=True)
    with pytest.warns(UserWarning, match="reference operators on cuda:0: .*need sm_80.*sm_75"):
        assert dispatch.choice_for(0).backend == "eager"
    assert dispatch.choice_for(0).backend == "eager"  # a warning here would fail as an error
    device((9, 0), has_triton=False)
    with pytest.warns(UserWarning, match="cuda:1: .*triton is not installed"):
        assert dispatch.choice_for(1).backend == "eager"


def test_hopper_takes_triton_and_the_plain_layout(device):
    device((9, 0), has_triton=True)
    assert dispatch.choice_for(0).backend == "triton"
    assert dispatch.weight_layout(torch.device("cuda", 0)) == "plain"


@pytest.mark.parametrize("name", [name.removeprefix("arc::") for name in QUANTIZED])
def test_every_operator_has_an_implementation_on_every_backend(name):
    """Also for weights in a layout that Triton does not read: the meaning."""
    pytest.importorskip("triton", reason="the kernels for NVIDIA GPUs are written in triton")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"arc::{name}", "CUDA")
    eager = object()
    assert dispatch.implementation(name, "eager", eager, ()) is eager
    assert dispatch.implementation(name, "triton", eager, ("swizzled",)) is eager
    kernel = dispatch.implementation(name, "triton", eager, ("token", torch.zeros(2)))
    assert kernel.__name__ == name and kernel.__module__.startswith("arc_ao.ops.cuda.triton_")


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
@pytest.mark.parametrize("name", PYTORCH_S)
def test_what_is_not_quantized_is_pytorch_s_on_gpus(name, backend, monkeypatch):
    """Which has kernels of its own there; weights are quantized by the meaning."""
    monkeypatch.setattr(dispatch, "import_module", lambda module: object())
    eager = object()
    assert dispatch.implementation(name, backend, eager, ()) is eager
    dispatch.kernel_of.cache_clear()


def test_a_kernel_is_looked_up_once(monkeypatch):
    """Calls behind the first import nothing, and a swizzled weight still takes the meaning."""
    pytest.importorskip("triton", reason="the kernels for NVIDIA GPUs are written in triton")
    eager = object()
    first = dispatch.implementation("nvfp4_gemm", "triton", eager, ())
    monkeypatch.setattr(dispatch, "import_module", None)
    assert dispatch.implementation("nvfp4_gemm", "triton", eager, ("plain",)) is first
    dispatch.kernel_of.cache_clear()
    assert dispatch.implementation("nvfp4_gemm", "triton", eager, ("swizzled",)) is eager
    with pytest.raises(TypeError, match="not callable"):
        dispatch.implementation("nvfp4_gemm", "triton", eager, ())


def test_nothing_imports_triton_before_a_gpu_is_used():
    """Importing the package, the operators or reporting on the machine leaves it alone."""
    code = (
        "import sys; import arc_ao.ops, arc_ao.env; arc_ao.ops.cuda.dispatch.triton_absent((9, 0));"
        "assert not [m for m in sys.modules if m.startswith('arc_ao.ops.cuda.triton_')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_rules_are_tried_in_order_and_the_last_fits_everything():
    """Every M up to a bound, then the next; K_aug may exceed a rule's K by a quarter."""
    table = tuning.table(None)
    routes = [tuning.choose(None, m, 4096, 4096).route for m in (1, 2, 16, 17, 256, 257, 10**6)]
    assert routes == ["row", "row", "tiles", "tiles", "tiles", "decode", "decode"]
    assert tuning.choose((6, 1), 16, 1, 16) == tuning.choose(None, 16, 1, 16)
    assert [r.max_m for r in table] == sorted(r.max_m or 10**9 for r in table[:-1]) + [None]
    rule = Rule("tiles", max_m=4, n=512, k=1024)
    assert rule.fits(4, 512, 1024) and rule.fits(1, 512, 1280)
    assert not any(rule.fits(*s) for s in ((5, 512, 1024), (4, 511, 1024), (4, 512, 1281)))
    assert not rule.fits(4, 512, 1008)


def test_tables_survive_writing(tmp_path, monkeypatch):
    """What is written is what is read; a table with a hole, or an unknown route, is refused."""
    rules = [Rule("row", max_m=1, n=8, k=16, block_n=4), Rule("tiles", num_warps=8)]
    path = tmp_path / "sm_90.json"
    path.write_text(json.dumps({"rules": [rule.document() for rule in rules]}))
    assert tuning.read_table(path) == tuple(rules)
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    assert tuning.table_path((9, 0)) == path and tuning.table_path((8, 0)).name == "default.json"
    path.write_text(json.dumps({"rules": [rules[0].document()]}))
    with pytest.raises(ValueError, match="sm_90.json: the last rule must fit every shape"):
        tuning.read_table(path)
    with pytest.raises(ValueError, match="route: expected one of"):
        Rule("columns")


def test_tables_are_in_the_package():
    """setup installs them, and each has a fallback for all shapes."""
    names = {path.name for path in tuning.TABLES.glob("*.json")}
    assert "default.json" in names
    assert all(tuning.read_table(tuning.TABLES / name) for name in names)


def test_a_measured_table_is_one_that_is_read(tmp_path, monkeypatch):
    """Every candidate, placed on a shape, survives; a route that is best again extends its rule."""
    pytest.importorskip("triton", reason="the kernels for NVIDIA GPUs are written in triton")
    from benchmarks.gpu import tune

    shape = tune.SHAPES[0]
    rules = [tune.placed(r, m, shape) for m in (1, 4, 256) for r in tune.candidates(m)]
    assert {rule.route for rule in rules} == {"row", "tiles", "decode"}
    rules += tuning.read_table(tuning.TABLES / "default.json")
    path = tmp_path / "sm_90.json"
    path.write_text(tune.table_text({"capability": "9.0", "measured": {"gpu": "x"}}, rules))
    assert tuning.read_table(path) == tuple(rules)
    monkeypatch.setattr(tune.providers, "build", lambda *_: None)
    order = iter([Rule("row")] * 3 + [Rule("tiles")] * 2 + [Rule("decode")] * 6)
    monkeypatch.setattr(tune, "fastest", lambda *_: next(order))
    tiny = tune.Shape("tiny", "square", 16, 16)
    best = tune.best_rules(torch.device("cpu"), tiny, {})
    assert [(r.route, r.max_m, r.n, r.k) for r in best] == [
        ("row", 4, 16, 16), ("tiles", 16, 16, 16), ("decode", 1024, 16, 16)
    ]  # fmt: skip


def test_the_suite_runs_from_a_bare_checkout(tmp_path):
    """With torch alone: the operators load without arc_ao's other imports, and a dry run checks,
    times and writes its report."""
    code = (
        "import sys; from benchmarks.gpu import gpu_suite;"
        "gpu_suite.load_operators.__defaults__ = (('no_such_package',),);"
        f"status = gpu_suite.main(['--dry-run', '--output', {str(tmp_path)!r}, '--budget', '60']);"
        "heavy = {'torchao', 'transformers', 'rich', 'matplotlib'} & sys.modules.keys();"
        "assert not heavy, heavy; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    document = json.loads((tmp_path / "gpu_suite.json").read_text())
    verdicts = {check["verdict"] for check in document["checks"]}
    assert verdicts == {"PASS", "skipped"} and document["dry_run"]
    assert {t["provider"] for t in document["timings"]} == {"bf16", "nvfp4", "arc", "quantize"}
    assert document["notes"]["imports"] == "without no_such_package"
    measured = [line["name"] for line in document["acceptance"] if line["value"] is not None]
    assert measured == ["correctness cases that failed"]  # no figure of a CPU passes for a GPU's
    assert "Dry run on a CPU" in (tmp_path / "gpu_suite.md").read_text()
