"""When a save that failed is tried again, until when, and how old the newest checkpoint is.

A save fails for reasons that pass: a full disk that somebody empties, a file server that comes
back. Both take longer than a training step, so it is tried again on a clock: soon at first, then
every two minutes. All times are of a clock that nobody can set.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from glamcli.progress import duration

WAITS = (5.0, 15.0, 60.0, 120.0)
"""seconds before the attempt after the first, second, ... failure in a row; the last one stays."""
SLOW_SECONDS = 60.0
"""a save that takes this long is told, and again whenever its time has doubled."""
LOOK_SECONDS = 1.0
"""between looks for the run folder, which a file server may take long to answer."""


@dataclass
class Clock:
    """What time it is in seconds, and how to wait; tests have one of their own."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


class Retry:
    """The failures in a row of the saves of a run, and what follows from them.

    `limit` is how many seconds after the first of them a failure is the last, unless a long
    evaluation took the time of most attempts: all of `WAITS` that `limit` has room for come first.
    """

    def __init__(self, limit: float, clock: Clock):
        self.limit = limit
        self._clock = clock
        self._complete = clock.now()
        self._started = clock.now()
        self._next_warning = SLOW_SECONDS
        self._first_failure: float | None = None
        self._num_failures = 0
        self._next_attempt = 0.0

    @property
    def is_due(self) -> bool:
        """Whether the time for another attempt has come."""
        return self._clock.now() >= self._next_attempt

    @property
    def age(self) -> str:
        """How long ago the newest checkpoint was complete, or the run began."""
        return duration(self._clock.now() - self._complete)

    def start(self) -> None:
        """A save begins."""
        self._started, self._next_warning = self._clock.now(), SLOW_SECONDS

    def slow(self) -> str | None:
        """How long the save in progress has taken, when that is worth another warning."""
        taken = self._clock.now() - self._started
        if taken < self._next_warning:
            return None
        self._next_warning = 2 * taken
        return duration(taken)

    def succeed(self) -> None:
        """The save that began last is complete."""
        self._complete = self._clock.now()
        self._first_failure, self._num_failures, self._next_attempt = None, 0, 0.0

    def fail(self) -> str | None:
        """In which time it is tried again after this failure; None when `limit` has passed."""
        now = self._clock.now()
        if self._first_failure is None:
            self._first_failure = now
        end = self._first_failure + self.limit
        if now >= end and sum(WAITS[: self._num_failures]) >= min(self.limit, sum(WAITS)):
            return None
        self._next_attempt = now + WAITS[min(self._num_failures, len(WAITS) - 1)]
        if now < end:  # the last attempt is when the time is up, not after it
            self._next_attempt = min(self._next_attempt, end)
        self._num_failures += 1
        return duration(self._next_attempt - now)

    def wait(self) -> None:
        """Returns when the time for another attempt has come."""
        self._clock.sleep(max(0.0, self._next_attempt - self._clock.now()))
