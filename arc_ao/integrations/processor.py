"""Processors of models that read images or sound besides text, as files: calibration needs none."""

import shutil
from pathlib import Path

PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)


def copy_processor(model: Path, output: Path) -> None:
    """Copy what AutoProcessor reads, as far as a model directory has it, to a quantized model.

    As files, since loading a processor takes libraries for images that quantizing does without.
    """
    for name in PROCESSOR_FILES:
        if (model / name).is_file():
            shutil.copy(model / name, output / name)
