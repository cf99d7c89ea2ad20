"""How fast each process of a run would be if it did not have to wait for the others.

Their step times are equal. What differs is how long each waited for its devices: a process that is
late with its part waits least. Its own work plus the shortest wait is what a step would take it
alone. What this shows, and that it does not show a slow device, is in docs/hosts.md.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

SLOW_RATIO = 1.5
SLOW_STEPS = 20
PACE_KEYS = ("slowest_process", "slowest_process_seconds", "fastest_process_seconds")


class Pace:
    """Step times of all processes, from what each has measured."""

    def __init__(self, name: Callable[[int], str]):
        self._name = name
        self._since = time.monotonic()
        self._waited = 0.0
        self._slowest, self._slow_steps = 0, 0
        """the slowest process of the last step, and for how many it has been too slow."""
        self._recent: deque[np.ndarray] = deque(maxlen=SLOW_STEPS)
        self._unsummed: list[np.ndarray] = []

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time spent inside as waiting for the devices."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._waited += time.monotonic() - started

    def restart(self) -> None:
        """Leaves out the time since the last step, which was not spent on training."""
        self._since, self._waited = time.monotonic(), 0.0

    def mine(self) -> tuple[float, float]:
        """Seconds since the last call, and how many of them were spent waiting."""
        mine = time.monotonic() - self._since, self._waited
        self.restart()
        return mine

    def add(self, measured: np.ndarray) -> str | None:
        """Adds `mine()` of all processes [processes, 2] for one step; returns a warning when one of
        them has been too slow for `SLOW_STEPS` steps. One process alone is not measured."""
        if len(measured) == 1:
            return None
        seconds, waited = measured.T
        alone = seconds - waited + waited.min()
        self._recent.append(alone)
        self._unsummed.append(alone)
        slowest = int(alone.argmax())
        is_slow = alone[slowest] > SLOW_RATIO * alone.min()
        before = self._slow_steps if slowest == self._slowest else 0
        self._slowest, self._slow_steps = slowest, before + 1 if is_slow else 0
        if self._slow_steps != SLOW_STEPS:
            return None
        recent = np.mean(self._recent, axis=0)
        return (
            f"the others wait for {self._name(slowest)}: a step takes it {recent[slowest]:.3g} s, "
            f"the fastest process {recent.min():.3g} s, for {SLOW_STEPS} steps"
        )

    def summary(self) -> dict[str, float]:
        """Mean step times in seconds since the last summary, of the slowest process (and which it
        is) and of the fastest."""
        if not self._unsummed:
            return {}
        mean = np.mean(self._unsummed, axis=0)
        self._unsummed = []
        values = (int(mean.argmax()), round(float(mean.max()), 6), round(float(mean.min()), 6))
        return dict(zip(PACE_KEYS, values, strict=True))
