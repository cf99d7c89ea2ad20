"""What it means that workers do not answer: they, this machine's network, or nothing yet."""

from dataclasses import dataclass
from enum import Enum

MIN_LOOKS = 4
"""in a row: one that fails after this machine slept says nothing of the slice."""
MAX_SLICES = 3
"""in a row, without a new checkpoint, that are given back for a silent worker."""


class Silence(Enum):
    """What to do about it."""

    WAIT = "it may pass"
    NEVER = "it never answered"
    ALL = "no worker answers: the network of this machine?"
    REPLACE = "another slice"
    ENOUGH = "the slices before had a silent worker, too"


@dataclass
class Hearing:
    """Whether and since when the workers of a slice answer."""

    heard: bool = False
    """whether all of this slice ever did."""
    since: float | None = None
    looks: int = 0
    slices: int = 0
    """given back for a silent worker, without a checkpoint newer than `step` since."""
    step: int = 0

    def another_slice(self) -> None:
        """There is none, or it is a new one."""
        self.heard, self.since, self.looks = False, None, 0

    def all_answer(self, step: int) -> None:
        """All workers do; the newest checkpoint that they see."""
        self.heard, self.since, self.looks = True, None, 0
        if step > self.step:
            self.slices, self.step = 0, step

    def silent(self, now: float, seconds: float, heard: bool, some: bool) -> Silence:
        """A worker does not answer, which is borne for so long; `heard` if the slice ever did, to
        this launcher or one before, `some` if others do answer."""
        self.since = self.since or now
        self.looks += 1
        if now - self.since < seconds or self.looks < MIN_LOOKS:
            return Silence.WAIT
        if not (heard or self.heard):
            return Silence.NEVER
        if not some:
            return Silence.ALL
        self.slices += 1
        return Silence.REPLACE if self.slices <= MAX_SLICES else Silence.ENOUGH
