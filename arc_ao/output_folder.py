"""An output folder that is complete or absent, and the check beforehand that it can be written.

Files are written into a private folder beside the output, which then takes its name. Where the
output is there already and empty (`.`, a mount point, what a symbolic link names), the private
folder lies inside of it, and the files move out of it, config.json last: without that one nothing
takes a folder for a model. A folder that was written whole is never removed, whatever fails then.
"""

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = ".arc_ao-"  # of private folders; an output with nothing else in it counts as empty
CHECK = f"{PREFIX}check"
CHECK_BYTES = 2**16
LAST = "config.json"


class KeptElsewhereError(OSError):
    """An output that is finished, but not where it was wanted: the message says where it is."""


def refuse_taken(directory: str | Path) -> None:
    """Refuse an output that exists.

    Raises:
        FileExistsError: `directory` is a file or a folder that is not empty.
    """
    target = _real(directory)
    if target.is_dir():
        if _contents(target):
            raise FileExistsError(f"{directory} exists and is not empty; choose another output")
    elif os.path.lexists(target):
        raise FileExistsError(f"{directory} exists and is no folder; choose another output")


def check_output(directory: str | Path) -> None:
    """Write, rename and remove a small file by the way that an output takes; leaves nothing.

    Raises:
        FileExistsError: see `refuse_taken`. OSError: one of these steps fails.
    """
    refuse_taken(directory)
    try:
        _rehearse(_real(directory))
    except OSError as error:
        raise OSError(
            f"{directory}: expected an output that can be created, written, renamed and removed, "
            f"found: {error.strerror}; choose another output"
        ) from error


def _rehearse(target: Path) -> None:
    created = _missing(target)
    private = None
    try:
        private = _make_private(target)
        (private / CHECK).write_bytes(bytes(CHECK_BYTES))
        _publish(private, target)
        (target / CHECK).unlink()
    finally:
        if private is not None:
            shutil.rmtree(private, ignore_errors=True)
        _remove(created)


def check_file(path: str | Path) -> None:
    """Open a file for writing; leaves it as it was.

    Raises:
        OSError: it cannot be written.
    """
    target = _real(path)
    created = not target.exists()
    with target.open("ab"):
        pass
    if created:
        target.unlink()


def check_space(directory: str | Path, num_bytes: int) -> None:
    """Refuse an output that will not fit.

    Raises:
        OSError: less than `num_bytes` are free where `directory` will be.
    """
    target = _real(directory)
    there = next(folder for folder in (target, *target.parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if free < num_bytes:
        raise OSError(
            f"{directory}: expected at least {num_bytes / 1e6:,.1f} MB of free space for the "
            f"quantized model, found {free / 1e6:,.1f} MB; choose another output"
        )


@contextmanager
def new_folder(directory: str | Path) -> Iterator[Path]:
    """A private folder, which becomes `directory` when the body is done.

    An error in the body leaves nothing behind.

    Raises:
        KeptElsewhereError: it could not become `directory`, such as one that another process has
            filled meanwhile; it is kept.
    """
    target = _real(directory)
    created = _missing(target)
    try:
        private = _make_private(target)
    except OSError:
        _remove(created)
        raise
    try:
        yield private
    except BaseException:
        shutil.rmtree(private, ignore_errors=True)
        _remove(created)
        raise
    try:
        _publish(private, target)
    except OSError as error:
        raise KeptElsewhereError(
            f"{directory}: cannot take its place ({error.strerror}); what was finished is in "
            f"{private}"
        ) from error


def write_or_keep(directory: str | Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill the new folder `directory`, or one in the folder for temporary files.

    Raises:
        KeptElsewhereError: it is not in `directory`, but kept. OSError: nor can it be kept.
    """
    try:
        with new_folder(directory) as folder:
            write(folder)
    except KeptElsewhereError:
        raise
    except OSError as error:
        kept = Path(tempfile.gettempdir()) / f"arc_ao-{secrets.token_hex(8)}"
        with new_folder(kept) as folder:
            write(folder)
        raise KeptElsewhereError(
            f"{directory}: cannot be written ({error}); what was finished is in {kept}"
        ) from error


def _real(directory: str | Path) -> Path:
    return Path(os.path.realpath(directory))


def _contents(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if not name.startswith(PREFIX)]


def _missing(target: Path) -> list[Path]:
    """Folders that have to be made for `target`, itself included, the innermost first."""
    return [folder for folder in (target, *target.parents) if not os.path.lexists(folder)]


def _remove(folders: list[Path]) -> None:
    """Remove those of `folders` that are there and empty."""
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _make_private(target: Path) -> Path:
    there = next(path for path in (target, *target.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{there} is no folder")
    parent = target if there == target else target.parent
    parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))


def _publish(private: Path, target: Path) -> None:
    if private.parent != target:
        private.chmod(0o755)
        private.rename(target)  # refused by the system where something is there
        return
    if _contents(target):
        raise FileExistsError(errno.ENOTEMPTY, "another process has filled it")
    for file in sorted(private.iterdir(), key=lambda file: file.name == LAST):
        file.rename(target / file.name)
    private.rmdir()
