"""What `import arc_ao` loads; transformers knows its method whichever is imported first."""

import subprocess
import sys
import types

import pytest
from tiny_models import tiny_llama

from arc_ao import NVFP4Config, quantize_, save_pretrained
from arc_ao.when_imported import when_imported

WITHOUT_TRANSFORMERS = """
import sys
sys.modules["transformers"] = None
import torch, arc_ao
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
data = [torch.randn(8, 64) for _ in range(4)]
summary = arc_ao.quantize_(
    model, arc_ao.ARCConfig(recipe="best"), calibration_data=data, progress=False
)
assert type(model[0].weight.data) is arc_ao.ARCTensor and model(data[0]).shape == (8, 32)
config = arc_ao.ARCConfig(budget=0.1)
from torchao.core.config import config_from_dict, config_to_dict
assert config_from_dict(config_to_dict(config)) == config
"""
LOADS = """
import arc_ao, sys
unused = "transformers lm_eval matplotlib scipy pandas networkx datasets gguf"
for name in unused.split():
    assert name not in sys.modules, name
assert {"save_pretrained", "import_checkpoint"} <= set(dir(arc_ao))
assert arc_ao.save_pretrained.__module__ == "arc_ao.integrations.huggingface"
assert not hasattr(arc_ao, "no_such_name")
"""
LOADED = """
import sys
from arc_ao import ARCTensor
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model.model.layers[0].mlp.up_proj.weight.data) is ARCTensor
"""
ORDERS = {
    "arc_ao first": "import arc_ao\nfrom transformers import AutoModelForCausalLM\n",
    "transformers first": "from transformers import AutoModelForCausalLM\nimport arc_ao\n",
    "its bare module first": (
        "import transformers\nimport arc_ao\nfrom transformers import AutoModelForCausalLM\n"
    ),
    "the part that is waited for first": (
        "import arc_ao\nimport transformers.modeling_utils\n"
        "from transformers import AutoModelForCausalLM\n"
    ),
}


def run(code: str, *arguments: str) -> None:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_transformers_is_not_needed():
    run(WITHOUT_TRANSFORMERS)


def test_nothing_is_loaded_that_is_not_used():
    run(LOADS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint") / "quantized"
    model = tiny_llama()
    quantize_(model, NVFP4Config(), progress=False)
    return str(save_pretrained(model, folder))


@pytest.mark.parametrize("order", ORDERS)
def test_checkpoints_load_whichever_is_imported_first(order, checkpoint):
    run(ORDERS[order] + LOADED, checkpoint)


def test_now_where_the_module_is_there_else_after_its_import(tmp_path, monkeypatch):
    (tmp_path / "awaited_module.py").write_text("VALUE = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen, finders = [], list(sys.meta_path)
    when_imported("types", lambda: seen.append(types))
    assert seen == [types] and sys.meta_path == finders
    when_imported("awaited_module", lambda: seen.append(sys.modules["awaited_module"].VALUE))
    with pytest.raises(ImportError):
        import no_such_module  # noqa: F401
    assert seen == [types]
    import awaited_module

    assert seen == [types, 3] and sys.meta_path == finders
    assert type(awaited_module.__loader__).__name__ == "SourceFileLoader"
