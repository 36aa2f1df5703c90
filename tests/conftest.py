"""Fixtures and settings of several test files."""

import pytest
import torch

from arc_ao.ops import native

# One code object of torch's own stands for every compiled module of a process: tests that compile
# without a reset between them would use up its 8 recompilations.
torch._dynamo.config.recompile_limit = 128


@pytest.fixture(params=native.LEVELS)
def level(request):
    """Every level of the native CPU kernels, in turn; those that cannot run here are skipped."""
    levels = native.available_levels()
    if request.param not in levels:
        pytest.skip(f"this machine or build has {levels}")
    with native.capped_at(request.param):
        assert native.cpu_level() == request.param
        yield request.param
