"""A folder of finished work, so that an interrupted quantization goes on where it stopped.

    fingerprint.json             what the work belongs to (calibration/fingerprint.py)
    calibration.safetensors      statistics of every input; what the search measured
    block_00003.safetensors      quantized weights of one block
    tuning.safetensors           how far training the codes has come
    .lock                        held by the process that works here

A file is written in a private folder, flushed and renamed: it is complete or absent, also after
SIGKILL. It holds a digest of its contents, its name and the fingerprint, so that one that was
damaged or comes from elsewhere is refused. What a rerun takes over equals what it would compute
again, bit for bit, on the same machine with the same number of threads. The folder may be deleted
once the model is saved.
"""

import errno
import fcntl
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchao.prototype.safetensors.safetensors_support import (
    flatten_tensor_state_dict,
    unflatten_tensor_state_dict,
)

from arc_ao.calibration.few_tokens import RoundingNote
from arc_ao.calibration.fingerprint import digest
from arc_ao.tensor import ARCTensor

ROUNDING = "arc_rounding"  # key in the metadata of a block
DIGEST = "arc_digest"  # and of every file
FINGERPRINT, CALIBRATION = "fingerprint.json", "calibration.safetensors"
TUNING = "tuning.safetensors"
LOCK, TEMPORARY = ".lock", ".tmp-"
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # file systems that cannot lock


class WorkDir:
    """The folder of one quantization; close it, or use it in a `with` statement.

    Args:
        path: new or empty folder, or that of an earlier run.
        expected: `fingerprint` of this run.

    Raises:
        ValueError: the folder belongs to another run or holds something else, saying what differs;
            or another process works there.
    """

    def __init__(self, path: str | Path, expected: dict[str, str]) -> None:
        self.path, self.expected = Path(path), expected
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"work_dir: expected a folder, found the file {self.path}")
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / FINGERPRINT
        if not file.exists():
            self._refuse_other_files()
        self._lock, alone = _lock(self.path)
        try:
            if not file.exists():
                self._replace(
                    FINGERPRINT, lambda new: new.write_text(json.dumps(expected, indent=2))
                )
            self._refuse_other_work(_read_fingerprint(file))
            if alone:
                self._remove_leftovers()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes in."""
        self._lock.close()

    def _refuse_other_files(self) -> None:
        names = [file.name for file in self.path.iterdir()]
        others = [name for name in names if name != LOCK and not name.startswith(TEMPORARY)]
        if others:
            raise ValueError(
                f"work_dir: expected an empty folder or an earlier run in {self.path}, found "
                f"{sorted(others)[0]!r}; name another folder"
            )

    def _refuse_other_work(self, found: dict[str, str]) -> None:
        differing = [key for key, value in self.expected.items() if found.get(key) != value]
        if differing:
            readable = [key for key in ("versions", "precision") if key in differing]
            shown = "".join(
                f" ({key} there: {found.get(key, 'unknown')}; here: {self.expected[key]})"
                for key in readable
            )
            raise ValueError(
                f"work_dir: expected the work of this call in {self.path}, found that of another "
                f"{' and '.join(differing)}{shown}; repeat the call that began it, or name another "
                "folder"
            )

    def _remove_leftovers(self) -> None:
        """What killed runs were writing; nobody else is at work here."""
        for file in self.path.glob(f"{TEMPORARY}*"):
            if file.is_dir() and not file.is_symlink():
                shutil.rmtree(file)
            else:
                file.unlink()

    def save_calibration(self, tensors: dict[str, Tensor], measured: Any) -> None:
        """Keep statistics by name, and what was measured (JSON)."""
        self._save(CALIBRATION, tensors, {"measured": json.dumps(measured)})

    def load_calibration(self) -> tuple[dict[str, Tensor], Any] | None:
        """What `save_calibration` kept, or None."""
        loaded = self._load(CALIBRATION)
        return None if loaded is None else (loaded[0], json.loads(loaded[1]["measured"]))

    def save_block(
        self, index: int, weights: dict[str, ARCTensor], notes: dict[str, RoundingNote]
    ) -> None:
        """Keep the quantized weights of a finished block and how they were rounded, by fully
        qualified name."""
        plain = {f"{name}.weight": w.to_layout("plain") for name, w in weights.items()}
        tensors, metadata = flatten_tensor_state_dict(plain)
        described = {name: note.to_dict() for name, note in notes.items()}
        self._save(_block_file(index), tensors, metadata | {ROUNDING: json.dumps(described)})

    def load_block(self, index: int) -> tuple[dict[str, ARCTensor], dict[str, RoundingNote]] | None:
        """What `save_block` kept, weights in the plain layout; None if it is not finished."""
        loaded = self._load(_block_file(index))
        if loaded is None:
            return None
        tensors, metadata = loaded
        described = json.loads(metadata.pop(ROUNDING))
        weights, _ = unflatten_tensor_state_dict(tensors, metadata)
        notes = {name: RoundingNote(**fields) for name, fields in described.items()}
        return {name.removesuffix(".weight"): weight for name, weight in weights.items()}, notes

    def save_tuning(self, tensors: dict[str, Tensor], notes: Any) -> None:
        """Keep the state of a training run: tensors by name, and notes (JSON)."""
        self._save(TUNING, tensors, {"notes": json.dumps(notes)})

    def load_tuning(self) -> tuple[dict[str, Tensor], Any] | None:
        """What `save_tuning` kept, or None."""
        loaded = self._load(TUNING)
        return None if loaded is None else (loaded[0], json.loads(loaded[1]["notes"]))

    def _save(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        copies = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        metadata = metadata | {DIGEST: self._digest(name, copies, metadata)}
        self._replace(name, lambda file: save_file(copies, file, metadata=metadata))

    def _load(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        path = self.path / name
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}
                metadata = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise ValueError(_damaged(path, str(error))) from error
        if metadata.pop(DIGEST, None) != self._digest(name, tensors, metadata):
            raise ValueError(_damaged(path, "its digest is not that of its contents and this run"))
        return tensors, metadata

    def _digest(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
        return digest([name, self.expected, tensors, metadata])

    def _replace(self, name: str, write: Any) -> None:
        """Let `write` fill a file that nobody else can name, then put it in its place."""
        try:
            with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=self.path) as folder:
                file = Path(folder) / name
                write(file)
                _flush(file)
                file.replace(self.path / name)
            _flush(self.path)  # the renaming itself
        except (SafetensorError, OSError) as error:
            raise OSError(f"work_dir: cannot write {self.path / name}: {error}") from error


def _lock(folder: Path) -> tuple[Any, bool]:
    """Open lock file of a folder, and whether it keeps others out.

    Raises:
        ValueError: another process holds it.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.fdopen(os.open(folder / LOCK, flags, 0o666), "r+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ValueError(
            f"work_dir: another process is at work in {folder}; wait for it, or name another folder"
        ) from error
    except OSError as error:
        if error.errno in WITHOUT_LOCKS:
            return file, False
        file.close()
        raise
    return file, True


def _read_fingerprint(file: Path) -> dict[str, str]:
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(
            f"work_dir: {file} is damaged ({error}), and with it goes what the folder belongs to; "
            "name another folder"
        ) from error
    return found if isinstance(found, dict) else {}


def _damaged(path: Path, reason: str) -> str:
    return f"work_dir: {path} is damaged ({reason}); delete it, and its part is computed again"


def _block_file(index: int) -> str:
    return f"block_{index:05d}.safetensors"


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
