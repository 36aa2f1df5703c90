"""Build entry point; the metadata is in pyproject.toml.

Imports neither torch nor a compiler, so the build runs on any machine and in pip's isolation.
"""

from setuptools import setup

setup()
