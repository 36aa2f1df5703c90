"""Build entry point; the metadata is in pyproject.toml, the native library in build_native.py."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent))  # not on the path in pip's isolation

from build_native import COMMANDS, PlatformDistribution  # noqa: E402

setup(cmdclass=COMMANDS, distclass=PlatformDistribution)
