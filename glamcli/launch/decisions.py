"""What the launcher decides by: states of a slice, ends of a run. No side effects."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from glamcli.errors import EXIT_PREEMPTED

MAX_ENDS = 3
"""ends in a row without a new checkpoint, after which a run is not started again."""
MAX_FAILED = 5
"""requests in a row that failed before there was a slice."""
MAX_WAIT_SECONDS = 300.0

# A cause that is the same the next time: a bug, the recipe, data, checkpoints, memory, numbers, a
# command that is not there.
FINAL_CODES = frozenset((1, 2, 3, 4, 5, 6, 126, 127))
_LOST = frozenset(("PREEMPTED", "TERMINATED", "STOPPED", "STOPPING", "DELETING", "HIDDEN"))


class SlicePhase(Enum):
    """What a slice is good for."""

    ABSENT = "not there"
    WAITING = "waited for"
    READY = "ready"
    LOST = "lost"
    FAILED = "failed"
    LEAVING = "being deleted"


def phase(request: str | None, node: str | None) -> SlicePhase:
    """Of the state of a queued resource and of its node, each None where there is none."""
    if request is None:
        if node == "DELETING":
            return SlicePhase.LEAVING
        return SlicePhase.ABSENT if node is None else SlicePhase.LOST
    if request in ("SUSPENDING", "SUSPENDED"):
        return SlicePhase.LOST
    if request in ("FAILED", "DELETING"):
        return SlicePhase.FAILED if request == "FAILED" else SlicePhase.LEAVING
    if request != "ACTIVE":
        return SlicePhase.WAITING
    if node is None or node in _LOST:
        return SlicePhase.LOST
    return SlicePhase.READY if node == "READY" else SlicePhase.WAITING


@dataclass(frozen=True)
class End:
    """How a run ended: `code` of the worker that says most about it; `again` to start it again."""

    code: int
    worker: int
    again: bool

    @property
    def words(self) -> str:
        """For a person."""
        how = f"by signal {-self.code}" if self.code < 0 else f"with exit code {self.code}"
        return f"worker {self.worker} ended {how}"


def end_of(codes: Mapping[int, int]) -> End:
    """The end of a run by the exit codes of its workers, negative for a signal (docs/hosts.md).

    A final cause of one worker is the run's; the others then end because that one is gone. 75 is
    said where all had the time to save.
    """
    for final in (True, False):
        for worker, code in sorted(codes.items()):
            if code not in (0, EXIT_PREEMPTED) and (code in FINAL_CODES) is final:
                return End(code, worker, again=not final)
    worker, code = max(sorted(codes.items()), key=lambda each: each[1])
    return End(code, worker, again=code != 0)


def wait_seconds(failures: int, first: float) -> float:
    """How long to wait after so many failures in a row: `first` seconds, doubling to 5 minutes."""
    return min(MAX_WAIT_SECONDS, first * 2 ** min(failures, 30))
