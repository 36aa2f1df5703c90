"""benchmarks/layers: its problems, its accounts of the papers' claims, and end to end."""

import json

import pytest
import torch
from test_benchmarks import last_json, write_imatrix
from torch import nn

from benchmarks.layers import formats, methods, problems, relations


def profile(channels: int) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    return torch.exp(2 * torch.randn(channels, generator=generator)).tolist()


@pytest.mark.parametrize("common, expected", [(0.0, 0.0), (0.57, 0.57**2 / 32)])
def test_constructed_channels_have_the_profile_and_the_correlation(common, expected):
    """Mean squared correlation common^2 / 32 for loadings in random directions."""
    rms = torch.logspace(-1, 1, 200)
    x = problems._mixed(rms, 20_000, common, torch.Generator().manual_seed(1))
    torch.testing.assert_close(x.square().mean(0).sqrt(), rms, rtol=0.1, atol=0.0)
    r = torch.corrcoef(x.t())
    mean_square = ((r.square().sum() - 200) / (200 * 199)).item() - 1 / 20_000
    assert mean_square == pytest.approx(expected, abs=0.1 * expected + 3e-5)


def test_a_thinned_profile_keeps_neighbours_of_all_of_it():
    rms = torch.arange(1000.0)
    assert torch.equal(problems.thinned(rms, None), rms)
    kept = problems.thinned(rms, 300)  # two of seven whole blocks of 128: 0 and 3
    assert torch.equal(kept, torch.cat([rms[:128], rms[384:512]]))


def test_serqs_parts_by_hand():
    """Exact rounding gives the exact product; int4 of the salient columns is int4 twice."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(8, 64, generator=generator), torch.randn(9, 64, generator=generator)
    x[:, 3] = 0.0  # dead: keeps its scale
    problem = problems.Problem("MLP input", weight, x, x)
    exact = formats.serq_output(problem, lambda t: t, 32)
    torch.testing.assert_close(exact, x @ weight.t())
    levels = formats.int4_rounded(weight) / (weight.abs().amax(1, keepdim=True) / 7)
    assert levels.abs().amax() == 7 and torch.allclose(levels, levels.round())
    assert not formats.int4_rounded(torch.zeros(2, 64)).any()
    error = lambda y: (y - x @ weight.t()).norm()
    plain = formats.plain_output(problem, formats.int4_rounded)
    assert error(formats.serq_output(problem, formats.int4_rounded, 64)) < error(plain)


def test_problems_of_a_model_are_what_its_linears_read():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    data = torch.randn(3, 5, 4), torch.randn(2, 5, 4)
    run = [lambda x=x: model(x) for x in data]
    (problem,) = problems.of_model(model, {"2": "MLP middle"}, tuple(run))
    hidden = [model[1](model[0](x)).flatten(0, 1) for x in data]
    assert problem.kind == "MLP middle" and torch.equal(problem.weight, model[2].weight)
    assert torch.equal(problem.calibration, hidden[0])
    assert torch.equal(problem.evaluation, hidden[1])
    assert not model[2]._forward_pre_hooks


def rows(**sqnr_db: float) -> dict:
    names = {name for better, worse, _ in relations.CLAIMS.values() for name in (better, worse)}
    return {name: {"sqnr_db": sqnr_db.get(name.replace(" ", "_"), 20.0)} for name in names}


def test_relations_are_mean_gains_and_wins():
    """ARHQ +1 and -0.4 dB over one SVD: mean +0.3, one win of two. Equal rows: no claim of a gain
    holds, that of "not worse" does."""
    found = relations.relations([rows(ARHQ_r128=21.0), rows(ARHQ_r128=19.6)])
    claim = found["ARHQ beats one SVD at rank 128"]
    assert (claim["gain_db"], claim["wins"], claim["of"]) == (pytest.approx(0.3), 1, 2)
    assert claim["holds"]
    assert not found["SERQ beats plain"]["holds"]
    assert found["smoothing + ARC is not worse than ARC"]["holds"]


def test_every_row_end_to_end_and_the_check_fails_with_a_relation(tmp_path, capsys, monkeypatch):
    """One small linear: figures and costs of all rows, the record of them; --check exits with 1 if
    a claim fails."""
    path = write_imatrix(tmp_path / "m.dat", {"blk.0.ffn_up.weight": (1, profile(128))})
    arguments = ["--imatrix", str(path), "--kinds", "MLP input", "--tokens", "96"]
    arguments += ["--out-features", "48", "--record", str(tmp_path / "record.json")]
    methods.main(arguments)
    document = last_json(capsys)
    ((kinds,),) = [r["kinds"].values() for r in document["results"].values()]
    measured = kinds[0]
    assert measured["plain"]["extra_bits"] == pytest.approx(32 / (48 * 128))
    bits = 16 * 32 * (48 + 128) / (48 * 128) + 32 * 128 / (48 * 128)
    assert measured["ARHQ r32"]["extra_bits"] == pytest.approx(bits + 32 / (48 * 128))
    assert all(10 < row["sqnr_db"] < 80 for row in measured.values())
    assert measured["SVDQuant r32"]["sqnr_db"] > measured["plain"]["sqnr_db"] + 3
    assert json.loads((tmp_path / "record.json").read_text()) == document
    written = (tmp_path / "record.md").read_text()
    assert f"| AWQ, W4A16 | {measured['AWQ, W4A16']['sqnr_db']:.2f} |" in written
    assert "at a reduced size: 48 outputs." in written
    assert "* MLP input: 1 linears [N, K] 48 x 128" in written and str(tmp_path) not in written
    assert written.count("PASS: ") + written.count("FAIL: ") == len(relations.CLAIMS)
    failing = {"claim": {"gain_db": -1.0, "wins": 0, "of": 1, "holds": False}}
    monkeypatch.setattr(methods, "relations", lambda rows: failing)
    monkeypatch.setattr(methods, "measure", lambda problem, scale: measured)
    with pytest.raises(SystemExit) as stopped:
        methods.main([*arguments, "--check"])
    assert stopped.value.code == 1 and "FAIL: claim" in capsys.readouterr().out


def test_nothing_to_measure_is_refused(capsys):
    for arguments in ([], ["--encoder", "minilm"]):
        with pytest.raises(SystemExit):
            methods.parse(arguments)
    assert "--encoder needs --text" in capsys.readouterr().err
