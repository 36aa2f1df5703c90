"""Rows of other libraries: the files that go to and fro, what a peer's process gives or fails with.

The peers themselves are not installed here: a fake one, this interpreter with a runner of its own,
stands for them.
"""

import re
import sys

import pytest
import torch
from tiny_models import VOCAB_SIZE, tiny_llama
from transformers import BertConfig, BertModel

from arc_ao import quantize_
from benchmarks.accuracy import embeddings
from benchmarks.common.checkout import ROOT
from benchmarks.peers import environments, peer_io, run

PEER = "llmcompressor"
DOUBLING = """
def quantize(model, recipe, kind, calibration):
    model.model.norm.weight.data *= 2  # logits are doubled, exactly
    return model, {"seen": [list(batch["input_ids"].shape) for batch in calibration]}
"""


@pytest.fixture
def fake_peer(tmp_path, monkeypatch):
    """A function that installs the body of a runner, and one that runs it on two batches."""
    python = tmp_path / "environments" / PEER / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    stamp = python.parent.parent / environments.STAMP
    stamp.write_text(environments.requirements(PEER).read_text(encoding="utf-8"), encoding="utf-8")
    script = tmp_path / "runner.py"
    monkeypatch.setattr(run, "runner", lambda peer: script)

    def outputs(body: str, kind: run.Kind = "decoder", **settings) -> run.PeerResult:
        script.write_text(body, encoding="utf-8")
        folders = {"work": tmp_path / "work", "environments_root": tmp_path / "environments"}
        settings = {"recipe": "rtn", "calibration": batches(3), "evaluation": batches(5)} | settings
        return run.peer_outputs(
            PEER, model_directory=tmp_path / "model", kind=kind, **folders, **settings
        )

    return outputs


def batches(tokens: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(VOCAB_SIZE, (4, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 2:] = 0  # a line that is shorter
    return [
        {"input_ids": ids[:2], "attention_mask": mask[:2]},
        {"input_ids": ids[2:], "attention_mask": mask[2:]},
    ]


def test_batches_come_back_in_order(tmp_path):
    sent = batches(3) * 6  # past 9, where names that are not padded would sort wrongly
    peer_io.write_batches(tmp_path / "batches", sent)
    received = peer_io.read_batches(tmp_path / "batches")
    assert len(received) == len(sent)
    for a, b in zip(sent, received, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_embeddings_are_the_benchmark_s_own():
    """A peer's runner pools as accuracy/embeddings.py does, padding left out."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}
    model = BertModel(BertConfig(vocab_size=VOCAB_SIZE, num_attention_heads=2, **sizes)).eval()
    pooled = torch.cat(list(peer_io.model_outputs(model, "encoder", batches(5))))
    assert torch.equal(pooled, embeddings.embed(model, batches(5)))


def test_a_peer_s_outputs_are_handed_back(fake_peer, tmp_path):
    """The runner's process sees the batches and the model, and its logits arrive bit by bit."""
    tiny_llama().bfloat16().save_pretrained(tmp_path / "model")
    start = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks' / 'peers')!r})\n"
    found = fake_peer(start + "from peer_io import run\n" + DOUBLING + "run(quantize)\n")
    assert found.error is None
    assert found.info["seen"] == [[2, 3], [2, 3]]
    assert found.info["versions"]["torch"] == torch.__version__
    model = peer_io.load_model(tmp_path / "model", "decoder")
    assert model.dtype == torch.bfloat16
    for output, batch in zip(found.outputs, batches(5), strict=True):
        with torch.no_grad():
            expected = model(**batch).logits * 2
        assert output.dtype == torch.bfloat16 and torch.equal(output, expected)
    kept = sorted(path.name for path in (tmp_path / "work").iterdir())
    assert kept == [f"{PEER}-rtn-info", f"{PEER}-rtn-log"]
    assert found.info["quantize_cpu_seconds"] >= 0


@pytest.mark.parametrize(
    "body, error",
    [
        (
            "import sys; print('step 1', end='\\r', file=sys.stderr)\n"
            "raise AssertionError('wants CUDA')",
            "AssertionError: wants CUDA",
        ),
        ("import arc_ao_peer_that_is_absent", "ModuleNotFoundError: No module named .*absent"),
        ("raise SystemExit(3)", "exit status 3"),
        ("import os; os.kill(os.getpid(), 9)", "exit status -9"),
        ("import time; time.sleep(60)", "no result after 2 s"),
        ("", "ended without outputs"),  # the process says that all is well
    ],
    ids=["raises", "not installed", "exits", "killed", "hangs", "silent"],
)
def test_a_peer_s_error_is_told(fake_peer, body, error):
    found = fake_peer(body, timeout=2.0 if "sleep" in body else 60.0)
    assert found.outputs is None
    assert re.search(error, found.error), found.error


def test_outputs_of_an_earlier_run_are_not_taken_for_this_one(fake_peer, tmp_path):
    (tmp_path / "work").mkdir()
    peer_io.write_outputs(tmp_path / "work" / f"{PEER}-rtn-outputs", [torch.ones(1), torch.ones(1)])
    (tmp_path / "work" / f"{PEER}-rtn-info").write_text("{}", encoding="utf-8")
    assert fake_peer("").error == "ended without outputs"


@pytest.mark.parametrize(
    "outputs, error",
    [
        ([torch.ones(1)], "expected 2 outputs, found 1"),
        ([torch.ones(1), torch.full((1,), torch.nan)], "outputs that are not finite"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(tmp_path, outputs, error):
    files = {"outputs": tmp_path / "outputs", "info": tmp_path / "info"}
    files["info"].write_text("{}", encoding="utf-8")
    peer_io.write_outputs(files["outputs"], outputs)
    found = run.result(files, batches=2)
    assert found.outputs is None and found.error == error
    assert not files["outputs"].exists()


def test_an_environment_must_be_there_and_current(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"found none; run `.*peers.environments modelopt`"):
        environments.interpreter("modelopt", tmp_path)
    (tmp_path / "modelopt").mkdir()
    (tmp_path / "modelopt" / environments.STAMP).write_text("torch==1.0", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="found another one"):
        environments.interpreter("modelopt", tmp_path)
    found = run.peer_outputs(
        "modelopt", "max", tmp_path, "encoder", [], [], tmp_path, environments_root=tmp_path
    )
    assert found.outputs is None and "found another one" in found.error


def test_an_unknown_peer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected one of llmcompressor, modelopt, got 'other'"):
        run.peer_outputs("other", "rtn", tmp_path, "encoder", [], [], tmp_path)


@pytest.mark.parametrize("peer", list(run.PEERS))
def test_every_peer_has_its_runner_and_pins(peer):
    """Same torch as this project's, so that arithmetic is the same where the method is."""
    assert peer in environments.NAMES and run.runner(peer).is_file()
    pins = environments.requirements(peer).read_text(encoding="utf-8").splitlines()
    pins = [line for line in pins if line and not line.startswith("#")]
    assert all("==" in line for line in pins)
    ours = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    torch_pin = next(line for line in ours if line.startswith("torch=="))
    assert torch_pin in pins


def test_plain_row_has_a_weight_outer_scale_for_each_linear():
    """As llmcompressor in an encoder: amax/2688 of each weight, also where an input is shared."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}
    model = BertModel(BertConfig(vocab_size=VOCAB_SIZE, num_attention_heads=2, **sizes)).eval()
    linears = {n: m for n, m in model.named_modules() if embeddings.is_encoder_linear(m, n)}
    expected = {n: m.weight.detach().abs().amax() / 2688 for n, m in linears.items()}
    quantize_(
        model,
        run.plain_config(list(linears)),
        calibration_data=batches(5),
        filter_fn=embeddings.is_encoder_linear,
        progress=False,
    )
    assert len(expected) == 6 and len(set(expected.values())) == 6
    for name, outer in expected.items():
        weight = model.get_submodule(name).weight
        assert weight.activation_scale == "static"
        torch.testing.assert_close(weight.outer_scale.flatten()[0], outer)
