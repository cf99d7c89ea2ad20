"""What a program reports while it runs; how it is shown is decided elsewhere.

Programs (train, prepare, evaluate) receive a `Progress` and never print. `glamcli.cli.render`
implements it three times: a live terminal, plain lines, and one JSON object per line.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class Phase:
    """One bar."""

    def advance(self, units: int = 1) -> None:
        """More units are done."""

    def note(self, text: str) -> None:
        """Changes the text after the bar."""


class Progress:
    """What programs report through; the methods here show nothing."""

    @contextmanager
    def phase(self, name: str, total: int | None = None, unit: str = "") -> Iterator[Any]:
        """Yields a `Phase`; `total` is None when it cannot be known."""
        del name, total, unit
        yield Phase()

    def step(self, values: Mapping[str, Any]) -> None:
        """The numbers of one training step, as in `metrics.jsonl`."""

    def say(self, text: str) -> None:
        """One line of information."""

    def warn(self, text: str) -> None:
        """One line that the user should act on."""


class Silent(Progress):
    """Shows nothing: for tests and for use as a library."""


class Aside(Progress):
    """Progress of a process that is not the first: only what concerns its own machine."""

    def __init__(self, progress: Progress, index: int):
        self._progress = progress
        self._prefix = f"process {index}: "

    def say(self, text: str) -> None:
        self._progress.say(self._prefix + text)

    def warn(self, text: str) -> None:
        self._progress.warn(self._prefix + text)


def duration(seconds: float) -> str:
    """Seconds as `8 s`, `3:05` or `2:03:04`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
