"""Exports in the hands of the libraries whose form they have, where those are installed."""

import pytest

from benchmarks.peers import check_exports, check_gguf, environments


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


@pytest.mark.slow
@pytest.mark.parametrize("model", check_gguf.MODELS, ids=lambda path: path.name)
def test_exports_run_in_llama_cpp(tmp_path, model):
    """Perplexity of the base within 1 %, and the same tokens of a text."""
    try:
        python = environments.interpreter(check_gguf.PEER)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    figures = check_gguf.check(model, tmp_path, python, tokens=1024)
    assert figures["tensors"]["NVFP4"] == 28
    assert not figures["failed"], figures
