"""Whether a slice that is gone was taken away, or deleted by somebody who wants none any more."""

from glamcli.errors import LaunchError
from glamcli.launch.gcloud import Gcloud
from glamcli.launch.record import Launch, Record

MAX_ABSENT = 3
"""looks in a row at which a slice may be gone that should be there."""


class Presence:
    """What a launcher knows of its slice's being there; kept in the record."""

    def __init__(self, launch: Launch, record: Record):
        self._launch, self._record = launch, record
        self._absent = 0

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

    def missing(self) -> bool:
        """Whether the slice, which is not there, should be.

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
            f"newest step seen is {launch.step}",
            "the same command asks for another slice and goes on from the newest checkpoint",
        )
