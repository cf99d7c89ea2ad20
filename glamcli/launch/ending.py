"""How a launch is ended: its run saves, its slice is deleted, and nothing is created any more."""

import contextlib
import time
from dataclasses import dataclass

from glamcli.errors import CloudError, LaunchError
from glamcli.launch.decisions import SlicePhase
from glamcli.launch.gcloud import Gcloud, Slice, TryAgain
from glamcli.launch.record import Launch, Record
from glamcli.launch.workers import SliceWorkers
from glamcli.progress import Progress, duration


@dataclass(frozen=True)
class Patience:
    """How often to look, in seconds, and for how long workers may be silent, a worker outlive
    another one, a slice be on its way out, a run save."""

    look: float = 15.0
    silence: float = 900.0
    apart: float = 1200.0
    leaving: float = 1200.0
    saving: float = 900.0


PATIENCE = Patience()
NO_SLICE = "none"


def bill(launch: Launch, found: Slice) -> bool:
    """Whether a slice that costs money was not counted; it is from here on."""
    if found.phase is not SlicePhase.READY or launch.costs:
        return False
    launch.opened(found.created or time.time())
    return True


def give_back(launch: Launch, cloud: Gcloud, progress: Progress, patience: Patience) -> None:
    """Deletes the slice and waits until it is gone.

    Raises: CloudError when it may still be there, with the command that deletes it.
    """
    until = time.monotonic() + patience.leaving
    try:
        with progress.phase(f"deleting slice {launch.name}"):
            while not _is_gone(launch, cloud, last_try=time.monotonic() > until):
                if time.monotonic() > until:
                    raise LaunchError(f"it is not gone after {duration(patience.leaving)}")
                time.sleep(min(patience.look, 5.0))
    except LaunchError as error:
        project = f" --project={launch.project}" if launch.project else ""
        raise CloudError(
            f"slice `{launch.name}` may still cost money: {error.what}",
            f"gcloud compute tpus queued-resources delete {launch.name} --zone={launch.zone}"
            f"{project} --force",
        ) from error
    launch.closed()


def _is_gone(launch: Launch, cloud: Gcloud, last_try: bool) -> bool:
    try:
        found = cloud.find(launch.name)
        bill(launch, found)
        if found.phase not in (SlicePhase.ABSENT, SlicePhase.LEAVING):
            cloud.delete(launch.name)
    except TryAgain:
        if last_try:
            raise
        return False
    return found.phase is SlicePhase.ABSENT


def slice_words(record: Record, launch: Launch) -> str:
    """The state of a launch's slice for a person. That one is gone is noted where nobody else
    looks after the launch: it costs nothing any more.

    Raises: LaunchError when Google does not say.
    """
    if launch.ended is not None and not launch.costs:
        return NO_SLICE
    found = Gcloud(launch.zone, launch.project).find(launch.name)
    if found.phase is SlicePhase.ABSENT and launch.costs:
        with contextlib.suppress(LaunchError), record.looking_after():
            launch.closed()
            record.save(launch)
    return found.words or NO_SLICE


def end_launch(
    record: Record, launch: Launch, cloud: Gcloud, progress: Progress, patience: Patience
) -> Launch:
    """Ends a launch: its run saves, its slice is deleted, whoever else looks after it leaves. What
    became of it.

    Raises: CloudError when the slice may still be there.
    """
    record.stop()
    launch = record.load() or launch  # as whoever looked after it left it
    if not launch.slices:  # there may be another's of this name
        return launch
    try:
        _save_run(launch, cloud, progress, patience)
    except CloudError as error:
        progress.warn(f"the run could not be asked to save: {error.what}")
    give_back(launch, cloud, progress, patience)
    launch.ended = launch.ended or "stopped"
    record.save(launch)
    return launch


def _save_run(launch: Launch, cloud: Gcloud, progress: Progress, patience: Patience) -> None:
    """Asks the command on the workers to save and waits for its end."""
    if cloud.find(launch.name).phase is not SlicePhase.READY:
        return
    workers, until = SliceWorkers(launch, cloud), time.monotonic() + patience.saving
    with progress.phase("waiting for the run to save"):
        while time.monotonic() < until:
            told = [each for each in workers.ask(0).values() if each is not None and each.attempt]
            launch.step = max([launch.step, *(each.step for each in told)])
            if all(each.code is not None for each in told):
                return
            workers.stop()
            time.sleep(min(patience.look, 5.0))
    progress.warn(
        f"the run did not end in {duration(patience.saving)}; its last checkpoint is whole"
    )
