"""How a launch's slice is asked for: one at a time, and what was asked for is never forgotten."""

from contextlib import suppress
from typing import IO

from glamcli.errors import CloudError
from glamcli.launch.decisions import SlicePhase
from glamcli.launch.ending import is_anothers
from glamcli.launch.gcloud import Gcloud
from glamcli.launch.meaning import NameTaken, NoLogin, TryAgain
from glamcli.launch.record import Launch, Record, Stopped


def create_slice(launch: Launch, record: Record, cloud: Gcloud) -> None:
    """Asks for the slice, which is counted first.

    Raises: Stopped, Creating; TryAgain where a slice may be there; CloudError when Google refused,
        and said that there is none: the launch then has ended.
    """
    with record.creating() as held:
        launch.slices += 1
        launch.asking = True
        record.save_unless_stopped(launch, shared=False)
        try:
            _ask(launch, record, cloud, held)
        except (TryAgain, NoLogin):
            raise
        except CloudError as error:
            if isinstance(error, NameTaken) and launch.slices > 1:
                raise TryAgain(error.what) from error  # our last one, not quite gone
            _check_refused(launch, cloud, error)
            launch.slices -= 1
            launch.ended, launch.code, launch.gone = error.what, error.exit_code, True
            record.save_unless_stopped(launch)
            raise
        launch.expected = True
        record.save_unless_stopped(launch)


def _ask(launch: Launch, record: Record, cloud: Gcloud, held: IO[str]) -> None:
    try:
        try:
            record.check_wanted(launch)
        except OSError as error:
            launch.slices -= 1
            raise TryAgain(f"{launch.run}: {error.strerror}; no slice is asked for") from error
        cloud.create(launch, held)
        with suppress(OSError):
            if record.is_stopped_elsewhere(launch):  # meanwhile, maybe while this machine slept
                cloud.delete(launch.name)
                raise Stopped(f"`{launch.name}` was stopped from another machine")
    finally:
        launch.asking = False
        record.save(launch)


def _check_refused(launch: Launch, cloud: Gcloud, error: CloudError) -> None:
    """Raises: TryAgain when there is a slice, which then is the launch's."""
    found = cloud.find(launch.name)
    foreign = isinstance(error, NameTaken) and found.label != launch.id
    if found.phase is not SlicePhase.ABSENT and not foreign and not is_anothers(launch, found):
        raise TryAgain(f"{error.what}; but there is a slice") from error
