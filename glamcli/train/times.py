"""Where the time of a run goes: every second since it was started belongs to exactly one kind.

The seconds of earlier processes of the run are those that its checkpoint carries; what was done
after that checkpoint and is done again is `lost`, as far as the metrics tell how long it took.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median_low
from typing import Any, TypeVar

import jax

from glamcli.progress import duration

TIME_KINDS = {
    "start": "starting",
    "data": "preparing data",
    "compile": "compiling",
    "step": "training",
    "data_wait": "waiting for data",
    "eval": "evaluating",
    "save": "saving",
    "lost": "in steps that were lost",
}
"""Kinds of time, and how they are shown."""
TIME_KEYS = ("goodput", *(f"seconds/{kind}" for kind in TIME_KINDS))
"""Keys in the metrics, all of the whole run up to there."""
WAIT_FRAC = 0.2
"""share of the time of `WAIT_STEPS` steps spent waiting for data that is worth a warning."""
WAIT_STEPS = 20
WARN_STEPS = 1000
"""at least so many are between two warnings."""

_Iterated = TypeVar("_Iterated")
_Returned = TypeVar("_Returned")


class Times:
    """The seconds of a run by kind; `since` is when it was started, by this clock."""

    def __init__(
        self, since: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._spent = dict.fromkeys(TIME_KINDS, 0.0)
        self._kinds = ["start"]
        self._until = clock() if since is None else since
        self._waited = 0.0
        """for the batch that came last."""
        self._read_seconds: Mapping[str, float] = {}
        self._recent: deque[tuple[float, float]] = deque(maxlen=WAIT_STEPS)
        """of each of the last steps: seconds waited for data, and in all."""
        self._busy: deque[float] = deque(maxlen=WAIT_STEPS)
        """seconds of steps at whose two ends the devices were computing: their own time."""
        self._step_began: float | None = None
        self._was_idle = True
        self._has_warned = False
        self._warn_in = 0
        """steps until the next warning may come."""

    def go_on(self, saved: Mapping[str, Any], until: float) -> None:
        """Adds what earlier processes spent up to the checkpoint, and what they lost: the rest of
        the seconds `until` the run was last heard of."""
        known = {kind: seconds for kind, seconds in saved.items() if kind in TIME_KINDS}
        for kind, seconds in known.items():
            self._spent[kind] += seconds
        self._spent["lost"] += max(0.0, until - sum(known.values()))

    @contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """Time inside belongs to this kind, and no longer to the one around it."""
        self._settle()
        self._kinds.append(kind)
        try:
            yield
        finally:
            self._settle()
            self._kinds.pop()

    def of(self, kind: str, call: Callable[..., _Returned], *arguments: Any) -> _Returned:
        """What the call returns, its time as `spent`."""
        with self.spent(kind):
            return call(*arguments)

    def batches(
        self, batches: Iterator[_Iterated], read_seconds: Mapping[str, float]
    ) -> Iterator[_Iterated]:
        """The same batches; `read_seconds` by source is for the warning of `step`."""
        self._read_seconds = read_seconds
        while True:
            began = self._clock()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited = self._clock() - began
            yield batch

    def step(self, sums: Any) -> str | None:
        """Notes that the batch after a step was fetched, while that step made `sums`. If these were
        ready by then, the wait was one for data but for the usual time of a step, which the devices
        spent computing.

        Returns a warning when that was too much of the time of the last steps.
        """
        is_idle = all(getattr(x, "is_ready", lambda: True)() for x in jax.tree.leaves(sums))
        usual = median_low(self._busy) if self._busy else 0.0  # the first are slower
        waited, self._waited = (max(0.0, self._waited - usual) if is_idle else 0.0), 0.0
        self._settle()
        self._spent[self._kinds[-1]] -= waited
        self._spent["data_wait"] += waited
        began, self._step_began = self._step_began, self._until
        was_idle, self._was_idle = self._was_idle, is_idle
        if began is None:
            return None
        if not (is_idle or was_idle):
            self._busy.append(self._until - began)
        self._recent.append((waited, self._until - began))
        waiting, total = (sum(each) for each in zip(*self._recent, strict=True))
        self._has_warned &= waiting > WAIT_FRAC / 2 * total
        self._warn_in -= 1
        is_slow = len(self._recent) == WAIT_STEPS and waiting > WAIT_FRAC * total
        if not is_slow or self._has_warned or self._warn_in > 0:
            return None
        self._has_warned, self._warn_in = True, WARN_STEPS
        of = max(self._read_seconds, key=self._read_seconds.__getitem__, default=None)
        named = "" if of is None else f"; most of the reading is of source `{of}`"
        return f"training waits for its data for {waiting / total:.0%} of the time{named}"

    def seconds(self) -> dict[str, float]:
        """The seconds of every kind up to now, for JSON."""
        self._settle()
        return {kind: round(seconds, 3) for kind, seconds in self._spent.items()}

    def summary(self) -> dict[str, float]:
        """`TIME_KEYS`, for the metrics."""
        spent = self.seconds()
        of_all = {f"seconds/{kind}": seconds for kind, seconds in spent.items()}
        return {"goodput": round(spent["step"] / max(sum(spent.values()), 1e-9), 4), **of_all}

    def __str__(self) -> str:
        spent = self.seconds()
        total = sum(spent.values())
        shares = {TIME_KINDS[kind]: seconds / max(total, 1e-9) for kind, seconds in spent.items()}
        goodput = shares.pop(TIME_KINDS["step"])
        shown = sorted(shares.items(), key=lambda each: -each[1])
        rest = [f"{share:.1%} {name}" for name, share in shown if share >= 0.0005]
        return f"{duration(total)} in all, {goodput:.1%} training (goodput), {', '.join(rest)}"

    def _settle(self) -> None:
        now = self._clock()
        self._spent[self._kinds[-1]] += now - self._until
        self._until = now
