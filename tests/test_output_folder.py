"""Outputs: what cannot be written is refused before the work; finished work is never lost."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from arc_ao import output_folder
from arc_ao.output_folder import (
    KeptElsewhereError,
    check_file,
    check_output,
    check_space,
    new_folder,
    write_or_keep,
)

ON_MOUNT = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("output_folder", sys.argv[2])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.check_output(sys.argv[1])
with module.new_folder(sys.argv[1]) as folder:
    open(folder / "config.json", "w").close()
print(sorted(os.listdir(sys.argv[1])))
"""


def written(output: Path) -> list[str]:
    """The files in `output` after the check and a write."""
    check_output(output)
    with new_folder(output) as folder:
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_text(name)
    return sorted(os.listdir(output))


@pytest.mark.parametrize("kind", ["new", "nested", "empty", "link", "dangling link", "here"])
def test_an_output_of_any_kind_is_written_whole(kind, tmp_path, monkeypatch):
    """A new folder, an empty one, what a link names, and the current folder by the name of `.`."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling link").symlink_to("elsewhere")
    monkeypatch.chdir(tmp_path / "empty")
    output = {"here": Path("."), "nested": tmp_path / "a" / "b"}.get(kind, tmp_path / kind)
    before = output.is_symlink()
    assert written(output) == ["config.json", "model.safetensors"]
    assert output.is_symlink() == before


def on_tmpfs(folder: Path, size: str, code: str) -> subprocess.CompletedProcess:
    """Run `code` with `folder` as its argument, where a file system of `size` is mounted."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"]).returncode:
        pytest.skip("this user may not mount a file system")
    mount = f"mount -t tmpfs -o size={size} tmpfs '{folder}' && exec \"$@\""
    python = [sys.executable, "-c", code, str(folder), output_folder.__file__]
    command = ["unshare", "-m", "sh", "-c", mount, "sh", *python]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_mount_point_is_written(tmp_path):
    """Such as a docker volume, which can neither be removed nor renamed over."""
    done = on_tmpfs(tmp_path, "1m", ON_MOUNT)
    assert done.stdout.splitlines()[-1:] == ["['config.json']"], done.stderr


def test_a_full_disk_is_refused(tmp_path):
    """A file system of 16 KiB, whose blocks are gone when the check is half written."""
    done = on_tmpfs(tmp_path, "16k", ON_MOUNT)
    assert done.returncode and "found: No space left on device" in done.stderr


def test_a_limit_of_file_size_is_refused_and_nothing_is_left(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="found: File too large"):
            check_output(tmp_path / "out" / "put")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("output", "found"),
    [
        ("file/output", "found: .*file is no folder"),
        ("/proc/output", "found: No such file or directory"),  # root may write all the others
        ("x" * 256, "File name too long"),
        ("file", "exists and is no folder"),
        ("full", "exists and is not empty"),
    ],
)
def test_what_cannot_be_written_is_refused_and_nothing_changes(output, found, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match=found):
        check_output(tmp_path / output)
    assert sorted(tmp_path.rglob("*")) == before


def test_too_little_space_is_refused(tmp_path):
    check_space(tmp_path / "a" / "b", 1)
    with pytest.raises(OSError, match=r"at least 1,000,000,000,000.0 MB of free space .* found"):
        check_space(tmp_path / "a" / "b", 10**18)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exists", [False, True])
def test_what_another_process_filled_meanwhile_is_left_and_ours_is_kept(exists, tmp_path):
    """Both checked one output; the slower one says where its own work is."""
    output = tmp_path / "output"
    if exists:
        output.mkdir()
    check_output(output)
    with pytest.raises(KeptElsewhereError) as raised:  # noqa: PT012, SIM117
        with new_folder(output) as folder:
            (folder / "config.json").write_text("ours")
            output.mkdir(exist_ok=True)
            (output / "config.json").write_text("theirs")
    assert (output / "config.json").read_text() == "theirs"
    kept = Path(str(raised.value).rpartition(" is in ")[2])
    assert (kept / "config.json").read_text() == "ours"


def test_work_is_kept_where_the_last_step_fails(tmp_path, monkeypatch):
    def refuse(private, target):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(output_folder, "_publish", refuse)
    with pytest.raises(KeptElsewhereError, match="Device or resource busy") as raised:
        write_or_keep(tmp_path / "output", lambda folder: (folder / "model").write_text("ours"))
    kept = Path(str(raised.value).rpartition(" is in ")[2])
    assert kept.parent == tmp_path and (kept / "model").read_text() == "ours"


def test_work_goes_to_the_temporary_folder_where_the_output_is_full(tmp_path, monkeypatch):
    """A disk that filled up, or a folder that went away, after the check."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(output_folder.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))

    def write(folder: Path) -> None:
        (folder / "model").write_text("ours")
        if tmp_path == folder.parent:
            raise OSError(28, "No space left on device")

    with pytest.raises(KeptElsewhereError, match="No space left on device") as raised:
        write_or_keep(tmp_path / "output", write)
    kept = Path(str(raised.value).rpartition(" is in ")[2])
    assert kept.parent == tmp_path / "temporary" and (kept / "model").read_text() == "ours"
    assert sorted(os.listdir(tmp_path)) == ["temporary"]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "a" / "b") as folder:
        (folder / "model").write_text("half")
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_checked_and_left_as_it_was(tmp_path):
    (tmp_path / "old").write_text("mine")
    for name in ("old", "new"):
        check_file(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["old"]
    assert (tmp_path / "old").read_text() == "mine"
    with pytest.raises(IsADirectoryError):
        check_file(tmp_path)
