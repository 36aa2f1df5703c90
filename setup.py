"""Build entry point; the metadata is in pyproject.toml, the libraries in build_native.py (CPU) and
build_cuda.py (Blackwell, where it is wanted)."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent))  # not on the path in pip's isolation

from build_cuda import BuildCuda, requirements  # noqa: E402
from build_native import COMMANDS, PlatformDistribution  # noqa: E402

setup(
    cmdclass={**COMMANDS, "build_cuda": BuildCuda},
    distclass=PlatformDistribution,
    setup_requires=requirements(),
)
