"""One virtual environment per peer, from the pinned versions of its requirements file.

    python -m benchmarks.peers.environments [PEER ...]      # all peers without arguments

builds `build/peers/PEER` (about 1.5 GB each, llama_cpp 0.2 GB). Where a peer needs torch, it comes
first and alone, as in the Makefile, so that pip takes the build that its configuration prefers,
such as the CPU wheel. llama_cpp is compiled for this machine: that takes a C++ compiler and some
minutes. An environment whose requirements file changed since is built anew.
"""

import argparse
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE.parent.parent / "build" / "peers"
NAMES = ("llmcompressor", "modelopt", "llama_cpp", "compressed_tensors")
STAMP = "requirements.txt"  # copied into an environment once it is complete


def requirements(peer: str) -> Path:
    """Pinned versions of everything in a peer's environment."""
    return HERE / f"{peer}.txt"


def interpreter(peer: str, environments: Path = ENVIRONMENTS) -> Path:
    """Python of a peer's environment.

    Raises:
        FileNotFoundError: it is not built, or built from other requirements.
    """
    folder = environments / peer
    stamp, pinned = folder / STAMP, requirements(peer).read_text(encoding="utf-8")
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != pinned:
        raise FileNotFoundError(
            f"{peer}: expected an environment with the versions of {peer}.txt, found "
            f"{'another one' if stamp.is_file() else 'none'}; run "
            f"`python -m benchmarks.peers.environments {peer}`"
        )
    return folder / "bin" / "python"


def build(peer: str, environments: Path = ENVIRONMENTS) -> Path:
    """Build a peer's environment, unless it is there; its interpreter.

    Raises:
        subprocess.CalledProcessError: pip failed; it has printed why.
    """
    folder = environments / peer
    try:
        return interpreter(peer, environments)
    except FileNotFoundError:
        venv.create(folder, clear=True, with_pip=True)
    pinned = requirements(peer)
    install = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
    if any(line.startswith("torch==") for line in pinned.read_text(encoding="utf-8").splitlines()):
        subprocess.run([*install, "-c", pinned, "torch"], check=True)
    subprocess.run([*install, "-r", pinned], check=True)
    (folder / STAMP).write_text(pinned.read_text(encoding="utf-8"), encoding="utf-8")
    return interpreter(peer, environments)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"of {', '.join(NAMES)}")
    peers = parser.parse_args(argv).peers or NAMES
    if unknown := set(peers) - set(NAMES):
        parser.error(f"expected peers of {', '.join(NAMES)}, got {', '.join(sorted(unknown))}")
    for peer in peers:
        print(f"{peer}: {build(peer)}", file=sys.stderr)


if __name__ == "__main__":
    main()
