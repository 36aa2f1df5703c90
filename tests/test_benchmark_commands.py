"""benchmarks/: the commands that its README lists, and that they are found from anywhere."""

import ast
import re
import subprocess
import sys

import pytest

from benchmarks.accuracy import store
from benchmarks.common import checkout
from benchmarks.common.checkout import ROOT

FOLDER = ROOT / "benchmarks"
PEER_SIDE = re.compile(r"with_\w+\.py")  # run inside other libraries' environments
SUITE = FOLDER / "gpu" / "gpu_suite.py"


def test_the_readme_lists_every_command():
    """Those are the files that run something where they are the main module."""
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    modules = re.findall(r"-m (benchmarks\.[a-z_.]+)", text)
    listed = {ROOT / f"{name.replace('.', '/')}.py" for name in modules}
    listed |= {ROOT / name for name in re.findall(r"`python (benchmarks/\S+\.py)", text)}
    assert listed == {
        path
        for path in FOLDER.rglob("*.py")
        if '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8")
        and not PEER_SIDE.fullmatch(path.name)
    }


def test_no_module_imports_in_a_circle():
    """Neither at the top of a module nor inside of its functions."""
    imports = {name_of(path): imported(path) for path in FOLDER.rglob("*.py")}
    while leaves := {name for name, others in imports.items() if not others & imports.keys()}:
        imports = {name: others for name, others in imports.items() if name not in leaves}
    assert not imports


def name_of(path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported(path) -> set[str]:
    """Modules that a file may import; of `from a import b` both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_the_gpu_suite_is_a_file_that_runs_from_anywhere(tmp_path):
    command = [sys.executable, "-E", str(SUITE), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "--dry-run" in done.stdout, done.stderr


def test_a_row_s_commit_is_that_of_what_measures(monkeypatch):
    """Every path that is named is there; the report's code is left out."""
    others = [f"benchmarks/accuracy/{name}" for name in store.NOT_MEASURING]
    assert all((ROOT / path).exists() for path in [*store.MEASURING, *others])
    asked = []
    monkeypatch.setattr(checkout, "_git", lambda *arguments: asked.append(arguments) or "")
    assert store.code_commit() == "unknown"
    assert asked[0][-len(others) :] == tuple(f":(exclude){path}" for path in others)


@pytest.mark.parametrize("status, suffix", [("", ""), (" M arc_ao/quantize.py", "+changes")])
def test_a_commit_says_whether_files_differ_from_it(monkeypatch, status, suffix):
    answers = {"log": "0123abc", "status": status}
    monkeypatch.setattr(checkout, "_git", lambda command, *_: answers[command])
    assert checkout.commit() == "0123abc" + suffix
