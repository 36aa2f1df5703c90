"""One progress bar for a whole call, with the name of its stage and the time that is left.

The bar counts forwards of single tokens: every stage says beforehand how many its work is worth
(arc_ao/flow/expected_cost.py), so that the time left follows from the time spent.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

FORMAT = "{desc}{percentage:3.0f}%|{bar}| {elapsed}, about {remaining} left"
Advance = Callable[[float], None]
Item = TypeVar("Item")


class Progress:
    """Stages of one call, in order.

    Args:
        expected: name of each stage -> what it is expected to cost; stages that are not named here
            cost nothing.
        show: whether there is a bar.

    Attributes:
        seconds: wall-clock seconds by stage; cpu_seconds: of the process, all threads.
    """

    def __init__(self, expected: Mapping[str, float] | None = None, *, show: bool = False) -> None:
        self.expected = dict(expected or {})
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self._before = 0.0  # cost of the stages that ended, as expected
        self._stage: str | None = None
        self._bar = tqdm(
            total=max(1.0, sum(self.expected.values())),
            disable=not show,
            leave=False,
            smoothing=0,  # the mean rate: stages differ in what a step takes
            bar_format=FORMAT,
        )

    @contextmanager
    def stage(self, name: str, seconds: float | None = None) -> Iterator[Advance]:
        """Inside, a stage runs; it says by how much of itself (0 to 1) it came further.

        A stage inside of another is part of it.

        Args:
            seconds: what it will take, where that is known: counts instead of its expected cost.
        """
        if self._stage is not None:
            yield lambda share: None
            return
        if seconds is not None:
            self._expect_seconds(name, seconds)
        self._stage, cost = name, self.expected.pop(name, 0.0)  # a second time is a surprise
        self._bar.set_description(name)
        wall, cpu, done = time.perf_counter(), time.process_time(), 0.0

        def advance(share: float) -> None:
            nonlocal done
            done = min(1.0, done + share)
            self._move_to(self._before + done * cost)

        try:
            yield advance
        finally:
            self._stage = None
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - wall
            self.cpu_seconds[name] = self.cpu_seconds.get(name, 0.0) + time.process_time() - cpu
        self._before += cost
        self._move_to(self._before)

    def steps(self, name: str, items: Sequence[Item]) -> Iterator[Item]:
        """The items of a stage, one equal step each."""
        with self.stage(name) as advance:
            for item in items:
                yield item
                advance(1 / len(items))

    def _expect_seconds(self, name: str, seconds: float) -> None:
        """Expect of a stage what those before it would have done in that time."""
        elapsed = sum(self.seconds.values())
        if self._before and elapsed:
            cost = seconds * self._before / elapsed
            self._bar.total += cost - self.expected.get(name, 0.0)
            self.expected[name] = cost

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()

    def _move_to(self, cost: float) -> None:
        self._bar.n = min(cost, self._bar.total)
        self._bar.refresh()


SILENT = Progress()
