"""What training did, for summaries."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TuningRecord:
    """One run.

    Attributes:
        trained: "norms" or "codes and norms".
        steps: one batch each.
        before, after: mean divergence of the model on the batches kept aside.
        tokens_aside: tokens in them.
        seconds: of wall time.
    """

    trained: str
    steps: int
    before: float
    after: float
    tokens_aside: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.trained} tuned in {self.steps} steps and {self.seconds / 60:.1f} minutes, "
            f"divergence on {self.tokens_aside} tokens kept aside {self.before:.4f} -> "
            f"{self.after:.4f}"
        )
