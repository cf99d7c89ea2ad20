"""Checkpoints on disk: one folder per saved step, written by orbax.

A step folder holds two items: `state`, the whole training state as plain nested dicts named by
path, so no Python class is part of the format; and `meta`, a JSON object saying which run wrote
it (the caller's identity) together with the name, shape, dtype and digest of every array, and a
checksum of itself. Digests are computed on the devices before anything is copied, and compared
after every read.

What the library leaves open is closed here. Steps are found by looking at the folders
(`step_folders.py`), because orbax would also name an empty folder or a renamed copy as its latest
step. Names, shapes and dtypes are compared before anything is read, because a restore casts
silently. Which steps stay is decided here, by what their descriptions prove. Deletion is a rename,
because deleting file by file leaves torn steps behind when the process is killed.
"""

import contextlib
import errno
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from glamcli import faults, step_folders
from glamcli.array_errors import one_line, os_error
from glamcli.errors import CheckpointError, GlamError, SaveFailed
from glamcli.hosts.join import ALONE, Host
from glamcli.model.digest import digests
from glamcli.named_leaves import described_leaves, named_leaves, nested
from glamcli.orbax_setup import ignore_abandoned_work, silenced, time_saves_by_a_steady_clock
from glamcli.restore import restore_state
from glamcli.step_folders import CHECKPOINT_FORMAT, FEWEST_KEPT, Meta, complete_meta
from glamcli.step_writers import (
    LAST_CHANCE_SECONDS,
    BucketWriter,
    StepsInBucket,
    disk_writer,
    sync_names,
)

# What orbax raises when it cannot write; ValueError is TensorStore's.
DISK_ERRORS = (OSError, ValueError)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class Checkpoints:
    """The checkpoints of one run: `folder` holds a sub-folder per step. After a save the newest
    step stays, and the newest `keep` (at least two) that are complete and good.

    Every process of a run opens them, which reads and writes nothing; the first `save` sets damaged
    steps aside, in the first process.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 3,
        host: Host = ALONE,
        in_bucket: StepsInBucket | None = None,
    ):
        self.folder = folder.absolute()
        self.in_bucket = in_bucket
        self.keep = keep
        self.host = host
        self._owns_folder = host.is_first or in_bucket is not None
        """whether no other process writes to it: of a run in a bucket, every one has its own."""
        self._manager: ocp.CheckpointManager | BucketWriter | None = None
        self._saving: int | None = None
        self._damaged: set[str] = set()
        self._silence = contextlib.ExitStack()

    def steps(self) -> list[int]:
        """The complete steps, newest first, without those rejected."""
        return step_folders.complete_steps(self.folder, self._damaged)

    def good_steps(self) -> list[int]:
        """Those of them that were not saved in a bad streak."""
        return step_folders.good_steps(self.folder, self._damaged)

    def latest(self) -> int | None:
        return next(iter(self.steps()), None)

    def meta(self, step: int) -> Meta:
        """What the run wrote about itself beside this step.

        Raises: DamagedCheckpoint when the folder is missing, torn, or of another step.
        """
        return complete_meta(self.folder / str(step))

    def reject(self, name: str) -> None:
        """Leaves out a step folder that turned out damaged; the next save sets it aside."""
        self._damaged.add(name)

    def restore(
        self,
        step: int,
        target: Any,
        warn: Callable[[str], object] = warnings.warn,
        meta: Meta | None = None,
    ) -> Any:
        """The state saved at `step`, placed as `target` says, on any number of devices.

        `target` is the abstract state, and `warn` hears of what starts from zero (`restore.py`).
        The description `meta` is read, if None.

        Raises: DamagedCheckpoint, CheckpointError; what reading raises.
        """
        folder = self.folder / str(step)
        return restore_state(folder, target, self.host, warn, meta or complete_meta(folder))

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Starts writing `state`; returns once it is copied off the devices and may be donated to
        the next step. A save still running is finished first. A step whose `meta` says that it is
        not `good` is kept only while it is the newest.

        Raises: CheckpointError when this or the save before it failed: SaveFailed for what the disk
            may be the reason of. Other errors, as for lack of memory, are raised as they are.
        """
        self.wait()
        named = named_leaves(state)
        full = {**meta, "format": CHECKPOINT_FORMAT, "step": step, "tree": described_leaves(named)}
        full = json.loads(json.dumps({**full, "digests": digests(named)}))
        full["checksum"] = step_folders.checksum(full)
        self.clean()  # orbax's other writes may have outlived the failure of one
        try:
            items = ocp.args.Composite(
                state=ocp.args.PyTreeSave(nested(named)),
                meta=ocp.args.JsonSave(faults.in_save(step, full)),
            )
            # False: orbax has a step at least as new, and wrote nothing.
            accepted = self._open().save(step, args=items)
        except Exception as error:
            if not self._may_pass(error):
                raise
            raise self._failure(step, error) from error
        if not accepted:
            raise CheckpointError(
                f"step {step} was not saved: {self.folder} holds a later step",
                hint="move the later steps away, or continue from them",
            )
        self._saving = step

    @property
    def is_saving(self) -> bool:
        """Whether a save was started whose end `poll` or `wait` has not seen yet."""
        return self._saving is not None

    def poll(self) -> int | None:
        """The step whose save has just become durable, if any; call once per training step.

        Raises: CheckpointError when the save failed. Orbax keeps such a failure to itself until
        `wait_until_finished`, and until then names the failed step as the latest.
        """
        if self._saving is None or self._open().is_saving_in_progress():
            return None
        return self.wait()

    def wait(self) -> int | None:
        """Waits for the save in progress; returns its step, or None when there was none.

        Raises: CheckpointError when the save failed.
        """
        step, self._saving = self._saving, None
        if step is None:
            return None
        try:
            self._open().wait_until_finished()
        except Exception as error:
            if not self._may_pass(error):
                raise
            # What failed after the step was complete was, on a disk, the deletion of an old one.
            if (
                self.in_bucket is not None
                or step_folders.fault(self.folder / str(step)) is not None
            ):
                raise self._failure(step, error) from error
        if self.host.is_first:
            if (fault := step_folders.fault(self.folder / str(step))) is not None:
                raise SaveFailed(f"saving step {step} failed: {fault}")
            self._retire(self.keep)
            faults.saved(self.folder / str(step), step)
        return step

    def clean(self) -> None:
        """Empties the trash (`step_folders.py`), in the process that owns the folder."""
        if self._owns_folder:
            step_folders.empty_trash(self.folder)

    def close(self) -> None:
        """Finishes what is being written and ends orbax's threads."""
        try:
            self.wait()
        finally:
            if self._manager is not None:
                self._manager.close()
                self._manager = None
            self._silence.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Closes them; an error of the run is told rather than what it did to the save in
        progress, which gets a last chance in a bucket."""
        if error is not None and isinstance(self._manager, BucketWriter):
            self._manager.hurry(LAST_CHANCE_SECONDS)
        with contextlib.suppress(*[CheckpointError] if error else []):
            self.close()

    def _writer(self) -> ocp.CheckpointManager | BucketWriter:
        if self.in_bucket is None:
            return disk_writer(self.folder)
        return BucketWriter(self.folder, self.in_bucket, self.host, lambda: self._retire(self.keep))

    def _open(self) -> ocp.CheckpointManager | BucketWriter:
        if self._manager is None:
            try:
                if self._owns_folder:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    sync_names(self.folder.parent)
                    for name in {*step_folders.damaged_steps(self.folder), *self._damaged}:
                        # If it stayed, a folder like `999` would make orbax skip every save below.
                        step_folders.move_aside(self.folder, name)
                self.clean()
                self.host.wait("checkpoint folder")
                self._damaged.clear()
                ignore_abandoned_work()
                time_saves_by_a_steady_clock()
                self._silence.enter_context(silenced("absl", "asyncio"))
                self._manager = self._writer()
            except (OSError, CheckpointError) as error:
                reason = getattr(error, "strerror", None) or error
                what = f"cannot write checkpoints in {self.folder}: {reason}"
                raise SaveFailed(what) from error
        return self._manager

    def _retire(self, keep: int, most: int | None = None) -> list[int]:
        """Deletes, oldest first, the complete steps that need not stay, at most so many; which."""
        gone = []
        with contextlib.suppress(OSError, CheckpointError):  # the next save tries again
            for step in step_folders.surplus_steps(self.folder, keep, self._damaged)[:most]:
                step_folders.delete_step(self.folder, step)
                gone.append(step)
        self.clean()
        return gone

    def _may_pass(self, error: Exception) -> bool:
        """Whether the disk or the bucket may be the reason of an error; libraries of buckets have
        many kinds."""
        ours = isinstance(
            error, GlamError | jax.errors.JaxRuntimeError | MemoryError | TypeError | AttributeError
        )
        return isinstance(error, DISK_ERRORS) or (self.in_bucket is not None and not ours)

    def _failure(self, step: int, error: Exception) -> SaveFailed:
        # One step makes room for one; the next failure gives up the next.
        is_full = self.host.is_first and os_error(error) in NO_ROOM
        gone = self._retire(FEWEST_KEPT, most=1 if is_full else 0)
        latest = self.latest()
        last = "there is no complete checkpoint" if latest is None else f"step {latest} is complete"
        arrays = "" if self.in_bucket is None else self.in_bucket.arrays
        if isinstance(self._manager, BucketWriter):  # which may not have all that is in the folder
            last = self._manager.kept()
        last += "".join(f", step {old} was deleted to make room" for old in gone)
        return SaveFailed(f"saving step {step} failed: {one_line(error, arrays)}", hint=last)
