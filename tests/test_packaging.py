"""The repository keeps its own rules: sizes, pinned tools, complete packages, no machine paths."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
MAX_PYTHON_LINES = 400
MAX_SETUP_LINES = 60
# Written in pieces, so that this file does not contain them.
MACHINE_PATHS = [b"/" + name + b"/" for name in (b"work", b"root")]


def python_files() -> list[Path]:
    folders = [ROOT / name for name in ("arc_ao", "tests", "benchmarks", "docs")]
    return [ROOT / "setup.py"] + [path for folder in folders for path in folder.rglob("*.py")]


def line_count(path: Path) -> int:
    return len(path.read_text().splitlines())


def pins() -> dict[str, str]:
    """constraints.txt as canonical name -> version; every line must be an exact pin."""
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        text = line.partition("#")[0].strip()
        if text:
            name, version = text.split("==")
            pinned[canonicalize_name(name)] = version
    return pinned


def requirements() -> list[Requirement]:
    """Every dependency of the package and its extras, without the extras that name each other."""
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    parsed = [Requirement(text) for group in groups for text in group]
    return [requirement for requirement in parsed if requirement.name != PROJECT["name"]]


def tracked_files() -> list[Path]:
    """The files under version control; skips where the sources are not a git checkout."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    try:
        names = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"git cannot list the files: {error}")
    return [ROOT / name for name in names.split("\0") if name and (ROOT / name).is_file()]


def test_python_files_stay_short():
    """A file that needs more than 400 lines holds two things."""
    long = {
        str(p.relative_to(ROOT)): n
        for p in python_files()
        if (n := line_count(p)) > MAX_PYTHON_LINES
    }
    assert not long, f"over {MAX_PYTHON_LINES} lines: {long}"
    assert line_count(ROOT / "setup.py") <= MAX_SETUP_LINES


def test_no_machine_paths_under_version_control():
    """No tracked file names a folder of the machine it was written on."""
    found = [
        str(path.relative_to(ROOT))
        for path in tracked_files()
        if any(machine_path in path.read_bytes() for machine_path in MACHINE_PATHS)
    ]
    assert not found, f"files that name a machine path: {found}"


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_constraints_pin_every_dependency_within_its_range(requirement: Requirement):
    """The tested version of each dependency is pinned and satisfies the declared range."""
    version = pins().get(canonicalize_name(requirement.name))
    assert version is not None, f"constraints.txt does not pin {requirement.name}"
    assert requirement.specifier.contains(version), f"{version} is outside {requirement}"


def test_ruff_is_the_same_everywhere():
    """Lint, editor and pre-commit format alike only when they run one version."""
    pinned = pins()["ruff"]
    assert PYPROJECT["tool"]["ruff"]["required-version"] == f"=={pinned}"
    hooks = re.findall(r"ruff==([\w.]+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert hooks and set(hooks) == {pinned}


def test_building_needs_no_torch():
    """pip builds in isolation: neither the build requirements nor setup.py may pull in torch."""
    build = {Requirement(text).name for text in PYPROJECT["build-system"]["requires"]}
    assert build <= {"setuptools", "wheel"}
    imported = set()
    sources = [(ROOT / name).read_text() for name in ("setup.py", "build_native.py")]
    for node in (node for source in sources for node in ast.parse(source).body):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert imported <= {"setuptools", "build_native", "build_cuda"} | sys.stdlib_module_names


def test_build_contains_every_file_of_the_package(tmp_path: Path):
    """A wheel holds all modules and the shipped assets; an editable install never shows a gap."""
    library = tmp_path / "lib"
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    command += ["build_py", "--build-lib", str(library)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    sources = {
        path.relative_to(ROOT)
        for path in (ROOT / "arc_ao").rglob("*")
        if path.is_file() and path.suffix != ".so" and path.parent.name != "__pycache__"
    }
    built = {path.relative_to(library) for path in library.rglob("*") if path.is_file()}
    assert sources <= built, f"missing from the build: {sorted(map(str, sources - built))}"


def test_license_names_its_holder():
    """The licence declared in the metadata is the one in the file."""
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "BSD-3-Clause" and text.startswith("BSD 3-Clause License")
    assert "Copyright (c) 2026, The arc_ao authors" in text


def test_continuous_integration_is_executable():
    """A lost executable bit would turn the checks off."""
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
