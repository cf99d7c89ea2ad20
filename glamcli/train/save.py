"""The checkpoints of a run while it trains: when one is due, and what follows when one fails."""

import errno
import stat
from collections.abc import Callable
from pathlib import Path

from glamcli.checkpoint import Checkpoints
from glamcli.config.settings import is_due
from glamcli.errors import CheckpointError, SaveFailed
from glamcli.hosts.watchdog import LONG
from glamcli.progress import duration
from glamcli.train import identity
from glamcli.train.events import Running
from glamcli.train.retry import LOOK_SECONDS, Clock, Retry
from glamcli.train.state import State


class Save:
    """A checkpoint, every `every.checkpoint_steps`, after the last step, before the run stops, and
    after a save that failed (`retry.py`). Nothing is lost by continuing after one: the next save
    has the newer state.

    While updates are skipped, the weights are those of an earlier step and may be spoilt: only a
    run that ends or stops saves then, and `good` in the checkpoint says that they are not proven.
    What was due is saved when updates are applied again.

    A save into a bucket may take longer than the steps between two of them. Training does not wait
    for it: what is due meanwhile is owed, and saved when the bucket has the one before.

    Raises: CheckpointError, from every method but `is_due`, when saves failed for
        `checkpoints.retry_seconds`, or one of several processes failed: their saves wait for each
        other, so the others could not try again. Also when the run folder is gone.
    """

    kind = "save"

    def __init__(self, running: Running, checkpoints: Checkpoints, clock: Clock | None = None):
        self._running = running
        self._checkpoints = checkpoints
        self._clock = clock or Clock()
        self._retry = Retry(running.recipe.checkpoints.retry_seconds, self._clock)
        self._next_look = 0.0
        self.is_owed = False
        """whether a save failed and none was started since."""
        self._is_saving = False
        self._is_last = False
        self._awaits_good_weights = False

    def is_due(self, step: int, stopping: bool = False) -> bool:
        recipe = self._running.recipe
        self._is_last = stopping or step == recipe.train.steps
        due = self._is_last or is_due(step, recipe.every.checkpoint_steps)
        due = due or self._awaits_good_weights or (self.is_owed and self._retry.is_due)
        if due and not self._is_last and self._is_uploading():
            self.is_owed, due = True, False
        return due

    def _is_uploading(self) -> bool:
        """Whether a process still saves into a bucket; all call it alike, because only a save that
        fails makes the clock count, and it ends a run of several."""
        checkpoints = self._checkpoints
        if checkpoints.in_bucket is None:
            return False
        return checkpoints.host.any("still saving", checkpoints.is_saving)

    def poll(self) -> None:
        """Notices how the save in progress ended; call once per training step."""
        run = self._running
        if self._clock.now() >= self._next_look:
            self._look_for_folder()
        self._note(self._checkpoints.poll)
        if self._is_saving and (taken := self._retry.slow()) is not None:
            run.progress.warn(
                f"a save has taken {taken} so far; {self._retry.age} of training not saved"
            )

    def _look_for_folder(self) -> None:
        run, self._next_look = self._running, self._clock.now() + LOOK_SECONDS
        if run.host.is_first and _is_gone(run.run_dir):
            raise CheckpointError(
                f"the run folder {run.run_dir} is gone: deleted or renamed while the run trained",
                hint="put it back, or start again elsewhere with `--run`",
            )

    def run(self, step: int, state: State) -> bool:
        """Starts saving, after the save in progress; the metrics up to this step are on disk by
        then."""
        run = self._running
        run.watchdog.beat(f"saving step {step}", LONG)
        self._look_for_folder()  # a save would make another one
        run.meter.flush()
        self._awaits_good_weights = not (run.meter.health.is_good or self._is_last)
        if self._awaits_good_weights:
            return False
        self._note(self._checkpoints.wait)
        self.is_owed = False
        meta = identity.at_step(run.run_identity, run.dataset, step)
        meta |= {"loss_sums": run.meter.loss_sums, **run.meter.health.saved(step)}
        meta["routers"] = run.meter.routers.saved()
        meta["capacity"] = run.meter.capacity.saved()
        meta["seconds"] = run.meter.times.seconds()
        self._retry.start()
        self._is_saving = True
        self._note(lambda: self._checkpoints.save(step, run.stacked(state), meta))
        run.meter.restart_clock()
        return False

    def finish(self, step: int, state: State) -> None:
        """Returns when the checkpoint of `step`, which was started, is complete."""
        self._running.watchdog.beat(f"saving step {step}", LONG)
        with self._running.progress.phase("saving"):
            self._note(self._checkpoints.wait)
            while self.is_owed:
                self._retry.wait()
                self.run(step, state)
                self._note(self._checkpoints.wait)

    def _note(self, attempt: Callable[[], int | None]) -> None:
        progress, retry = self._running.progress, self._retry
        try:
            step = attempt()
        except SaveFailed as error:
            self._is_saving = False
            if self._checkpoints.host.count > 1:
                raise
            kept = error.hint or "nothing was written"
            state = f"{kept}; {retry.age} of training not saved"
            if (wait := retry.fail()) is None:
                tried = f"tried for {duration(retry.limit)} (`checkpoints.retry_seconds`)"
                raise SaveFailed(error.what, hint=f"{state}, {tried}") from error
            self.is_owed = True
            is_disk = self._checkpoints.in_bucket is None
            advice = f": make room in {self._checkpoints.folder}" if is_disk else ""
            progress.warn(
                f"{error.what} ({state}); trying again in {wait}, for {duration(retry.limit)} at"
                f" most{advice}"
            )
        else:
            if step is not None:
                self._is_saving = False
                retry.succeed()
                progress.say(f"step {step}: saved")


def _is_gone(folder: Path) -> bool:
    """Whether there is no such folder, for certain: a file server may just not answer."""
    try:
        return not stat.S_ISDIR(folder.stat().st_mode)
    except OSError as error:
        return error.errno in (errno.ENOENT, errno.ENOTDIR)
