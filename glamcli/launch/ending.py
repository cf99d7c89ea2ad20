"""How a launch is ended: its run saves, its slice is deleted, and nothing is created any more."""

import contextlib
import time
from dataclasses import dataclass

from glamcli.errors import CloudError, LaunchError
from glamcli.launch.decisions import SlicePhase, wait_seconds
from glamcli.launch.gcloud import Gcloud, Slice, delete_commands
from glamcli.launch.in_bucket import launch_folder
from glamcli.launch.meaning import NoLogin, TryAgain
from glamcli.launch.record import Launch, Record
from glamcli.launch.workers import SliceWorkers
from glamcli.progress import Progress, duration


@dataclass(frozen=True)
class Patience:
    """How often to look, in seconds, and for how long workers may be silent, a worker outlive
    another one, a slice be on its way out, a run save, another process create a slice, a launcher
    elsewhere ask for another one."""

    look: float = 15.0
    silence: float = 900.0
    apart: float = 1200.0
    leaving: float = 1200.0
    saving: float = 900.0
    creating: float = 180.0
    elsewhere: float = 600.0


PATIENCE = Patience()
NO_SLICE = "none"
_LIVES = (SlicePhase.READY, SlicePhase.WAITING)
MAX_SILENT = 5
"""looks in a row at which a worker may be silent before the run is not waited for."""


def bill(launch: Launch, found: Slice) -> bool:
    """Whether a slice that costs money was not counted; it is from here on."""
    if found.phase is not SlicePhase.READY or launch.costs:
        return False
    launch.opened(found.created or time.time())
    return True


def give_back(launch: Launch, cloud: Gcloud, progress: Progress, patience: Patience) -> bool:
    """Deletes the slice and waits until it is gone. Whether there was one that had not been lost.

    Raises: CloudError when it may still be there, with the command that deletes it.
    """
    commands = delete_commands(launch.name, launch.zone, launch.project)
    try:
        with progress.phase(f"deleting slice {launch.name}"):
            lived = _delete(launch, cloud, progress, patience)
    except LaunchError as error:
        what = f"slice `{launch.name}` may still cost money: {error.what}"
        raise CloudError(what, commands) from error
    except KeyboardInterrupt:
        progress.warn(f"slice `{launch.name}` may still cost money: {commands}")
        raise
    launch.has_none()
    return lived


def _delete(launch: Launch, cloud: Gcloud, progress: Progress, patience: Patience) -> bool:
    """While nobody is logged in that is no reason to leave what costs money."""
    until, tries, lived = time.monotonic() + patience.leaving, 0, False
    while True:
        last_try = time.monotonic() > until
        try:
            found = _deleted(launch, cloud, last_try)
            if found is SlicePhase.ABSENT:
                return lived
            lived = lived or found in _LIVES
        except NoLogin as error:
            if not tries:
                name = launch.name
                progress.warn(f"slice `{name}` costs money until you log in: {error.hint}")
            until, tries = time.monotonic() + patience.leaving, tries + 1
            time.sleep(wait_seconds(tries, min(patience.look, 5.0)))
            continue
        if last_try:
            raise LaunchError(f"it is not gone after {duration(patience.leaving)}")
        time.sleep(min(patience.look, 5.0))


def is_anothers(launch: Launch, found: Slice) -> bool:
    """Whether a slice that was found is labelled as that of another launch."""
    return bool(launch.id and found.label) and found.label != launch.id


def _deleted(launch: Launch, cloud: Gcloud, last_try: bool) -> SlicePhase | None:
    """What was deleted, which may have to be done again; None where Google did not answer."""
    try:
        found = cloud.find(launch.name)
        if is_anothers(launch, found):
            return SlicePhase.ABSENT
        bill(launch, found)
        if found.phase not in (SlicePhase.ABSENT, SlicePhase.LEAVING):
            cloud.delete(launch.name)
    except TryAgain:
        if last_try:
            raise
        return None
    return found.phase


def slice_words(record: Record, launch: Launch) -> str:
    """The state of a launch's slice for a person. That one is gone is noted where nobody else
    looks after the launch: it costs nothing any more.

    Raises: LaunchError when Google does not say.
    """
    if launch.gone:
        return NO_SLICE
    return seen(record, launch, Gcloud(launch.zone, launch.project)).words or NO_SLICE


def seen(record: Record | None, launch: Launch, cloud: Gcloud) -> Slice:
    """The launch's slice as it is now; the launch's cost is that of now, too. Without a record
    somebody else looks after it.

    Raises: LaunchError when Google does not say.
    """
    found = cloud.find(launch.name)
    bill(launch, found)  # not saved: whoever looks after the launch starts the run by it
    if record is None:
        return found
    if found.phase is SlicePhase.ABSENT and (launch.costs or launch.ended is not None):
        with contextlib.suppress(LaunchError), record.looking_after():
            launch.closed()
            launch.gone = launch.ended is not None
            record.save(launch)
    return found


def end_launch(
    record: Record,
    launch: Launch,
    cloud: Gcloud,
    progress: Progress,
    patience: Patience,
    elsewhere: bool = False,
) -> Launch:
    """Ends a launch, which may be looked after `elsewhere`: its run saves, its slice is deleted,
    whoever else looks after it leaves. What became of it.

    Raises: CloudError when the slice may still be there, or one of this name is not the launch's.
    """
    creates = record.stop(progress.say, patience.creating)
    if folder := launch_folder(launch.run):
        try:
            folder.stop(launch)
            if elsewhere:
                creates = folder.await_asked(progress.say, patience.creating)
                record.save(folder.load(), shared=False)
        except LaunchError as error:
            if elsewhere:
                raise
            progress.warn(f"{error.what}: a launcher on another machine does not hear of this")
    launch = record.load() or launch  # as whoever looked after it left it
    if launch.gone or not launch.slices:
        _check_absent(launch, cloud)
    else:
        _try_to_save(launch, cloud, progress, patience)
        lived = give_back(launch, cloud, progress, patience)
        if not lived and not launch.id:
            _watch(launch, cloud, progress, patience)
    launch.ended = launch.ended or "stopped"
    launch.has_none()
    launch.gone = creates is None
    record.save(launch)
    if creates:
        raise CloudError(
            f"{creates}, `{launch.name}`, which may still come",
            delete_commands(launch.name, launch.zone, launch.project),
        )
    return launch


def _watch(launch: Launch, cloud: Gcloud, progress: Progress, patience: Patience) -> None:
    """A launcher elsewhere that was just then without a slice asks for another one; when that is
    deleted, it ends."""
    until = time.monotonic() + patience.elsewhere
    with progress.phase("looking whether a launcher elsewhere asks for another slice"):
        while time.monotonic() < until:
            with contextlib.suppress(TryAgain):
                if cloud.find(launch.name).phase in _LIVES:
                    give_back(launch, cloud, progress, patience)
                    return
            time.sleep(patience.look)
    progress.warn(
        f"none did in {duration(patience.elsewhere)}; one whose requests are refused, as for a "
        "quota, may still get a slice later: end it there, if there is one"
    )


def _check_absent(launch: Launch, cloud: Gcloud) -> None:
    found = cloud.find(launch.name)
    if found.phase is not SlicePhase.ABSENT:
        raise CloudError(
            f"there is a slice `{launch.name}` ({found.words}), and it is not of this launch",
            f"if it is yours: {delete_commands(launch.name, launch.zone, launch.project)}",
        )


def _try_to_save(launch: Launch, cloud: Gcloud, progress: Progress, patience: Patience) -> None:
    for left in reversed(range(MAX_SILENT)):
        try:
            _save_run(launch, cloud, progress, patience)
            return
        except CloudError as error:
            if not left or not isinstance(error, TryAgain):
                progress.warn(f"the run could not be asked to save: {error.what}")
                return
            time.sleep(min(patience.look, 5.0))


def _save_run(launch: Launch, cloud: Gcloud, progress: Progress, patience: Patience) -> None:
    """Asks the command on the workers to save and waits for its end."""
    found = cloud.find(launch.name)
    if found.phase is not SlicePhase.READY or is_anothers(launch, found):
        return
    workers, until, silent = SliceWorkers(launch, cloud), time.monotonic() + patience.saving, 0
    with progress.phase("waiting for the run to save"):
        while time.monotonic() < until and silent < MAX_SILENT:
            answers = workers.ask(0)
            told = [each for each in answers.values() if each is not None and each.attempt]
            launch.step = max([launch.step, *(each.step for each in told)])
            missing = [each for each in range(found.num_workers) if each not in answers]
            silent = silent + 1 if missing else 0
            workers.stop()
            if not missing and all(each.code is not None for each in told):
                break
            time.sleep(min(patience.look, 5.0))
        else:
            how = f"worker {missing[0]} did not answer" if silent else "the run did not end"
            progress.warn(f"{how}; what it saved before is whole, and the rest is lost")
    if not launch.id:  # its launcher is elsewhere, and sees on the workers that it is to end
        time.sleep(2 * patience.look)
