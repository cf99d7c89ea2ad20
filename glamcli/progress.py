"""What a program reports while it runs; how it is shown is decided elsewhere.

Programs (train, prepare, evaluate) receive a `Progress` and never print. `glamcli.cli.render`
implements it three times: a live terminal, plain lines, and one JSON object per line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol


class Phase(Protocol):
    """One bar: `advance` as units are done, `note` to change the text after it."""

    def advance(self, units: int = 1) -> None: ...

    def note(self, text: str) -> None: ...


class Progress(Protocol):
    """What programs report through."""

    def phase(self, name: str, total: int | None = None, unit: str = "") -> Any:
        """Context manager yielding a `Phase`; `total` is None when it cannot be known."""
        ...

    def step(self, values: Mapping[str, Any]) -> None:
        """The numbers of one training step, as in `metrics.jsonl`."""
        ...

    def say(self, text: str) -> None:
        """One line of information."""
        ...

    def warn(self, text: str) -> None:
        """One line that the user should act on."""
        ...


class SilentPhase:
    """A phase that shows nothing."""

    def advance(self, units: int = 1) -> None:
        del units

    def note(self, text: str) -> None:
        del text


class Silent:
    """Shows nothing: for tests and for use as a library."""

    @contextmanager
    def phase(self, name: str, total: int | None = None, unit: str = "") -> Iterator[Phase]:
        del name, total, unit
        yield SilentPhase()

    def step(self, values: Mapping[str, Any]) -> None:
        del values

    def say(self, text: str) -> None:
        del text

    def warn(self, text: str) -> None:
        del text


class Aside(Silent):
    """Progress of a process that is not the first: only what concerns its own machine."""

    def __init__(self, progress: Progress, index: int):
        self._progress = progress
        self._prefix = f"process {index}: "

    def say(self, text: str) -> None:
        self._progress.say(self._prefix + text)

    def warn(self, text: str) -> None:
        self._progress.warn(self._prefix + text)
