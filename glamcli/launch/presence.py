"""Whether a slice that is gone was taken away, or deleted by somebody who wants none any more."""

from contextlib import suppress

from glamcli.errors import LaunchError
from glamcli.launch.gcloud import Gcloud
from glamcli.launch.record import Launch, Record, Stopped

MAX_ABSENT = 3
"""looks in a row at which a slice may be gone that should be there."""


class Presence:
    """What a launcher knows of its slice's being there; kept in the record."""

    def __init__(self, launch: Launch, record: Record):
        self._launch, self._record = launch, record
        self._absent = 0

    def check_wanted(self) -> None:
        """Raises: Stopped when another machine has said in the run's bucket that it is to end."""
        with suppress(OSError):  # before a slice is asked for, it is an error
            if self._record.is_stopped_elsewhere(self._launch):
                self.leave()

    def leave(self) -> None:
        """Another machine asked for the end. Raises: Stopped."""
        launch = self._launch
        launch.ended = "stopped from another machine"
        self._record.save_unless_stopped(launch, shared=False)
        raise Stopped(
            f"`{launch.name}` was stopped from another machine, which deletes its slice; "
            f"`glam launch status {launch.name}` says whether it is gone"
        )

    def expect(self, there: bool) -> None:
        """Raises: Stopped, LaunchError."""
        self._absent = 0
        if self._launch.expected is not there:
            self._launch.expected = there
            self._record.save_unless_stopped(self._launch)

    def delete(self, cloud: Gcloud) -> None:
        """Deletes the slice, which is then not expected, whoever looks next.

        Raises: Stopped, LaunchError.
        """
        self.expect(False)
        cloud.delete(self._launch.name)

    def missing(self, newest: int) -> bool:
        """Whether the slice, which is not there, should be; `newest` is the newest step seen.

        A slice that Google takes away is first seen so, and stays until it is deleted. One that is
        just gone was deleted on another machine or in the console, by somebody who wants none.

        Raises: LaunchError when that is certain: the launch then has ended; Stopped.
        """
        launch = self._launch
        if not launch.expected:
            return False
        self._absent += 1
        if self._absent < MAX_ABSENT:
            return True
        launch.ended, launch.code = "its slice was deleted by somebody else", LaunchError.exit_code
        launch.has_none()
        self._record.save_unless_stopped(launch)
        raise LaunchError(
            f"the slice of `{launch.name}` was deleted, and not by its launcher, which ends; the "
            f"newest step seen is {newest}",
            "the same command asks for another slice and goes on from the newest checkpoint",
        )
