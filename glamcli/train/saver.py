"""Saves of a run in progress: one that fails is told and made up for, a second one ends the run.

A save fails for reasons that pass (a full disk that somebody empties, a file server that comes
back), and a run that has just trained for hours should not end with it. Nothing is lost by going
on: the next attempt saves the newer state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from glamcli.checkpoint import Checkpoints
from glamcli.errors import CheckpointError
from glamcli.progress import Progress


class Saver:
    """Checkpoints, and what became of the last save.

    Raises: CheckpointError, from every method, when a save failed and so did the one before; on
        several hosts when one failed, because all of them would have to agree to try again.
    """

    def __init__(self, checkpoints: Checkpoints, progress: Progress):
        self.checkpoints = checkpoints
        self.progress = progress
        self.is_owed = False
        """whether a save failed and none was started since: to be made up for at this step."""
        self._failed = False

    def poll(self) -> None:
        """Notices how the save in progress ended; call once per training step."""
        self._note(self.checkpoints.poll)

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Starts saving `state`, after the save in progress."""
        self._note(self.checkpoints.wait)
        self.is_owed = False
        self._note(lambda: self.checkpoints.save(step, state, meta))

    def finish(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Returns when a checkpoint of `step`, whose save was started, is complete."""
        self._note(self.checkpoints.wait)
        if self.is_owed:
            self.save(step, state, meta)
            self._note(self.checkpoints.wait)

    def newest(self) -> int | None:
        """The newest complete step, once the save in progress has ended."""
        with contextlib.suppress(CheckpointError):
            self._note(self.checkpoints.wait)
        return self.checkpoints.latest()

    def _note(self, attempt: Callable[[], int | None]) -> None:
        try:
            step = attempt()
        except CheckpointError as error:
            if self._failed or self.checkpoints.host.count > 1:
                raise
            self._failed = self.is_owed = True
            self.progress.warn(f"{error.what}; trying again ({error.hint})")
        else:
            if step is not None:
                self._failed = False
                self.progress.say(f"step {step}: saved")
