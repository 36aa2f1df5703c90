"""Interrupted quantization goes on from its last finished block and ends with the same bits."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_quantize import assert_same_tensors, batches
from tiny_models import tiny_llama

from arc_ao import ARCConfig, quantize_
from arc_ao import quantize as quantize_module
from arc_ao.flow import planning
from arc_ao.methods import hessian as convert_module

LAYERS = 3
GPTQ = {"recipe": "balanced", "rounding": "gptq", "budget": 0.2}
CONFIG = ARCConfig(**GPTQ)
SEARCHED = {"channel_order": "none", "granularity": "block", "activation_block_scale": "amax"}
BEST = ARCConfig(recipe="best", budget=0.2, **SEARCHED)

CHILD = """
import sys, time, torch
sys.path.insert(0, sys.argv[2])
from test_work_dir import BEST, model
from test_quantize import batches
from arc_ao import quantize_
from arc_ao.calibration.work_dir import WorkDir

save = WorkDir._save
def slow(self, name, *rest):
    save(self, name, *rest)
    print(name, flush=True)
    time.sleep(0.2)  # the parent kills now, or while the next block is at work
WorkDir._save = slow
quantize_(model(), BEST, calibration_data=batches(), work_dir=sys.argv[1], progress=False)
print("done", flush=True)
"""


def model():
    return tiny_llama(num_hidden_layers=LAYERS)


def quantized(work_dir=None, config=CONFIG, data=None):
    result = model()
    quantize_(result, config, calibration_data=data or batches(), progress=False, work_dir=work_dir)
    return result


def kept(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def test_killed_while_at_work_it_resumes_with_the_same_bits(tmp_path, monkeypatch):
    """SIGKILL at some moment after the first block; the rerun takes over what was finished, the
    calibration and the search too, and no more."""
    tests = str(Path(__file__).parent)
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", CHILD, str(tmp_path / "work"), tests]
    environment = os.environ | threads | {"PYTHONPATH": os.pathsep.join([str(Path(tests).parent)])}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    for line in child.stdout:
        if line.startswith("block_00000"):
            time.sleep(random.uniform(0.0, 0.4))
            break
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    finished = [name for name in kept(tmp_path / "work") if name.startswith("block")]
    assert 1 <= len(finished) < LAYERS
    converted = []
    count = lambda *args, f=convert_module.prepare_rounding: converted.append(1) or f(*args)
    monkeypatch.setattr(convert_module, "prepare_rounding", count)
    refuse = lambda *args, **kwargs: pytest.fail("calibrated again")
    monkeypatch.setattr(quantize_module, "observe", refuse)
    monkeypatch.setattr(planning, "search_recipe", refuse)
    resumed = quantized(tmp_path / "work", BEST)
    assert len(converted) == 4 * (LAYERS - len(finished))
    monkeypatch.undo()
    assert_same_tensors(resumed, quantized(config=BEST))


def test_an_interrupt_keeps_what_was_finished(tmp_path, monkeypatch):
    """KeyboardInterrupt in the last block; a finished folder is taken over as a whole."""
    calls = []

    def interrupt(*args, f=convert_module.prepare_rounding):
        calls.append(1)
        if len(calls) == 4 * LAYERS:
            raise KeyboardInterrupt
        return f(*args)

    monkeypatch.setattr(convert_module, "prepare_rounding", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantized(tmp_path)
    assert len([name for name in kept(tmp_path) if name.startswith("block")]) == LAYERS - 1
    monkeypatch.undo()
    first = quantized(tmp_path)
    monkeypatch.setattr(convert_module, "prepare_rounding", lambda *_: pytest.fail("worked"))
    assert_same_tensors(first, quantized(tmp_path))


def test_half_written_files_do_not_count(tmp_path):
    """A temporary file of a killed run is neither read nor in the way."""
    (tmp_path / ".tmp-1-block_00000.safetensors").write_bytes(b"half")
    assert_same_tensors(quantized(tmp_path), quantized())


def other_model():
    result = model()
    result.model.layers[1].mlp.up_proj.weight.data[3, 4] += 1e-3
    return result


def test_another_model_config_or_data_is_refused(tmp_path):
    """One changed weight, field or token; the message says which, and the model is untouched."""
    quantized(tmp_path)
    cases = {
        "model": (other_model(), CONFIG, batches()),
        "config": (model(), ARCConfig(**GPTQ | {"budget": 0.3}), batches()),
        "data": (model(), CONFIG, batches()[:1]),
        "config and data": (model(), ARCConfig(**GPTQ | {"damping": 0.1}), batches()[1:]),
    }
    for name, (llama, config, data) in cases.items():
        before = {k: v.clone() for k, v in llama.state_dict().items()}
        with pytest.raises(ValueError, match=f"found that of another {name};"):
            quantize_(llama, config, calibration_data=data, work_dir=tmp_path, progress=False)
        assert all(torch.equal(before[k], v) for k, v in llama.state_dict().items())


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="expected an empty folder .* found 'thesis.txt'"):
        quantized(tmp_path)
    assert kept(tmp_path) == ["thesis.txt"]


def test_steps_have_no_work_to_keep(tmp_path):
    with pytest.raises(ValueError, match="work_dir: expected None for one of torchao's steps"):
        quantize_(model(), ARCConfig().with_step("prepare"), work_dir=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_rounding_to_nearest_keeps_its_calibration(tmp_path):
    """Without blocks to keep, the statistics and the search are taken over."""
    config = ARCConfig(budget=0.2, **SEARCHED)
    first = quantized(tmp_path, config)
    assert kept(tmp_path) == [".lock", "calibration.safetensors", "fingerprint.json"]
    assert set(json.loads((tmp_path / "fingerprint.json").read_text())) >= {"model", "data"}
    assert_same_tensors(first, quantized(tmp_path, config))
