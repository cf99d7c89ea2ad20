"""Arrays of a checkpoint's step folder, read with orbax and compared with their digests; and the
newest step for which that succeeds.

A read that fails does so in words: which array, which file. What the libraries print and leave
behind when they fail is kept off the screen.
"""

import contextlib
import errno
import gc
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

from glamcli import step_folders
from glamcli.array_errors import SHOWN_ARRAYS, damage, one_line, os_error, shown_names, store_error
from glamcli.errors import CheckpointError, DamagedCheckpoint, RecipeError, causes, first_of
from glamcli.hosts.join import ALONE, Host
from glamcli.model.digest import digests
from glamcli.named_leaves import named_leaves, nested
from glamcli.orbax_setup import ignore_abandoned_work, prepare_for_bucket, silenced
from glamcli.progress import duration
from glamcli.step_folders import Meta, complete_meta
from glamcli.storage import is_url, place

# Reasons of this machine and not of the files: an older step would not be read either.
_NOT_DAMAGE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_NO_THREAD = "can't start new thread"
READ_WAITS = (5.0, 15.0, 60.0)
"""seconds before a bucket that did not answer is asked for arrays again."""

Made = TypeVar("Made")


def read_arrays(
    folder: Path,
    wanted: Mapping[str, Any],
    meta: Meta,
    host: Host = ALONE,
    warn: Callable[[str], object] = warnings.warn,
) -> dict[str, jax.Array]:
    """Arrays of a step folder by name, placed as the abstract arrays in `wanted` say, and verified
    with the digests in `meta` if it has them (since format 4).

    All processes of `host` must call this alike, and succeed or fail together. A bucket that does
    not answer is asked again after `READ_WAITS`, and `warn` told.

    Raises:
        DamagedCheckpoint: an array cannot be read, or is not the one that was saved.
        CheckpointError: this machine cannot open enough files, or start a thread, to read it; the
            bucket does not answer.
        MemoryError, jax.errors.JaxRuntimeError: memory is short.
    """
    arrays, reason = {}, None
    ignore_abandoned_work()
    state = _arrays(folder)
    where = f" in {state}" if is_url(state) else ""
    try:
        with silenced("absl", "asyncio"):
            arrays = _read_patiently(state, wanted, warn)
    except (CheckpointError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        reason = damage(state, wanted, error)
    else:
        if lacking := [name for name in wanted if not isinstance(arrays.get(name), jax.Array)]:
            reason = f"state/_METADATA does not have {shown_names(lacking)}{where}"
    if reason is not None:
        _collect_unfinished_reads()
    _fail_together(folder, reason, host)
    if "digests" in meta:
        found = digests(arrays)
        wrong = [name for name in arrays if meta["digests"].get(name) != found[name]]
        reason = f"not as saved: {shown_names(wrong)}{where}" if wrong else None
        _fail_together(folder, reason, host)
    return arrays


def verify(folder: Path) -> None:
    """Reads every array of a step folder, one at a time, and compares it with its digest.

    Raises: DamagedCheckpoint naming the file or array that is not as it was saved. (Of formats 2
        and 3, which have no digests, only what cannot be read.)
    """
    for name in complete_meta(folder)["tree"]:
        read_array(folder, name)


def read_array(folder: Path, name: str) -> jax.Array:
    """One array of a step folder, verified, on the first device.

    Raises: DamagedCheckpoint when it cannot be read, or is not as it was saved.
    """
    meta = complete_meta(folder)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with step_folders.describing(folder):
        dtype, shape = meta["tree"][name]
        wanted = jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=here)
    return read_arrays(folder, {name: wanted}, meta)[name]


def newest_usable(
    find: Callable[[], list[Path]],
    read: Callable[[Path, Meta], Made],
    host: Host,
    warn: Callable[[str], object],
    strict: bool = False,
    reject: Callable[[str], object] = lambda name: None,
) -> Made:
    """What `read` makes of the first step folder that `find` lists and that can be used, given its
    description, which is the same in all processes.

    The next one is tried, and `warn` and `reject` (with its name) called, when `read` raises
    DamagedCheckpoint, which it must do in all processes alike; with `strict` that ends it. A folder
    that is deleted meanwhile is left out without a word. All processes follow the first one's list.

    Raises: CheckpointError when none can be used, or one is of a newer version; what `find` and
        `read` raise.
    """
    damaged: dict[Path, DamagedCheckpoint] = {}
    gone: set[Path] = set()
    while True:
        mine = find()
        folders = map(Path, host.gather("checkpoints", [str(path) for path in mine])[0])
        folders = [mine[0].parent / path.name if mine else path for path in folders]
        folder = next((path for path in folders if path not in damaged and path not in gone), None)
        if folder is None:
            raise _none_usable(list(damaged.values()))
        try:
            mine = step_folders.examined(folder)
            sent = mine if host.is_first or isinstance(mine, str) else None
            descriptions = host.gather("description", sent)
            for fault in descriptions:
                if isinstance(fault, str):
                    raise step_folders.refusal(folder, fault)
            made = read(folder, descriptions[0])
        except DamagedCheckpoint as error:
            if host.any("deleted", not folder.exists()):
                gone.add(folder)
                continue
            if strict:
                raise
            warn(error.what)
            reject(folder.name)
            damaged[folder] = error
            continue
        if damaged:
            lost = max(map(_claimed_step, damaged)) - int(folder.name)
            loss = f"up to {lost} steps of training are lost" if lost > 0 else "nothing is lost"
            warn(f"going back to step {folder.name}: {loss}")
        return made


def _claimed_step(folder: Path) -> int:
    """The step that a damaged folder was saved at: by its description, which may be a copy's, else
    by its name; 0 for one that was never a step."""
    try:
        return int(step_folders.step_meta(folder)["step"])
    except (OSError, LookupError, TypeError, ValueError, OverflowError):
        return int(folder.name) if (folder / "state").is_dir() else 0


def _none_usable(errors: list[DamagedCheckpoint]) -> CheckpointError:
    if len(errors) == 1:
        return errors[0]
    what = "; ".join(first_of([error.what for error in errors], SHOWN_ARRAYS))
    return DamagedCheckpoint(what or "every checkpoint was deleted while it was read")


def _fail_together(folder: Path, reason: str | None, host: Host) -> None:
    for each in host.gather("arrays", reason):
        if each is not None:
            raise DamagedCheckpoint(f"checkpoint {folder} cannot be used: {each}")


def _arrays(folder: Path) -> Path:
    try:
        return place(step_folders.arrays_of(folder.absolute()))  # orbax refuses other paths
    except (OSError, ValueError, RecipeError):
        what = f"{step_folders.ARRAYS_URL} is damaged"
        raise DamagedCheckpoint(f"checkpoint {folder} cannot be used: {what}") from None


def _read_patiently(
    state: Path, wanted: Mapping[str, Any], warn: Callable[[str], object]
) -> dict[str, jax.Array]:
    if is_url(state):
        prepare_for_bucket()
    for wait in (*READ_WAITS, None):
        try:
            with warnings.catch_warnings(action="ignore"):
                return _read(str(state), wanted)
        except Exception as error:
            _raise_if_of_this_machine(error, state)
            reason = store_error(error, str(state)) if is_url(state) else None
            if reason is None:
                raise
        if wait is None:
            break
        warn(f"{reason}; trying again in {duration(wait)}")
        time.sleep(wait)
    hint = "run the same command when the store answers; nothing is damaged"
    raise CheckpointError(f"checkpoint {state} cannot be read: {reason}", hint)


def _raise_if_of_this_machine(error: Exception, state: Path) -> None:
    for cause in causes(error):  # orbax wraps what it meets
        if isinstance(cause, jax.errors.JaxRuntimeError | MemoryError):
            raise cause from None
    if os_error(error) in _NOT_DAMAGE or _NO_THREAD in str(error):
        raise CheckpointError(f"checkpoint {state} cannot be read: {one_line(error)}") from None


def _read(state: str, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    item = nested(wanted)
    args = ocp.args.PyTreeRestore(
        item=item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=True,
    )
    # Without a store of array metadata, which only keys of random numbers need: its files, which
    # no digest covers, need not be whole.
    handlers = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    reader = ocp.PyTreeCheckpointHandler(type_handler_registry=handlers)
    # Not through `ocp.Checkpointer`: there processes that have read everything would wait for one
    # that has not.
    with contextlib.closing(reader):
        return named_leaves(reader.restore(epath.Path(state), args=args))  # pyright: ignore[reportArgumentType]


def _collect_unfinished_reads() -> None:
    """Frees what a failed read leaves behind: coroutines that were never started, of which Python
    would print a traceback later on."""
    ignored = warnings.catch_warnings(action="ignore", category=RuntimeWarning)
    with ignored, silenced("asyncio"):
        gc.collect()
