"""Checkpoints on disk: one folder per saved step, written by orbax (nowhere else imported).

A step folder holds two items: `state`, the whole training state as plain nested dicts named by
path, so no Python class is part of the format; and `meta`, a JSON object saying which run wrote
it (the caller's identity) together with the name, shape and dtype of every array.

What the library leaves open is closed here. Steps are found by looking at the folders
(`step_folders.py`), because orbax would also name an empty folder or a renamed copy as its latest
step. Names, shapes and dtypes are compared before anything is read, because a restore casts
silently. Deletion is a rename, because deleting file by file leaves torn steps behind when the
process is killed.
"""

import contextlib
import gc
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from glamcli import step_folders
from glamcli.errors import CheckpointError, SaveFailed
from glamcli.hosts.join import ALONE, Host
from glamcli.named_leaves import described_leaves, difference, named_leaves, nested
from glamcli.step_folders import CHECKPOINT_FORMAT, Meta, find_step, step_meta

# What Adafactor kept for attention's weights before format 3.
FACTORS_BEFORE_3 = re.compile(r"opt_state/slots/.*\battention/(query|key|value|out)/v(_row|_col)?")
TRASH = "trash"


class Checkpoints:
    """The checkpoints of one run: `folder` holds a sub-folder per step, the newest `keep` stay.
    Every process of a run opens them, which reads and writes nothing; the first `save` cleans up,
    in the first process, what a killed process left behind.
    """

    def __init__(self, folder: Path, keep: int = 3, host: Host = ALONE):
        self.folder = folder.absolute()
        self.keep = keep
        self.host = host
        self._manager: ocp.CheckpointManager | None = None
        self._saving: int | None = None
        self._silence = contextlib.ExitStack()

    def steps(self) -> list[int]:
        """The complete steps, newest first."""
        return step_folders.complete_steps(self.folder)

    def latest(self) -> int | None:
        return next(iter(self.steps()), None)

    def meta(self, step: int) -> Meta:
        """What the run wrote about itself beside this step.

        Raises: CheckpointError when the folder is missing, torn, or of another step.
        """
        reason = step_folders.fault(self.folder / str(step))
        if reason is not None:
            raise CheckpointError(f"checkpoint {self.folder / str(step)}: {reason}")
        return step_meta(self.folder / str(step))

    def restore(self, step: int, target: Any, warn: Callable[[str], object] = warnings.warn) -> Any:
        """The state saved at `step`, placed as `target` says, on any number of devices.

        `target` is the abstract state: every leaf has shape, dtype and sharding, so nothing
        depends on the devices of the process that saved. Of a checkpoint of format 2 the
        statistics that have another shape today start at 0, and `warn` is called with that.

        Raises: CheckpointError naming the first differences of name, shape or dtype.
        """
        folder = self.folder / str(step)
        meta, wanted = self.meta(step), named_leaves(target)
        saved, described = meta["tree"], described_leaves(wanted)
        every = sorted({*saved, *described})
        names = [name for name in every if saved.get(name) != described.get(name)]
        anew = {name for name in names if meta["format"] < 3 and FACTORS_BEFORE_3.fullmatch(name)}
        if names := [name for name in names if name not in anew]:
            raise CheckpointError(
                f"checkpoint {folder}: {len(names)} arrays differ from this recipe's: "
                + difference(saved, described, names),
                hint="continue with the recipe that wrote it (`recipe` in its meta)",
            )
        arrays = _read_arrays(folder, {k: leaf for k, leaf in wanted.items() if k not in anew})
        for name in anew & wanted.keys():
            arrays[name] = jnp.zeros_like(wanted[name], device=wanted[name].sharding)
        if anew:
            num_weights = len({name.rpartition("/")[0] for name in anew})
            warn(
                f"{folder} is of format {meta['format']}: weights are carried over, but Adafactor's"
                f" statistics of {num_weights} attention weights start from zero"
                " (`optimizer.factor_heads: separate` keeps them)"
            )
        return jax.tree.unflatten(jax.tree.structure(target), [arrays[name] for name in wanted])

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Starts writing `state`; returns once it is copied off the devices and may be donated to
        the next step. A save still running is finished first.

        Raises: CheckpointError when this or the save before it failed.
        """
        self.wait()
        named = named_leaves(state)
        full = {**meta, "format": CHECKPOINT_FORMAT, "step": step, "tree": described_leaves(named)}
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(nested(named)),
            meta=ocp.args.JsonSave(full),
        )
        try:
            # False: orbax has a step at least as new, and wrote nothing.
            accepted = self._open().save(step, args=items)
        except Exception as error:
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
            # What failed after the step was complete was the deletion of an old one.
            if step_folders.fault(self.folder / str(step)) is not None:
                raise self._failure(step, error) from error
        self._empty_trash()
        return step

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
                    for name in step_folders.damaged_steps(self.folder):
                        # If it stayed, a folder like `999` would make orbax skip every save below.
                        step_folders.move_aside(self.folder, name)
                    self._empty_trash()
                self.host.wait("checkpoint folder")
                self._silence.enter_context(_quiet("absl", "asyncio"))
                self._silence.enter_context(_ignoring_closed_loops())
                self._manager = ocp.CheckpointManager(
                    self.folder,
                    options=ocp.CheckpointManagerOptions(
                        max_to_keep=self.keep,
                        todelete_subdir=TRASH,
                        cleanup_tmp_directories=True,
                    ),
                )
            except OSError as error:
                raise SaveFailed(
                    f"cannot write checkpoints in {self.folder}: {error.strerror or error}"
                ) from error
        return self._manager

    def _empty_trash(self) -> None:
        if self.host.is_first:
            shutil.rmtree(self.folder / TRASH, ignore_errors=True)

    def _failure(self, step: int, error: Exception) -> CheckpointError:
        if isinstance(error, CheckpointError):
            return error
        # What was written of it, or waits to be deleted, would keep a full disk full.
        for left in self.folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(left, ignore_errors=True)
        self._empty_trash()
        latest = self.latest()
        last = "there is no complete checkpoint" if latest is None else f"step {latest} is complete"
        return SaveFailed(f"saving step {step} failed: {_one_line(error)}", hint=last)


def restore_params(
    path: Path, step: int | None = None, layout: Callable[[Meta], Any] | None = None
) -> tuple[dict[str, Any], Meta]:
    """The parameters alone and the meta of a checkpoint, for scoring and generation.

    `path` is a run folder, its `checkpoints` folder, or one step's folder; `step` None is the
    newest complete one. `layout` makes the sharding of every parameter (a nested dict of the same
    names) from the meta, which knows the recipe; without it all of them are on the first device.

    Raises: CheckpointError when there is no complete checkpoint.
    """
    folder = find_step(path, step)
    meta = step_meta(folder)
    names = {name: entry for name, entry in meta["tree"].items() if name.startswith("params/")}
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = named_leaves({"params": layout(meta)}) if layout else dict.fromkeys(names, here)
    wanted = {
        name: jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=shardings[name])
        for name, (dtype, shape) in names.items()
    }
    return nested(_read_arrays(folder, wanted))["params"], meta


def _read_arrays(folder: Path, wanted: dict[str, Any]) -> dict[str, jax.Array]:
    item = nested(wanted)
    args = ocp.args.PyTreeRestore(
        item=item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=True,
    )
    try:
        with _quiet("absl", "asyncio"), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            return named_leaves(reader.restore(folder / "state", args=args))
    except Exception as error:
        reason = _one_line(error)
        if isinstance(error, jax.errors.JaxRuntimeError):  # another process may be gone
            raise CheckpointError(f"checkpoint {folder} cannot be read: {reason}") from error
    _collect_unfinished_reads()
    raise CheckpointError(f"checkpoint {folder} cannot be read: {reason}")


@contextlib.contextmanager
def _ignoring_closed_loops() -> Iterator[None]:
    """Leaves out what TensorStore's threads report of a save that failed: that the event loop which
    orbax ran it in is closed."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda raised: (
        None if str(raised.exc_value) == "Event loop is closed" else hook(raised)
    )
    try:
        yield
    finally:
        sys.unraisablehook = hook


@contextlib.contextmanager
def _quiet(*loggers: str) -> Iterator[None]:
    """Silences these loggers, which report every phase; failures are raised as exceptions."""
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in loggers}
    try:
        for logger in levels:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def _collect_unfinished_reads() -> None:
    """Frees what a failed read leaves behind: coroutines that were never started, and reads that
    report to an event loop that is gone. Python would print both, with tracebacks, later on."""
    ignored = warnings.catch_warnings(action="ignore", category=RuntimeWarning)
    with ignored, _quiet("asyncio"), _ignoring_closed_loops():
        gc.collect()


def _one_line(error: Exception) -> str:
    """What went wrong; from the libraries' long lines, which name a file thrice, the reason alone
    if the operating system gave one."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if reason := re.search(r"\[os_error_code='(\d+)'\]", lines[0]):
        return os.strerror(int(reason[1]))
    return lines[0][:240]
