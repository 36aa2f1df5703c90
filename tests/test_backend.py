"""backend="arc" and the passes in Inductor: what decoders call, caches, coexistence."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from unittest import mock

import expecttest
import pytest
import torch
from tiny_models import VOCAB_SIZE, tiny_llama
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config
from torch.fx import Graph
from transformers import Qwen3Config, Qwen3ForCausalLM

import arc_ao
from arc_ao.inspect.draw import data_flow
from arc_ao.ops import native
from arc_ao.passes import backend
from arc_ao.passes.nodes import arc_calls

ROOT = Path(__file__).resolve().parents[1]
TOKENS = torch.randint(VOCAB_SIZE, (2, 48), generator=torch.Generator().manual_seed(0))
LAYERS = 2


def qwen() -> nn.Module:
    settings = {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen3ForCausalLM(Qwen3Config(**settings, **heads, num_hidden_layers=LAYERS)).eval()


def quantized(model: nn.Module) -> nn.Module:
    model = model.to(torch.bfloat16)
    settings = arc_ao.ARCConfig(recipe="balanced", budget=0.2)
    arc_ao.quantize_(model, settings, calibration_data=[TOKENS], progress=False)
    return model.requires_grad_(False)


def record_graphs(patch: pytest.MonkeyPatch, read: Callable[[Graph], Any]) -> list[Any]:
    """A list that gets `read(graph)` of every graph that is compiled, after the passes."""
    recorded, run_passes = [], backend.run_passes

    def run_and_record(graph):
        applied = run_passes(graph)
        recorded.append(read(graph))
        return applied

    patch.setattr(backend, "run_passes", run_and_record)
    return recorded


@pytest.fixture
def calls(monkeypatch) -> list[list[str]]:
    return record_graphs(monkeypatch, arc_calls)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Attention as on most machines, so that graphs are the same everywhere."""
    monkeypatch.setattr(native, "pairs_are_fast", lambda: False)
    torch._dynamo.reset()
    counters.clear()
    with config.patch(fx_graph_cache=False):  # a cached graph does not go through the passes
        yield


def last_block(model: nn.Module) -> str:
    """The large operators of a decoder's last block, each behind the numbers of its sources."""
    with pytest.MonkeyPatch.context() as patch:
        recorded = record_graphs(patch, data_flow)
        compiled = torch.compile(quantized(model), backend=backend.arc, fullgraph=True)
        compiled(TOKENS, use_cache=False)
    [flow] = recorded
    names = list(flow.nodes)
    first = 1 + (len(names) - 2) // LAYERS * (LAYERS - 1)  # behind the embedding, before the head
    lines = []
    for name in names[first:-1]:
        sources = sorted(names.index(source) - first for source in flow.predecessors(name))
        operator, shape = flow.nodes[name]["label"].split("\n")
        lines.append(f"{len(lines)} {operator} {shape} <- {sources}")
    return "\n".join(lines)


class TestDecoders(expecttest.TestCase):
    """One block after the passes: four quantizations, three of them fused, seven products."""

    def test_a_block_of_llama(self):
        self.assertExpectedInline(
            last_block(tiny_llama()),
            """\
0 add_rms_norm_quant_augment [96, 56] <- [-1]
1 nvfp4_gemm [96, 64] <- [0]
2 nvfp4_gemm [96, 32] <- [0]
3 nvfp4_gemm [96, 32] <- [0]
4 scaled_dot_product_flash_attention_for_cpu [2, 4, 48, 16] <- [1, 2, 3]
5 quant_augment [96, 32] <- [4]
6 nvfp4_gemm [96, 64] <- [5]
7 add_rms_norm_quant_augment [96, 32] <- [6]
8 nvfp4_gemm [96, 128] <- [7]
9 nvfp4_gemm [96, 128] <- [7]
10 silu_mul_quant_augment [96, 64] <- [8, 9]
11 nvfp4_gemm [96, 64] <- [10]""",
        )

    def test_a_block_of_llama_with_our_attention(self):
        with mock.patch.object(native, "pairs_are_fast", lambda: True):
            lines = last_block(tiny_llama()).splitlines()
        self.assertExpectedInline(
            "\n".join(lines[3:6]),
            """\
3 nvfp4_gemm [96, 32] <- [0]
4 attention [2, 4, 48, 16] <- [1, 2, 3]
5 quant_augment [96, 32] <- [4]""",
        )

    def test_a_block_of_qwen(self):
        self.assertExpectedInline(
            last_block(qwen()),
            """\
0 add_rms_norm_quant_augment [96, 56] <- [-1]
1 nvfp4_gemm [96, 64] <- [0]
2 nvfp4_gemm [96, 32] <- [0]
3 nvfp4_gemm [96, 32] <- [0]
4 scaled_dot_product_flash_attention_for_cpu [2, 4, 48, 16] <- [1, 2, 3]
5 quant_augment [96, 32] <- [4]
6 nvfp4_gemm [96, 64] <- [5]
7 add_rms_norm_quant_augment [96, 32] <- [6]
8 nvfp4_gemm [96, 128] <- [7]
9 nvfp4_gemm [96, 128] <- [7]
10 silu_mul_quant_augment [96, 64] <- [8, 9]
11 nvfp4_gemm [96, 64] <- [10]""",
        )


@pytest.mark.parametrize("make", [tiny_llama, qwen])
def test_decoders_share_and_fuse_and_give_the_eager_bits(make, calls):
    model = quantized(make())
    with config.patch(emulate_precision_casts=True):
        compiled = torch.compile(model, backend=backend.arc, fullgraph=True)
        logits = compiled(TOKENS, use_cache=False).logits
    assert torch.equal(logits, model(TOKENS, use_cache=False).logits)
    [names] = calls
    norms = {"add_rms_norm_quant_augment": 2 * LAYERS - 1, "rms_norm_quant_augment": 1}
    others = {"silu_mul_quant_augment": LAYERS, "quant_augment": LAYERS}
    assert Counter(names) == norms | others | {"nvfp4_gemm": 7 * LAYERS}


def test_ten_lengths_compile_twice_at_most(calls):
    """Once for the first length and once for any other; every later one is already there."""
    compiled = torch.compile(quantized(tiny_llama()), backend=backend.arc, fullgraph=True)
    for length in (12, 13):
        compiled(TOKENS[:, :length], use_cache=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in range(20, 48, 3):
            compiled(TOKENS[:, :length], use_cache=False)
    assert len(calls) == 2 and calls[0] == calls[1]
    assert not counters["graph_break"]


def test_a_static_cache_is_filled_and_generation_agrees(calls):
    model = quantized(tiny_llama())
    settings = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(TOKENS[:1, :8], **settings, disable_compile=True)
    with config.patch(emulate_precision_casts=True):
        model.forward = torch.compile(model.forward, backend=backend.arc, fullgraph=True)
        found = model.generate(TOKENS[:1, :8], **settings, disable_compile=True)
    assert torch.equal(found, expected) and calls


class Other:
    """Another library's pass."""

    def __call__(self, graph) -> None:
        pass


@pytest.mark.parametrize("present", [None, Other(), [Other()], [Other(), Other()]])
def test_other_passes_stay_before_ours_and_after_we_leave(present):
    with config.patch(post_grad_custom_pre_pass=present):
        arc_ao.enable_inductor_passes()
        arc_ao.enable_inductor_passes()  # twice is once
        found = config.post_grad_custom_pre_pass
        found = found if isinstance(found, list) else [found]
        others = present if isinstance(present, list) else [present] if present else []
        assert found == [*others, backend.ARC_PASS]
        arc_ao.disable_inductor_passes()
        left = config.post_grad_custom_pre_pass
        left = left if isinstance(left, list) else [left] if left else []
        assert left == others
        arc_ao.disable_inductor_passes()


def test_plain_compile_uses_the_passes_only_while_enabled(calls):
    model = quantized(tiny_llama())
    torch.compile(model, fullgraph=True)(TOKENS, use_cache=False)
    assert calls == []
    arc_ao.enable_inductor_passes()
    try:
        torch._dynamo.reset()
        torch.compile(model, fullgraph=True)(TOKENS, use_cache=False)
    finally:
        arc_ao.disable_inductor_passes()
    assert len(calls) == 1 and Counter(calls[0])["quant_augment"] == LAYERS
    assert config.post_grad_custom_pre_pass is None


def test_the_backend_leaves_no_setting_behind_and_takes_modes(calls):
    before = config.save_config_portable()
    model = quantized(tiny_llama())
    mode = {"mode": "reduce-overhead"}
    torch.compile(model, backend=backend.arc, **mode)(TOKENS, use_cache=False)
    assert config.save_config_portable() == before and len(calls) == 1


def test_the_entry_point_names_the_backend():
    found = entry_points(group="torch_dynamo_backends", name="arc")
    if not found:
        pytest.skip("arc_ao is not installed, only on the path")
    assert found["arc"].load() is backend.arc
    assert "arc" in torch._dynamo.list_backends()


PROGRAM = """
import sys
sys.path.insert(0, "tests")
import torch
import test_backend as t
from torch._dynamo.utils import counters
model = t.quantized(t.tiny_llama())
logits = torch.compile(model, backend=t.backend.arc)(t.TOKENS, use_cache=False).logits
print("result", counters["inductor"]["fxgraph_cache_hit"], logits.double().sum().item())
"""


@pytest.mark.slow
def test_a_second_process_hits_the_cache_and_agrees(tmp_path):
    def run() -> list[str]:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-c", PROGRAM]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return next(x for x in done.stdout.splitlines() if x.startswith("result")).split()[1:]

    (misses, first), (hits, second) = run(), run()
    assert misses == "0" and int(hits) >= 1 and first == second
