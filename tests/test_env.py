"""The environment report: what it says must be what the machine says."""

import json

import pytest
import torch

from arc_ao import env
from arc_ao.ops import backends

OPS = {
    "arc::quant_augment": {"backend": "eager", "reason": "no native kernel for this [device]"},
    "arc::nvfp4_gemm": {"backend": "eager", "reason": "reference, runs everywhere"},
}
FLAGS_X86 = """\
processor\t: 0
model name\t: Example CPU @ 2.00GHz
flags\t\t: fpu sse2 avx2 avx512f avx512_vnni amx_tile

processor\t: 1
model name\t: Another CPU
flags\t\t: fpu amx_bf16
"""
FLAGS_ARM = "processor\t: 0\nFeatures\t: fp asimd bf16 sve\n"


GPU = {
    "capability": "12.0",
    "fp4_tensor_cores": True,
    "backend": "triton",
    "reason": "sm_120; no blackwell: not built",
}


def report_of(cpuinfo: str | None) -> dict:
    """A report that needs no operator and no GPU."""
    return {
        "versions": env._versions(),
        "platform": "Example-1.0",
        "cpu": env.cpu_report(cpuinfo),
        "cuda": [{"name": "Example GPU", **GPU}],
        "cuda_library": "built for sm_120f",
        "ops": OPS,
    }


def test_instruction_sets_are_whole_words_of_the_first_core():
    """amx_tile is not amx_int8, avx512f is not avx512_bf16, and a later core adds nothing."""
    assert env.instruction_sets(FLAGS_X86) == {
        "avx2": True,
        "avx512f": True,
        "avx512_vnni": True,
        "avx512_bf16": False,
        "amx_bf16": False,
        "amx_int8": False,
    }


@pytest.mark.parametrize(
    "cpuinfo, expected",
    [
        (FLAGS_ARM, False),  # a flag line without x86 sets: absent
        (None, "unknown"),  # no such file
        ("", "unknown"),  # a file without a flag line
    ],
)
def test_absent_and_unknown_instruction_sets_differ(cpuinfo: str | None, expected: bool | str):
    """A machine that does not tell its sets is not one that lacks them."""
    assert env.instruction_sets(cpuinfo) == dict.fromkeys(env.INSTRUCTION_SETS, expected)


def test_cpu_report_reads_model_and_torch():
    """The model is cpuinfo's, the capability and the threads are torch's."""
    cpu = env.cpu_report(FLAGS_X86)
    assert cpu["model"] == "Example CPU @ 2.00GHz"
    assert cpu["torch_capability"] == torch.backends.cpu.get_cpu_capability()
    assert cpu["threads"] == torch.get_num_threads()
    assert cpu["memory_gib"] is None or cpu["memory_gib"] > 0.1


@pytest.mark.skipif(not env.CPUINFO_PATH.exists(), reason="this system has no cpuinfo file")
def test_instruction_sets_of_this_machine_cover_what_torch_uses():
    """Torch dispatches to a set only where the kernel reports it."""
    sets = env.instruction_sets(env._read_cpuinfo())
    needed = {"AVX2": "avx2", "AVX512": "avx512f"}
    capability = torch.backends.cpu.get_cpu_capability()
    if capability in needed:
        assert sets[needed[capability]] is True
    if sets["avx512f"] is True:
        assert sets["avx2"] is True


@pytest.mark.parametrize(
    "capability, fp4",
    [((8, 0), False), ((9, 0), False), ((10, 0), True), ((10, 3), True), ((12, 1), True)],
)
def test_fp4_tensor_cores_begin_with_blackwell(monkeypatch, capability: tuple[int, int], fp4: bool):
    """Hopper has no FP4 tensor cores, every later generation has."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "Example GPU")
    monkeypatch.setattr(backends, "cuda_backend", lambda i: {"backend": "triton", "reason": "-"})
    (device,) = env._cuda_devices()
    assert device["fp4_tensor_cores"] is fp4
    assert device["capability"] == f"{capability[0]}.{capability[1]}"


def test_versions_name_what_is_missing(monkeypatch):
    """A distribution that is absent is said to be absent; the others keep their versions."""
    monkeypatch.setitem(env.DISTRIBUTIONS, "lm_eval", "no-such-distribution-for-arc-ao")
    versions = env._versions()
    assert versions["lm_eval"] == "not installed"
    assert versions["torch"] == torch.__version__


@pytest.mark.parametrize("cpuinfo", [FLAGS_X86, None])
def test_table_contains_every_op_and_reason(cpuinfo: str | None):
    """Backend and reason are printed as they are, brackets included, in lines that fit."""
    table = env.format_env_report(report_of(cpuinfo))
    for name, op in OPS.items():
        (line,) = [line for line in table.splitlines() if name in line]
        assert f"{op['backend']}: {op['reason']}" in line
    gpu = "sm_120, has FP4 tensor cores; operators: triton (sm_120; no blackwell: not built)"
    assert gpu in " ".join(table.split())
    assert ("avx512_vnni yes" if cpuinfo else "avx512_vnni unknown") in " ".join(table.split())
    assert max(map(len, table.splitlines())) <= env.TABLE_WIDTH
    assert table.isascii()


def test_report_of_this_machine_survives_json():
    """The whole report is plain data, and every operator of the package is in it."""
    from arc_ao.ops import OPERATORS

    report = env.env_report()
    assert json.loads(json.dumps(report)) == report
    assert set(report["ops"]) == set(OPERATORS)
    assert all(op["backend"] and op["reason"] for op in report["ops"].values())
    env.format_env_report(report)
