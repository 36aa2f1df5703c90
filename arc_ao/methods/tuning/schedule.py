"""How far a budget of minutes or steps is spent, the learning rate there, and when to evaluate."""

import math
import time
from dataclasses import dataclass, field

WARMUP_STEPS = 8
EVALUATIONS = 16  # in a run, if they take a tenth of the time at most
PATIENCE = 6  # evaluations without a new best, after which a run ends


@dataclass
class Schedule:
    """The budget of one run.

    Attributes:
        minutes: of wall time, evaluations included, those before an interruption too.
        max_steps: end after so many steps, and decay over them instead of over the time.
        evaluations: in a run.
        step: steps done; seconds: spent before this process went on.
    """

    minutes: float
    max_steps: int | None = None
    evaluations: int = EVALUATIONS
    step: int = 0
    seconds: float = 0.0
    began: float = field(default_factory=time.monotonic)
    evaluated: tuple[int, float] = (0, 0.0)  # step and seconds of the last evaluation
    evaluation_seconds: float = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds of the whole run."""
        return self.seconds + time.monotonic() - self.began

    @property
    def progress(self) -> float:
        """Part of the budget that is spent, 0 to 1."""
        spent = self.elapsed / (60 * self.minutes)
        if self.max_steps is not None and spent < 1:
            spent = self.step / max(1, self.max_steps)
        return min(1.0, spent)

    @property
    def over(self) -> bool:
        """Whether no step is left."""
        return self.progress >= 1

    def rate(self) -> float:
        """Learning rate over its highest value: a warm-up, then a cosine to 0."""
        return (
            min(1.0, (self.step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * self.progress)) / 2
        )

    def evaluation_due(self) -> bool:
        """Whether a step was taken since the last evaluation and it is time for the next."""
        step, seconds = self.evaluated
        if self.step == step:
            return False
        if self.over:
            return True
        if self.max_steps is not None:
            return self.step - step >= max(1, self.max_steps // self.evaluations)
        interval = max(60 * self.minutes / self.evaluations, 9 * self.evaluation_seconds)
        return self.elapsed - seconds >= interval

    def evaluation_done(self, seconds: float) -> None:
        """Note an evaluation and what it took."""
        self.evaluated, self.evaluation_seconds = (self.step, self.elapsed), seconds

    def resume(self, step: int, seconds: float, evaluated: tuple[int, float]) -> None:
        """Go on where another process stopped."""
        self.step, self.seconds, self.evaluated = step, seconds, tuple(evaluated)
        self.began = time.monotonic()
