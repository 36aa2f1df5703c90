"""How weights were rounded, and the warning where GPTQ had few tokens for it."""

import warnings
from dataclasses import asdict, dataclass
from typing import Any

ENOUGH = 10  # calibration tokens for each input channel


@dataclass(frozen=True)
class RoundingNote:
    """Of one linear."""

    rounding: str  # "gptq" or "nearest", what was kept
    damping: float | None  # of GPTQ's Hessian, whichever was kept; None where there was none
    tokens: int  # seen for it, those kept aside included
    channels: int  # in_features

    @property
    def tokens_per_channel(self) -> float:
        """Whether they are enough."""
        return self.tokens / self.channels

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def warn_of_few_tokens(notes: dict[str, RoundingNote], *, judged: bool = True) -> None:
    """Warn once where the inputs of any linear had less than ENOUGH tokens a channel.

    Args:
        notes: name -> note of every linear that GPTQ rounds.
        judged: they are rounded already.
    """
    few = {name: n for name, n in notes.items() if n.tokens_per_channel < ENOUGH}
    if not few:
        return
    name, worst = min(few.items(), key=lambda item: item[1].tokens_per_channel)
    kept = sum(note.rounding == "nearest" for note in notes.values())
    count = f"{kept} of {len(notes)} linears were" if judged else "linears are"
    factor = ENOUGH * worst.channels / max(1, worst.tokens)
    warnings.warn(
        f"rounding='gptq': expected at least {ENOUGH} calibration tokens for each input channel, "
        f"found {worst.tokens_per_channel:.1f} ({worst.tokens} tokens, {worst.channels} channels) "
        f"at {name} and fewer than {ENOUGH} at {len(few)} of {len(notes)} linears. Damping is "
        f"raised there, and {count} rounded to nearest where that left less error on tokens kept "
        f"aside. Give {factor:.1f} times as many tokens (--calib-tokens) for all that GPTQ can do",
        stacklevel=4,
    )
