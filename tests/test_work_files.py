"""Files of a work folder: private while they are written, whole or refused by name, of one run."""

import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from arc_ao.calibration import work_dir
from arc_ao.calibration.work_dir import WorkDir

RUN = {"model": "1"}
STATE = {"left": torch.arange(64.0)}


def finished(folder: Path, run: dict[str, str] = RUN) -> Path:
    """A work folder with one file, which is returned."""
    with WorkDir(folder, run) as work:
        work.save_tuning(STATE, {"step": 3})
    return folder / work_dir.TUNING


def load(folder: Path, run: dict[str, str] = RUN):
    with WorkDir(folder, run) as work:
        return work.load_tuning()


def test_what_was_saved_is_loaded(tmp_path):
    finished(tmp_path)
    tensors, notes = load(tmp_path)
    assert torch.equal(tensors["left"], STATE["left"]) and notes == {"step": 3}


def test_links_are_not_followed(tmp_path):
    """Neither under the name of a temporary file that a process id tells, nor under the final."""
    victim, folder = tmp_path / "victim", tmp_path / "work"
    victim.write_text("precious")
    folder.mkdir()
    for name in (work_dir.TUNING, work_dir.FINGERPRINT):
        (folder / f".tmp-{os.getpid()}-{name}").symlink_to(victim)
    with WorkDir(folder, RUN) as work:
        (folder / work_dir.TUNING).symlink_to(victim)
        (folder / f".tmp-{os.getpid()}-{work_dir.TUNING}").symlink_to(victim)
        work.save_tuning(STATE, {})
    assert victim.read_text() == "precious"
    assert not (folder / work_dir.TUNING).is_symlink()


def test_leftovers_of_killed_runs_are_removed(tmp_path):
    """Files and folders of temporary names, of this version's and earlier ones'; nothing else."""
    finished(tmp_path)
    before = sorted(os.listdir(tmp_path))
    (tmp_path / ".tmp-17-block_00000.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-abc").mkdir()
    (tmp_path / ".tmp-abc" / "block_00001.safetensors").write_bytes(b"half")
    assert load(tmp_path) is not None
    assert sorted(os.listdir(tmp_path)) == before


def test_nothing_is_removed_from_the_folder_of_another_run(tmp_path):
    finished(tmp_path)
    (tmp_path / ".tmp-abc").mkdir()
    with pytest.raises(ValueError, match="another model"):
        load(tmp_path, {"model": "2"})
    assert (tmp_path / ".tmp-abc").is_dir()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip_one_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-7] ^= 1
    file.write_bytes(data)


def change_a_note(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"step", b"stop"))


def take_another_run(file: Path) -> None:
    finished(file.parent / "other", {"model": "2"}).replace(file)


def forget_the_digest(file: Path) -> None:
    save_file(STATE, file, metadata={"notes": "{}"})


@pytest.mark.parametrize(
    "damage", [truncate, flip_one_bit, change_a_note, take_another_run, forget_the_digest]
)
def test_a_damaged_file_is_named(damage, tmp_path):
    file = finished(tmp_path)
    damage(file)
    with pytest.raises(ValueError, match=f"{file} is damaged .*; delete it, and its part is"):
        load(tmp_path)
    file.unlink()
    assert load(tmp_path) is None


def test_a_damaged_fingerprint_is_named(tmp_path):
    finished(tmp_path)
    (tmp_path / work_dir.FINGERPRINT).write_text('{"model')
    with pytest.raises(ValueError, match=f"{work_dir.FINGERPRINT} is damaged"):
        load(tmp_path)


def test_one_process_at_a_time_works_in_a_folder(tmp_path):
    """Equal process ids in two containers do not matter: the lock is the kernel's."""
    with WorkDir(tmp_path, RUN), pytest.raises(ValueError, match="another process is at work in"):
        WorkDir(tmp_path, RUN)
    WorkDir(tmp_path, RUN).close()


def test_a_folder_without_locks_is_used(tmp_path, monkeypatch):
    """Where the file system has none; then nobody's temporary files are removed."""

    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(work_dir.fcntl, "flock", refuse)
    finished(tmp_path)
    (tmp_path / ".tmp-abc").mkdir()
    assert load(tmp_path) is not None and (tmp_path / ".tmp-abc").is_dir()


def test_a_full_disk_is_an_error_of_the_system_that_names_the_file(tmp_path, monkeypatch):
    """safetensors has an exception of its own; what was kept before stays."""
    file = finished(tmp_path)

    def fill(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(work_dir, "save_file", fill)
    with WorkDir(tmp_path, RUN) as work:
        with pytest.raises(OSError, match=f"cannot write {file}: .*No space left on device"):
            work.save_tuning(STATE, {})
    with safe_open(file, framework="pt") as kept:
        assert torch.equal(kept.get_tensor("left"), STATE["left"])


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="expected a folder, found the file"):
        WorkDir(tmp_path / "file", RUN)
