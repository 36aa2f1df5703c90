"""Which rows of every linear are padding, where a model has several kinds of tokens."""

from fnmatch import fnmatch

import pytest
import torch
from encoder_decoders import (
    TOWER,
    bart,
    built,
    clip,
    ids,
    mask,
    question_answering,
    t5,
    wav2vec2,
    whisper,
)
from torch import Tensor, nn
from transformers import LongformerConfig, LongformerModel

from arc_ao.calibration.padding import kept_rows, kept_tokens_of_output, watched
from arc_ao.inference import run_model
from arc_ao.outputs.divergence import model_output
from arc_ao.quantize import quantize_

SOURCE, TARGET = mask(8, 5, 8), mask(8, 8, 4)  # of equal lengths, so that shapes tell nothing
TEXT, PIXELS = ids(2, 8), torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
SAMPLES = torch.randn(2, 400, generator=torch.Generator().manual_seed(0))
SOUND = torch.randn(2, 16, 60, generator=torch.Generator().manual_seed(0))
TWO = {"input_ids": TEXT, "attention_mask": SOURCE, "decoder_input_ids": ids(2, 8, seed=1)}
# Rows that count by pattern of the linear's name, the first that matches; None: all.
T5 = {"encoder.*": SOURCE, "*EncDecAttention.[kv]": SOURCE, "decoder.*": None}
BART = {
    "*.encoder.*": SOURCE,
    "*encoder_attn.[kv]_proj": SOURCE,
    "*.decoder.*": TARGET,
}
CASES = {
    "t5": (t5, TWO, T5),
    "t5, same tensor": (t5, TWO | {"decoder_input_ids": TEXT}, T5),
    "t5, labels": (t5, {k: v for k, v in TWO.items() if "dec" not in k} | {"labels": TEXT}, T5),
    "bart": (bart, TWO | {"decoder_attention_mask": TARGET}, BART),
    "whisper": (  # whose encoder reads silence as it reads speech
        whisper,
        {
            "input_features": SOUND,
            "attention_mask": mask(60, 40, 60),
            "decoder_input_ids": TEXT,
            "decoder_attention_mask": TARGET,
        },
        {"*.encoder.*": None, "*encoder_attn.[kv]_proj": None, "*.decoder.*": TARGET},
    ),
    "wav2vec2": (  # (n - 8) // 4 + 1 frames, and again with 4: 24 of 400 samples, 12 of 204
        wav2vec2,
        {"input_values": SAMPLES, "attention_mask": mask(400, 204, 400)},
        {"*": mask(24, 12, 24)},
    ),
    "clip": (  # text as long as there are patches
        clip,
        {"input_ids": ids(2, 10), "attention_mask": mask(10, 7, 10), "pixel_values": PIXELS},
        {"text_model.*": mask(10, 7, 10), "*": None},
    ),
    "question answering": (
        question_answering,
        {"input_ids": TEXT, "attention_mask": SOURCE},
        {"*": SOURCE},
    ),
}


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(99, 32), nn.Linear(32, 32)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.linear(self.embedding(tokens))


class Twice(nn.Module):
    """One tower for two kinds of text, and a second one."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.other = Tower(), Tower()

    def forward(self, query, passage, query_attention_mask, passage_attention_mask):
        query = self.shared(query, query_attention_mask)
        return query, self.shared(passage, mask=passage_attention_mask), self.other(passage)


class Torch(nn.Module):
    """torch.nn's layers, whose masks are true where there is padding."""

    def __init__(self) -> None:
        super().__init__()
        encoder = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
        decoder = nn.TransformerDecoderLayer(32, 2, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(encoder, 1, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(decoder, 1)

    def forward(self, x: Tensor, y: Tensor, padding: Tensor) -> Tensor:
        memory = self.encoder(x, src_key_padding_mask=padding)
        return self.decoder(y, memory, memory_key_padding_mask=padding)


def observed(model: nn.Module, batch: dict) -> dict[str, list[Tensor | None]]:
    """Rows of every call of every linear that count, by its name; None: all."""
    found: dict[str, list[Tensor | None]] = {}

    def see(name: str):
        return lambda _, args: found.setdefault(name, []).append(kept_rows(args[0]))

    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            module.register_forward_pre_hook(see(name))
    with watched(model):
        run_model(model, batch)
    return found


def same(found: Tensor | None, expected: Tensor | None) -> bool:
    if found is None or expected is None:
        return found is expected
    return torch.equal(found, expected.flatten().bool())


@pytest.mark.parametrize("case", CASES)
def test_padding_is_found_linear_by_linear(case):
    make, batch, expected = CASES[case]
    for name, (rows, *others) in observed(built(make), batch).items():
        if name in ("lm_head", "proj_out") or name.endswith("_projection"):
            continue  # heads stay as they are; these projections come after pooling
        pattern = next(p for p in expected if fnmatch(name, p))
        assert same(rows, expected[pattern]) and not others, name


def test_a_shared_tower_has_the_mask_of_the_call():
    """Under whatever name it is handed on."""
    query, passage = mask(8, 3, 8), mask(8, 8, 5)
    batch = {"query": TEXT, "passage": TEXT, "query_attention_mask": query}
    found = observed(built(Twice), batch | {"passage_attention_mask": passage})
    assert same(found["shared.linear"][0], query) and same(found["shared.linear"][1], passage)
    assert found["other.linear"] == [None]  # two masks fit and differ


def test_key_padding_masks_are_true_where_there_is_padding():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 8, 32, generator=generator) for _ in range(2))
    found = observed(built(Torch), {"x": x, "y": y, "padding": SOURCE == 0})
    assert same(found["encoder.layers.0.linear1"][0], SOURCE)
    assert found["decoder.layers.0.linear1"] == [None]


def test_a_mask_that_became_a_bias_of_scores_is_none():
    """Longformer's layers get it as [B, S], 0 where there is no padding, and read [S, B, D]."""
    config = LongformerConfig(
        vocab_size=99, attention_window=4, max_position_embeddings=32, **TOWER
    )
    model = built(lambda: LongformerModel(config))
    for kept in (SOURCE, mask(8, 8, 8)):
        found = observed(model, {"input_ids": TEXT, "attention_mask": kept})
        layer = "encoder.layer.0.attention."
        expected = None if kept.all() else kept
        assert same(found[layer + "output.dense"][0], expected)
        assert same(found[layer + "self.query"][0], None if kept.all() else kept.T.reshape(-1))


@pytest.mark.parametrize(
    "case, expected",
    [("t5", None), ("bart", TARGET), ("wav2vec2", mask(24, 12, 24)), ("whisper", TARGET)],
)
def test_output_is_compared_where_the_decoder_has_no_padding(case, expected):
    make, batch, _ = CASES[case]
    model = built(make)
    with watched(model):
        kept = kept_tokens_of_output(model_output(run_model(model, batch)))
    assert same(None if kept is None else kept.flatten(), expected)


@pytest.mark.parametrize("case", CASES)
def test_models_of_several_parts_are_quantized_by_the_default_recipe(case, recwarn):
    """Layers weighed and choices measured, but for outputs that cannot be compared."""
    make, batch, _ = CASES[case]
    model = built(make)
    summary = quantize_(model, calibration_data=[batch] * 2, progress=False)
    compared = case not in ("clip", "question answering")
    said = [str(w.message) for w in recwarn if "quantized without measuring" in str(w.message)]
    assert bool(summary.trials[0]) is compared and len(said) == (0 if compared else 1)
    assert not any("cannot be differentiated" in str(w.message) for w in recwarn)
    run_model(model, batch)
