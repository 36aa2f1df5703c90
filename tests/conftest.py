"""Fixtures of several test files."""

import pytest

from arc_ao.ops import native


@pytest.fixture(params=native.LEVELS)
def level(request):
    """Every level of the native CPU kernels, in turn; those that cannot run here are skipped."""
    levels = native.available_levels()
    if request.param not in levels:
        pytest.skip(f"this machine or build has {levels}")
    with native.capped_at(request.param):
        assert native.cpu_level() == request.param
        yield request.param
