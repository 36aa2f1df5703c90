"""What training the codes did, for summaries."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TuningRecord:
    """One run.

    Attributes:
        steps: one batch each.
        before, after: mean divergence of the model on the batches kept aside.
        tokens_aside: tokens in them.
        seconds: of wall time.
    """

    steps: int
    before: float
    after: float
    tokens_aside: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"tuned in {self.steps} steps and {self.seconds / 60:.1f} minutes, divergence on "
            f"{self.tokens_aside} tokens kept aside {self.before:.4f} -> {self.after:.4f}"
        )
