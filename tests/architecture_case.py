"""One row of the table of architectures: a tiny model, what it reads, what is expected of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

VOCABULARY = 96
TOKENS = 24
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE_TOKEN = 90
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, **SPECIAL}
ENCODER = SIZES | TEXT
DECODER = ENCODER | {"num_key_value_heads": 2}
IMAGE = SIZES | {"image_size": 32, "patch_size": 8}

Batch = dict[str, Tensor]
Inputs = Callable[[torch.Generator], Batch]


@dataclass(frozen=True)
class Architecture:
    """A model class of transformers, its configuration, its inputs, and what must come out.

    Attributes:
        model: name of the class.
        settings: arguments of its configuration.
        inputs: generator -> one batch of two rows.
        left: names of the linears that stay in 16 bits, "*" for numbers, after either recipe.
        refused: what `quantize_` says instead, a regular expression; "" where it succeeds.
        dtype: of the weights.
        slow: a close relative of another row, left out of the short run.
        note: tells rows of one class apart.
    """

    model: str
    settings: dict[str, Any]
    inputs: Inputs
    left: tuple[str, ...] = ()
    refused: str = ""
    dtype: torch.dtype = torch.bfloat16
    slow: bool = False
    note: str = ""

    @property
    def id(self) -> str:
        """What the row is called."""
        return f"{self.model}, {self.note}" if self.note else self.model

    def build(self) -> PreTrainedModel:
        """The model, with random weights that let every linear reach the output."""
        model_class = getattr(transformers, self.model)
        config = model_class.config_class(**self.settings)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = model_class(config)
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=module.in_features**-0.5)
        return model.to(self.dtype).eval()

    def batches(self, count: int, seed: int = 0) -> Iterator[Batch]:
        """Random inputs."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            yield self.inputs(generator)


def ids(generator: torch.Generator, *shape: int) -> Tensor:
    """Token ids that are none of the special ones."""
    return torch.randint(3, VOCABULARY - 16, shape, generator=generator)


def tokens(generator: torch.Generator) -> Batch:
    """Two texts of equal length."""
    return {"input_ids": ids(generator, 2, TOKENS)}


def padded_tokens(generator: torch.Generator) -> Batch:
    """Two texts, the second one a third shorter."""
    return tokens(generator) | {"attention_mask": mask(TOKENS)}


def mask(length: int) -> Tensor:
    """[2, length]: the second row's last third is padding."""
    kept = torch.ones(2, length, dtype=torch.long)
    kept[1, length * 2 // 3 :] = 0
    return kept


def source_and_target(generator: torch.Generator) -> Batch:
    """A padded source, and a target of another length."""
    return padded_tokens(generator) | {"decoder_input_ids": ids(generator, 2, TOKENS // 2)}


def noise(generator: torch.Generator, *shape: int) -> Tensor:
    """Normal numbers in bfloat16."""
    return torch.randn(shape, generator=generator).bfloat16()


def images(generator: torch.Generator) -> Batch:
    """Two images."""
    return {"pixel_values": noise(generator, 2, 3, 32, 32)}


def images_and_tokens(generator: torch.Generator) -> Batch:
    """Two images and two padded texts."""
    return padded_tokens(generator) | images(generator)


def waves(generator: torch.Generator) -> Batch:
    """Two recordings, the second one a third shorter."""
    return {"input_values": noise(generator, 2, 400), "attention_mask": mask(400)}
