"""The small language model and the texts that come with the package."""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
MODEL = ASSETS / "tiny_llama"
HELDOUT_TEXT = ASSETS / "text" / "heldout.txt"
CALIBRATION_TEXT = ASSETS / "text" / "calibration.txt"  # a book, for the shipped model
MIXED_TEXT = ASSETS / "text" / "calibration_mixed.txt"  # several kinds, for any other model
