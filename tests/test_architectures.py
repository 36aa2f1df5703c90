"""Every architecture of the table: quantized, run, saved, loaded with equal outputs, or refused."""

import re
from pathlib import Path

import pytest
import transformers
from architectures import FAMILIES, report, run, supported

RECIPES = ("auto", "balanced")  # the default, and one that measures nothing
TABLE = [architecture for rows in FAMILIES.values() for architecture in rows]
CASES = [
    pytest.param(
        architecture, id=architecture.id, marks=pytest.mark.slow if architecture.slow else ()
    )
    for architecture in TABLE
]


@pytest.fixture(scope="module")
def outcomes():
    """Collects what is printed after the last test."""
    collected: list[tuple] = []
    yield collected
    print("\n" + report(collected))


@pytest.fixture(scope="module", autouse=True)
def quiet_transformers():
    """No progress bars, nor warnings of token ids beyond a tiny vocabulary."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


def test_the_list_of_architectures_is_the_tables():
    """`python tests/architectures.py > benchmarks/results/architectures.md` writes it anew."""
    results = Path(__file__).parents[1] / "benchmarks" / "results"
    assert (results / "architectures.md").read_text() == supported()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("architecture", CASES)
def test_architecture(architecture, recipe, tmp_path, outcomes):
    outcome = run(architecture, recipe, tmp_path)
    outcomes.append((architecture, recipe, outcome))
    if architecture.refused:
        assert re.search(architecture.refused, outcome.refused)
        return
    assert outcome.refused == ""
    assert set(outcome.left) == set(architecture.left)
    assert outcome.unnamed == ()
    assert 0 < outcome.error < 1  # four bits show, and the outputs still are the model's
    assert outcome.reloaded
