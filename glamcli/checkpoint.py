"""Checkpoints on disk: one folder per saved step, written by orbax (nowhere else imported).

A step folder holds two items: `state`, the whole training state as plain nested dicts named by
path, so no Python class is part of the format; and `meta`, a JSON object saying which run wrote
it (the caller's identity) together with the name, shape and dtype of every array.

What the library leaves open is closed here. Steps are found by looking at the folders, newest
complete one first, because orbax would also name an empty folder or a renamed copy as its latest
step. Names, shapes and dtypes are compared before anything is read, because a restore casts
silently. Deletion is a rename, because deleting file by file leaves torn steps behind when the
process is killed. A failed background save is asked for as soon as it can be known.

Called by the training loop, evaluation and generation.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from glamcli.errors import CheckpointError
from glamcli.hosts.join import ALONE, Host

# Orbax tells the log about every phase of a save; failures reach us as exceptions.
logging.getLogger("absl").setLevel(logging.CRITICAL)
# A failed read leaves coroutines behind that it never started, and reads that want to report to an
# event loop that is gone; Python would tell so, with tracebacks, at any later time.
logging.getLogger("asyncio").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", "coroutine 'Store.* was never awaited", RuntimeWarning)
_unraisable = sys.unraisablehook
sys.unraisablehook = lambda what: (
    None if str(what.exc_value) == "Event loop is closed" else _unraisable(what)
)

FORMAT = 2
"""2 since the experts' second matrix lies as [E, M, H], as the first does."""

TRASH = "trash"
SET_ASIDE = "set-aside"
SHOWN_DIFFERENCES = 6

Meta = dict[str, Any]


class Checkpoints:
    """The checkpoints of one run: `folder` holds a sub-folder per step, the newest `keep` stay.
    Every process of a run opens them; only the first tidies the folder up.

    Opening reads nothing and writes nothing; the first `save` cleans up what a killed process
    left behind.
    """

    def __init__(self, folder: Path, keep: int = 3, host: Host = ALONE):
        self.folder = folder.absolute()
        self.keep = keep
        self.host = host
        self._manager: ocp.CheckpointManager | None = None
        self._saving: int | None = None

    def steps(self) -> list[int]:
        """The complete steps, newest first."""
        return sorted((int(p.name) for p in self._folders() if fault(p) is None), reverse=True)

    def latest(self) -> int | None:
        return next(iter(self.steps()), None)

    def damaged(self) -> dict[str, str]:
        """Step folders that cannot be used, with the reason."""
        return {p.name: reason for p in self._folders() if (reason := fault(p)) is not None}

    def meta(self, step: int) -> Meta:
        """What the run that saved this step said about itself.

        Raises: CheckpointError when the folder is missing, torn, or of another step.
        """
        reason = fault(self.folder / str(step))
        if reason is not None:
            raise CheckpointError(f"checkpoint {self.folder / str(step)}: {reason}")
        return _read_meta(self.folder / str(step))

    def restore(self, step: int, target: Any) -> Any:
        """The state saved at `step`, placed as `target` says, on any number of devices.

        `target` is the abstract state: every leaf has shape, dtype and sharding, so nothing
        depends on the devices of the process that saved.

        Raises: CheckpointError naming the first differences of name, shape or dtype.
        """
        meta = self.meta(step)
        wanted = _named(target)
        _compare(meta["tree"], _describe(wanted), f"checkpoint {self.folder / str(step)}")
        return _unname(_read_arrays(self.folder / str(step), wanted), target)

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Starts writing `state`; returns once it is copied off the devices.

        The state may be donated to the next step afterwards. A save still running is finished
        first.

        Raises: CheckpointError when this or the save before it failed.
        """
        self.wait()
        named = _named(state)
        full = {**meta, "format": FORMAT, "step": step, "tree": _describe(named)}
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(_nest(named)),
            meta=ocp.args.JsonSave(full),
        )
        try:
            # False means orbax already knows a step at least as new and wrote nothing.
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
        it is asked to wait, and until then names the failed step as the latest.
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
            if fault(self.folder / str(step)) is not None:
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

    def _folders(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return [p for p in self.folder.iterdir() if p.name.isdecimal()]

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            try:
                if self.host.is_first:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    for name in self.damaged():
                        # Left in place, a folder like `999` would make orbax skip every save below.
                        self._move_aside(name)
                    self._empty_trash()
                self.host.wait("checkpoint folder")
                self._manager = ocp.CheckpointManager(
                    self.folder,
                    options=ocp.CheckpointManagerOptions(
                        max_to_keep=self.keep,
                        todelete_subdir=TRASH,
                        cleanup_tmp_directories=True,
                        enable_async_checkpointing=True,
                    ),
                )
            except OSError as error:
                raise CheckpointError(
                    f"cannot write checkpoints in {self.folder}: {error.strerror or error}"
                ) from error
        return self._manager

    def _move_aside(self, name: str) -> None:
        aside = self.folder / SET_ASIDE
        aside.mkdir(exist_ok=True)
        number = sum(1 for p in aside.iterdir() if p.name.split(".")[0] == name)
        (self.folder / name).rename(aside / (f"{name}.{number}" if number else name))

    def _empty_trash(self) -> None:
        if self.host.is_first:
            shutil.rmtree(self.folder / TRASH, ignore_errors=True)

    def _failure(self, step: int, error: Exception) -> CheckpointError:
        if isinstance(error, CheckpointError):
            return error
        # What was written of it would keep a full disk full.
        for left in self.folder.glob(f"{step}.orbax-checkpoint-tmp*"):
            shutil.rmtree(left, ignore_errors=True)
        latest = self.latest()
        last = "there is no complete checkpoint" if latest is None else f"step {latest} is complete"
        return CheckpointError(f"saving step {step} failed: {_one_line(error)}", hint=last)


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
    meta = _read_meta(folder)
    names = {name: entry for name, entry in meta["tree"].items() if name.startswith("params/")}
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    places = dict.fromkeys(names, here) if layout is None else _named({"params": layout(meta)})
    wanted = {
        name: jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=places[name])
        for name, (dtype, shape) in names.items()
    }
    return _nest(_read_arrays(folder, wanted))["params"], meta


def find_step(path: Path, step: int | None = None) -> Path:
    """The folder of one complete step under a run, checkpoints or step folder.

    Raises: CheckpointError when there is none, with the steps there are.
    """
    path = path.absolute()
    if step is None and path.name.isdecimal() and fault(path) is None:
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    checkpoints = Checkpoints(folder)
    steps = checkpoints.steps()
    if steps and step is None:
        return folder / str(steps[0])
    if step in steps:
        return folder / str(step)
    damaged = checkpoints.damaged()
    if steps:
        told, hint = damaged.get(str(step)), f"has {steps}"
    elif (folder / "state").exists() or (folder / "meta").exists():  # a step's own folder
        told, hint = fault(folder), None
    else:
        told, hint = "; ".join(f"{name}: {reason}" for name, reason in damaged.items()), None
    what = f"complete checkpoint of step {step}" if steps else "complete checkpoint"
    raise CheckpointError(f"{path}: no {what}" + (f" ({told})" if told else ""), hint=hint)


def fault(folder: Path) -> str | None:
    """Why a step folder is not a complete checkpoint of the step in its name; None when it is."""
    if folder.is_symlink() or not folder.is_dir():
        return "not a folder"
    if not (folder / "state" / "_METADATA").is_file():
        return "the state is missing or half written"
    try:
        meta = _read_meta(folder)
        step, version, tree = meta["step"], meta["format"], meta["tree"]
    except (OSError, ValueError, KeyError, TypeError):
        return "its description cannot be read"
    if not isinstance(tree, dict) or not isinstance(version, int):
        return "its description cannot be read"
    if version != FORMAT:
        age = "a newer" if version > FORMAT else "an older"
        return f"written by {age} version (format {version}, this one reads {FORMAT})"
    if str(step) != folder.name:
        return f"it holds step {step}"
    return None


def _read_meta(folder: Path) -> Meta:
    return json.loads((folder / "meta" / "metadata").read_text())


def _read_arrays(folder: Path, wanted: dict[str, Any]) -> dict[str, jax.Array]:
    nested = _nest(wanted)
    args = ocp.args.PyTreeRestore(
        item=nested,
        restore_args=ocp.checkpoint_utils.construct_restore_args(nested),
        partial_restore=True,
    )
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            return _named(reader.restore(folder / "state", args=args))
    except Exception as error:
        raise CheckpointError(f"checkpoint {folder} cannot be read: {_one_line(error)}") from error


def _named(tree: Any) -> dict[str, Any]:
    """A tree of any classes as a flat dict of its leaves, named `params/layers/...`."""

    def part(key: Any) -> str:
        for attribute in ("key", "name", "idx"):
            if hasattr(key, attribute):
                return str(getattr(key, attribute))
        raise ValueError(f"unnamed tree node {key!r}")

    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(part(key) for key in path): leaf for path, leaf in leaves}


def _unname(named: dict[str, Any], target: Any) -> Any:
    return jax.tree.unflatten(jax.tree.structure(target), [named[name] for name in _named(target)])


def _nest(named: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, leaf in named.items():
        *parents, last = name.split("/")
        at = nested
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = leaf
    return nested


def _describe(named: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in named.items()}


def _compare(saved: Mapping[str, Any], wanted: Mapping[str, Any], place: str) -> None:
    def text(entry: list[Any] | None) -> str:
        return "absent" if entry is None else f"{entry[0]}{entry[1]}"

    differences = [
        f"`{name}` is {text(saved.get(name))}, not {text(wanted.get(name))}"
        for name in sorted({*saved, *wanted})
        if saved.get(name) != wanted.get(name)
    ]
    if differences:
        shown = differences[:SHOWN_DIFFERENCES]
        more = len(differences) - len(shown)
        raise CheckpointError(
            f"{place}: {len(differences)} arrays differ from this recipe's: "
            + "; ".join(shown + [f"and {more} more"] * bool(more)),
            hint="continue with the recipe that wrote it (`recipe` in its meta)",
        )


def _one_line(error: Exception) -> str:
    """What went wrong; from the libraries' long lines, which name a file thrice, the reason alone
    if the operating system gave one."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if reason := re.search(r"\[os_error_code='(\d+)'\]", lines[0]):
        return os.strerror(int(reason[1]))
    return lines[0][:240]
