"""Training the codes of whole models: what it gains, what it never does, how it goes on."""

import pytest
import torch
from test_quantize import assert_same_tensors
from tiny_models import byte_tokenizer, tiny_llama
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from arc_ao import ARCConfig, quantize_
from arc_ao.calibration import reference
from arc_ao.calibration.reference import record_references
from arc_ao.calibration.work_dir import WorkDir
from arc_ao.methods.tuning import latent, parameters, schedule, session
from arc_ao.methods.tuning import tune as tuning
from arc_ao.outputs.divergence import kl_divergence
from arc_ao.passes.export.quantizer import ARCQuantizer
from arc_ao.summary import arc_tensors

START = ARCConfig(recipe="balanced", budget=0.2)
SEARCHED = {"channel_order": "none", "granularity": "block", "activation_block_scale": "amax"}
TUNED = ARCConfig(
    recipe="tuned", exchange_rate=1.0, layer_weights="equal", tuning_minutes=0.05, **SEARCHED
)


def tokens(count: int = 6, rows: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (rows, 32), generator=generator) for _ in range(count)]


def sharp_llama() -> nn.Module:
    """One whose logits quantizing moves."""
    return sharpened(tiny_llama())


def sharpened(model: nn.Module) -> nn.Module:
    """Linears five times larger than at random initialisation."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(5)
    return model


class Case:
    """A quantized model, what it was made of, and the references of its batches."""

    def __init__(self, model: nn.Module | None = None, batches: list | None = None) -> None:
        self.model, self.batches = model or sharp_llama(), batches or tokens()
        linears = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.Linear)}
        self.originals = {name: m.weight.detach() for name, m in linears.items()}
        self.references = record_references(self.model, self.batches, set())
        quantize_(self.model, START, calibration_data=self.batches, progress=False)
        self.names = list(arc_tensors(self.model))
        self.norms = {n: p.clone() for n, p in parameters.norm_parameters(self.model).items()}
        self.start = {n: t.to_layout("plain").qdata for n, t in arc_tensors(self.model).items()}

    def tune(self, **options):
        originals = dict(self.originals)
        return tuning.tune(
            self.model,
            self.names,
            self.batches,
            self.references,
            originals=originals,
            **options,
        )

    def unchanged(self) -> bool:
        """Whether every code and every norm is as it began."""
        now = {n: t.to_layout("plain").qdata for n, t in arc_tensors(self.model).items()}
        norms = parameters.norm_parameters(self.model)
        return all(torch.equal(now[n], self.start[n]) for n in self.start) and all(
            torch.equal(norms[n], self.norms[n]) for n in self.norms
        )


def test_training_brings_kept_tokens_nearer():
    """A tenth closer on batches that were never trained on, by codes and by norms, as the quantized
    linears measure it; flags, gradients and forwards are as before."""
    case = Case(batches=tokens(40, rows=4))
    case.model.train()
    case.model.model.norm.weight.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in case.model.named_parameters()}
    record = case.tune(max_steps=80)
    assert record.steps == 80 and record.after < 0.9 * record.before
    assert record.tokens_aside == 5 * 4 * 32
    _, aside = tuning.split(40)
    found = tuning._divergence(case.model.eval(), case.batches, case.references, aside)
    assert found == pytest.approx(record.after)
    now = {n: t.to_layout("plain").qdata for n, t in arc_tensors(case.model).items()}
    assert all(not torch.equal(now[n], case.start[n]) for n in now)
    norms = parameters.norm_parameters(case.model)
    assert len(norms) == 5 and not torch.equal(norms["model.norm.weight"], case.norms[[*norms][-1]])
    assert flags == {n: p.requires_grad for n, p in case.model.named_parameters()}
    assert all(p.grad is None for p in case.model.parameters())
    assert all("forward" not in vars(m) for m in case.model.modules())


def test_codes_alone_help(monkeypatch):
    """With every gain fixed."""
    monkeypatch.setattr(parameters, "norm_parameters", lambda model: {})
    case = Case(batches=tokens(40, rows=4))
    record = case.tune(max_steps=80)
    assert record.after < 0.95 * record.before


def test_the_start_stays_where_nothing_is_better(monkeypatch):
    """A learning rate that wrecks the model: bit for bit what it was, after the last patience."""
    monkeypatch.setattr(parameters, "LEARNING_RATE", 5.0)
    monkeypatch.setattr(parameters, "GAIN_RATE", 5.0)
    case = Case()
    record = case.tune(max_steps=64)
    assert record.before == record.after and case.unchanged()
    assert record.steps == tuning.PATIENCE * (64 // schedule.EVALUATIONS)


def test_an_error_leaves_the_quantized_model(monkeypatch):
    """In the tenth step."""
    monkeypatch.setattr(tuning, "PATIENCE", 99)
    case, calls = Case(), []

    def fail(model, batch, f=tuning.call_model):
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return f(model, batch)

    monkeypatch.setattr(tuning, "call_model", fail)
    with pytest.raises(KeyboardInterrupt):
        case.tune(max_steps=20)
    assert case.unchanged()
    assert all("forward" not in vars(m) for m in case.model.modules())


def test_a_run_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    """Interrupted after a state was saved: the rest of the steps, and the same codes and norms. The
    state holds factors and their moments, nothing as large as a weight but the best codes."""
    monkeypatch.setattr(tuning, "PATIENCE", 99)
    whole = Case(batches=tokens(20, rows=2))
    expected = whole.tune(max_steps=24)
    work = WorkDir(tmp_path, {"format": "1"})
    calls = []

    def fail(model, batch, f=tuning.call_model):
        calls.append(1)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return f(model, batch)

    monkeypatch.setattr(tuning, "call_model", fail)
    monkeypatch.setattr(tuning._Run, "save_if_due", tuning._Run.save)
    with pytest.raises(KeyboardInterrupt):
        Case(batches=tokens(20, rows=2)).tune(max_steps=24, work=work)
    state, _ = work.load_tuning()
    name = whole.names[0]
    parts = {key.removeprefix(f"{name}:") for key in state if key.startswith(f"{name}:")}
    moments = ("", ":exp_avg", ":exp_avg_sq", ":step")
    assert parts == {part + key for part in ("left", "right") for key in moments}
    assert state[f"{name}:left"].shape == (64, latent.RANK)
    case = Case(batches=tokens(20, rows=2))
    record = case.tune(max_steps=24, work=work)
    assert len(calls) == 25 and record.steps == 24  # the eleventh twice
    assert record.after == expected.after < expected.before
    assert_same_tensors(case.model, whole.model)
    norms = parameters.norm_parameters(whole.model)
    for name, parameter in parameters.norm_parameters(case.model).items():
        assert torch.equal(parameter, norms[name])
    again = Case(batches=tokens(20, rows=2))
    assert again.tune(max_steps=24, work=work).after == expected.after and len(calls) == 25
    assert_same_tensors(again.model, whole.model)


def test_the_budget_is_time(monkeypatch):
    """Of minutes; the learning rate falls to nothing on the way."""
    monkeypatch.setattr(tuning, "PATIENCE", 999)
    plan = schedule.Schedule(minutes=1.0)
    plan.step, plan.seconds = 10, 30.0
    assert plan.rate() == pytest.approx(0.5, abs=0.01) and not plan.over
    plan.seconds = 59.9
    assert plan.rate() < 1e-3
    plan.seconds = 60.0
    assert plan.over and plan.evaluation_due()
    record = Case().tune(minutes=0.02)
    assert record.steps > 0 and record.seconds >= 1.2


def test_one_call_tunes_saves_and_says_so(tmp_path):
    """recipe="tuned" from a bf16 model to a checkpoint that loads with the same bits."""
    from arc_ao.integrations.huggingface import load_model, save_pretrained

    sharp_llama().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    model, tokenizer = load_model(tmp_path / "model")
    summary = quantize_(model, TUNED, calibration_data=tokens(), progress=False)
    assert summary.tuning["steps"] > 0 and summary.tuning["after"] <= summary.tuning["before"]
    assert "tuned in" in str(summary) and summary.to_dict()["tuning"] == summary.tuning
    assert summary.configs[0]["_data"]["rounding"] == "gptq"
    save_pretrained(model, tmp_path / "tuned", tokenizer)
    loaded, _ = load_model(tmp_path / "tuned")
    assert_same_tensors(loaded, model)
    with torch.no_grad():
        batch = tokens()[0]
        assert torch.equal(loaded(batch).logits, model(batch).logits)


def test_encoders_are_compared_by_their_hidden_states():
    """A BERT without logits, a padded batch of keyword arguments."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4,
        )  # fmt: skip
        model = sharpened(BertModel(config, add_pooling_layer=False).eval())
    mask = torch.ones(1, 32, dtype=torch.int64)
    mask[:, 20:] = 0
    batches = [{"input_ids": ids, "attention_mask": mask} for ids in tokens(20)]
    case = Case(model, batches)
    assert case.references[0].kept.shape == (20, 64) and not case.references[0].logits
    record = case.tune(max_steps=48)
    assert record.after < 0.95 * record.before


def test_references_keep_hidden_states_where_the_head_stays():
    """Logits made of them are the model's bits; a head that changes or a soft cap is kept whole."""
    model, batch = tiny_llama(), tokens(1)
    with torch.no_grad():
        logits = model(batch[0]).logits[0]
    kept = record_references(model, batch, set())[0]
    assert kept.kept.shape == (32, 64) and torch.equal(kept.rows(slice(None)), logits)
    whole = record_references(model, batch, {model.lm_head})[0]
    assert whole.head is None and torch.equal(whole.rows(slice(None)), logits)
    model.lm_head.register_forward_hook(lambda module, args, output: output.tanh())
    capped = record_references(model, batch, set())[0]
    assert torch.equal(capped.rows(slice(None)), logits.tanh())


@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_gradient_are_those_of_kl(masked, monkeypatch):
    """Against autograd on the formula, by chunks of chunks; -inf in both logits adds nothing."""
    monkeypatch.setattr(reference, "HEAD_ELEMENTS", 5 * 17)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 3 * 17)
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(7, 17, generator=generator)
    logits = torch.randn(7, 17, generator=generator)
    if masked:
        teacher[:, 3] = logits[:, 3] = -torch.inf
    own, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = reference.Reference(teacher, None, None, True).divergence((own[None],))
    (2 * loss).backward()
    keep = [i for i in range(17) if not masked or i != 3]
    p = teacher[:, keep].log_softmax(-1)
    expected = (p.exp() * (p - other[:, keep].log_softmax(-1))).sum(-1).mean()
    (2 * expected).backward()
    assert loss.item() == pytest.approx(kl_divergence(teacher, logits).item(), rel=1e-5)
    torch.testing.assert_close(own.grad, other.grad)


def test_batches_kept_aside_lie_among_the_others():
    train, aside = tuning.split(32)
    assert aside == [4, 12, 20, 28] and sorted(train + aside) == list(range(32))
    assert tuning.split(2) == ([0], [1]) and len(tuning.split(5)[1]) == 2
    order = [tuning._shuffled(step, 5) for step in range(10)]
    assert sorted(order[:5]) == sorted(order[5:]) == list(range(5)) and order[:5] != order[5:]


def test_what_cannot_be_tuned_is_refused_before_anything_changes(monkeypatch):
    model = tiny_llama()
    with pytest.raises(ValueError, match="at least 2 batches of calibration data.*found 1"):
        quantize_(model, TUNED, calibration_data=tokens(1), progress=False)
    monkeypatch.setattr(session, "_free_memory", lambda device: 1000)
    with pytest.raises(ValueError, match=r"GB of free memory on cpu to train.*\(10.2 bytes each"):
        quantize_(model, TUNED, calibration_data=tokens(), progress=False)
    assert not arc_tensors(model)
    with pytest.raises(ValueError, match="needs no training in a prepare/convert flow"):
        quantize_(model, TUNED.with_step("prepare"))
    with pytest.raises(ValueError, match="needs no training, found 'tuned'"):
        ARCQuantizer(TUNED)
    with pytest.raises(ValueError, match="tuning_minutes must be more than 0"):
        ARCConfig(recipe="tuned", tuning_minutes=0)
