"""Exports in the hands of the libraries whose form they have, where those are installed."""

import pytest

from benchmarks.peers import check_exports, environments


@pytest.mark.slow
@pytest.mark.parametrize("model", check_exports.MODELS, ids=lambda path: path.name)
def test_exports_run_in_transformers_with_compressed_tensors(tmp_path, model):
    """Equal logits of weights alone, and codes that its converter finds in the ModelOpt form."""
    try:
        python = environments.interpreter(check_exports.PEER)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    figures = check_exports.check(model, tmp_path, python, tokens=512)
    assert figures["w4a16.bfloat16"]["equal"] and figures["w4a16.float32"]["equal"]
    assert not figures["failed"], figures
