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
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from glamcli import atomic, faults, step_folders
from glamcli.errors import CheckpointError, GlamError, SaveFailed
from glamcli.hosts.join import ALONE, Host
from glamcli.model.digest import digests
from glamcli.named_leaves import described_leaves, difference, named_leaves, nested
from glamcli.step_folders import CHECKPOINT_FORMAT, FEWEST_KEPT, Meta, complete_meta
from glamcli.stored_arrays import (
    ignore_abandoned_work,
    one_line,
    os_error,
    read_arrays,
    silenced,
    time_saves_by_a_steady_clock,
)

# What Adafactor kept for attention's weights before format 3.
FACTORS_BEFORE_3 = re.compile(r"opt_state/slots/.*\battention/(query|key|value|out)/v(_row|_col)?")
# What the guard remembers, which checkpoints before format 4 do not have.
SINCE_4 = re.compile(r"window")
# What orbax raises when it cannot write; ValueError is TensorStore's.
DISK_ERRORS = (OSError, ValueError)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class _Durable(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A step folder that gets its name when all files in it are on the disk. Orbax syncs those of
    arrays alone: a power failure could leave a complete step with an empty description."""

    async def finalize(self) -> None:
        if self.get_final().name.isdecimal():  # an item becomes a part of it before
            step_folders.sync(Path(self.get()))
        await super().finalize()
        step_folders.sync_names(Path(self.get_final()).parent)


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
        arrays: str | None = None,
        published: Callable[[], Callable[[float], bool]] | None = None,
    ):
        self.folder = folder.absolute()
        self.arrays, self._publish = arrays, published
        self._meta: Meta = {}
        self._is_published: Callable[[float], bool] | None = None
        self.keep = keep
        self.host = host
        self._manager: ocp.CheckpointManager | None = None
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

        `target` is the abstract state: every leaf has shape, dtype and sharding, so nothing
        depends on the devices of the process that saved. Of a checkpoint of format 2 the
        statistics that have another shape today start at 0, and `warn` is called with that. The
        description `meta` is read, if None.

        Raises:
            DamagedCheckpoint: it cannot be read, or is not as it was saved.
            CheckpointError: names, shapes or dtypes are not those of `target`; the first of them.
        """
        folder = self.folder / str(step)
        meta, wanted = meta or complete_meta(folder), named_leaves(target)
        saved, described = meta["tree"], described_leaves(wanted)
        every = {*saved, *described}
        other = {name for name in every if saved.get(name) != described.get(name)}
        factors = {name for name in other if FACTORS_BEFORE_3.fullmatch(name)}
        factors = factors if meta["format"] < 3 else set()
        anew = factors | {name for name in other if SINCE_4.fullmatch(name)}
        _refuse_differences(folder, saved, described, anew)
        kept = {name: leaf for name, leaf in wanted.items() if name not in anew}
        arrays = read_arrays(folder, kept, meta, self.host)
        for name in anew & wanted.keys():
            arrays[name] = jnp.zeros_like(wanted[name], device=wanted[name].sharding)
        if factors:
            num_weights = len({name.rpartition("/")[0] for name in factors})
            warn(
                f"{folder} is of format {meta['format']}: weights are carried over, but Adafactor's"
                f" statistics of {num_weights} attention weights start from zero"
                " (`optimizer.factor_heads: separate` keeps them)"
            )
        return jax.tree.unflatten(jax.tree.structure(target), [arrays[name] for name in wanted])

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
            self._meta = full
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

    def poll(self) -> int | None:
        """The step whose save has just become durable, if any; call once per training step.

        Raises: CheckpointError when the save failed. Orbax keeps such a failure to itself until
        `wait_until_finished`, and until then names the failed step as the latest.
        """
        if self._saving is None or self._open().is_saving_in_progress():
            return None
        if self._publish is not None:
            self._describe(self._saving)
            if self._is_published is not None and not self._is_published(0.0):
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
            # What failed after the step was complete was the deletion of an old one.
            if step_folders.fault(self.folder / str(step)) is not None:
                raise self._failure(step, error) from error
        if self._publish is not None:
            self._describe(step)
            assert self._is_published is not None
            if not self._is_published(60.0):
                raise SaveFailed(f"saving step {step} failed: its files are not uploaded yet")
            self._is_published = None
        if self.host.is_first:
            if (fault := step_folders.fault(self.folder / str(step))) is not None:
                raise SaveFailed(f"saving step {step} failed: {fault}")
            self._retire(self.keep)
            faults.saved(self.folder / str(step), step)
        return step

    def _describe(self, step: int) -> None:
        """Adds a step whose arrays are complete in the bucket."""
        if self._is_published is None:
            self._open().wait_until_finished()
            unfinished = self.folder / f"{step}.orbax-checkpoint-tmp"
            shutil.rmtree(unfinished, ignore_errors=True)
            atomic.write(unfinished / "meta" / "metadata", json.dumps(self._meta))
            url = f"{self.arrays}/{step}/state"
            atomic.write(unfinished / step_folders.ARRAYS_URL, url)
            unfinished.rename(self.folder / str(step))
            assert self._publish is not None
            self._is_published = self._publish()

    def clean(self) -> None:
        """Empties the trash (`step_folders.py`), in the first process."""
        if self.host.is_first:
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

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            try:
                if self.host.is_first:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    step_folders.sync_names(self.folder.parent)
                    for name in {*step_folders.damaged_steps(self.folder), *self._damaged}:
                        # If it stayed, a folder like `999` would make orbax skip every save below.
                        step_folders.move_aside(self.folder, name)
                self.clean()
                self.host.wait("checkpoint folder")
                self._damaged.clear()
                ignore_abandoned_work()
                time_saves_by_a_steady_clock()
                self._silence.enter_context(silenced("absl", "asyncio"))
                self._manager = ocp.CheckpointManager(
                    epath.Path(self.arrays or self.folder),
                    options=ocp.CheckpointManagerOptions(
                        cleanup_tmp_directories=True,
                        temporary_path_class=_Durable if self.arrays is None else None,
                        lightweight_initialize=True,  # other steps' _CHECKPOINT_METADATA is unread
                    ),
                )
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
        ours = isinstance(error, GlamError | jax.errors.JaxRuntimeError | MemoryError)
        return isinstance(error, DISK_ERRORS) or (self.arrays is not None and not ours)

    def _failure(self, step: int, error: Exception) -> SaveFailed:
        # One step makes room for one; the next failure gives up the next.
        is_full = self.host.is_first and os_error(error) in NO_ROOM
        gone = self._retire(FEWEST_KEPT, most=1 if is_full else 0)
        latest = self.latest()
        last = "there is no complete checkpoint" if latest is None else f"step {latest} is complete"
        last += "".join(f", step {old} was deleted to make room" for old in gone)
        return SaveFailed(f"saving step {step} failed: {one_line(error)}", hint=last)


def restore_params(
    folder: Path,
    target: Callable[[Meta], Any],
    host: Host = ALONE,
    meta: Meta | None = None,
) -> tuple[dict[str, Any], Meta]:
    """The parameters alone and the meta of a step folder, for scoring and generation.

    `target` makes abstract parameters (a nested dict with shapes, dtypes and shardings) from the
    meta, which knows the recipe (read here, if None). All processes of `host` must call this alike.

    Raises:
        DamagedCheckpoint: they cannot be read, or are not as they were saved.
        CheckpointError: the names, shapes or dtypes in the checkpoint are others.
    """
    meta = meta or complete_meta(folder)
    wanted = named_leaves({"params": target(meta)})
    saved = {name: it for name, it in meta["tree"].items() if name.startswith("params/")}
    _refuse_differences(folder, saved, described_leaves(wanted), anew=set())
    return nested(read_arrays(folder, wanted, meta, host))["params"], meta


def _refuse_differences(
    folder: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any], anew: set[str]
) -> None:
    every = sorted({*saved, *wanted} - anew)
    if names := [name for name in every if saved.get(name) != wanted.get(name)]:
        raise CheckpointError(
            f"checkpoint {folder}: {len(names)} arrays differ from this recipe's: "
            + difference(saved, wanted, names),
            hint="continue with the recipe that wrote it (`recipe` in its meta)",
        )
