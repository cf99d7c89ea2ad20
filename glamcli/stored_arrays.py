"""Arrays of a checkpoint's step folder, read with orbax and compared with their digests; and the
newest step for which that succeeds.

A read that fails does so in words: which array, which file. What the libraries print and leave
behind when they fail is kept off the screen.
"""

import contextlib
import errno
import functools
import gc
import logging
import os
import re
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from glamcli import step_folders
from glamcli.errors import CheckpointError, DamagedCheckpoint, causes, first_of
from glamcli.hosts.join import ALONE, Host
from glamcli.model.digest import digests
from glamcli.named_leaves import named_leaves, nested
from glamcli.step_folders import Meta, complete_meta
from glamcli.untrusted import parse_json, read_file

SHOWN_ARRAYS = 3
# Reasons of this machine and not of the files: an older step would not be read either.
_NOT_DAMAGE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_NO_THREAD = "can't start new thread"
# Coroutines of orbax that never start when a save fails before them.
_UNSTARTED = (
    "_create_paths|cancellable|_async_serialize_shardings|_serialize_arrays|JsonCheckpointHandler"
    "|BasePyTreeCheckpointHandler|Store"
)
_NOT_ASKED = "exception was never retrieved"
_ABANDONED = ("Event loop is closed", "Encountered error while reading array index")

Made = TypeVar("Made")


def read_arrays(
    folder: Path, wanted: Mapping[str, Any], meta: Meta, host: Host = ALONE
) -> dict[str, jax.Array]:
    """Arrays of a step folder by name, placed as the abstract arrays in `wanted` say, and verified
    with the digests in `meta` if it has them (since format 4).

    All processes of `host` must call this alike, and succeed or fail together.

    Raises:
        DamagedCheckpoint: an array cannot be read, or is not the one that was saved.
        CheckpointError: this machine cannot open enough files, or start a thread, to read it.
        MemoryError, jax.errors.JaxRuntimeError: memory is short.
    """
    arrays, reason = {}, None
    ignore_abandoned_work()
    try:
        with silenced("absl", "asyncio"), warnings.catch_warnings(action="ignore"):
            arrays = _read(folder.absolute() / "state", wanted)  # orbax refuses other paths
    except Exception as error:
        for cause in causes(error):  # orbax wraps what it meets
            if isinstance(cause, jax.errors.JaxRuntimeError | MemoryError):
                raise cause from None
        if os_error(error) in _NOT_DAMAGE or _NO_THREAD in str(error):
            raise CheckpointError(
                f"checkpoint {folder} cannot be read: {one_line(error)}"
            ) from None
        reason = _reason(folder, wanted, error)
    else:
        if lacking := [name for name in wanted if not isinstance(arrays.get(name), jax.Array)]:
            reason = f"state/_METADATA does not have {_names(lacking)}"
    if reason is not None:
        _collect_unfinished_reads()
    _fail_together(folder, reason, host)
    if "digests" in meta:
        found = digests(arrays)
        wrong = [name for name in arrays if meta["digests"].get(name) != found[name]]
        _fail_together(folder, f"not as saved: {_names(wrong)}" if wrong else None, host)
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
    that is deleted meanwhile (retention of a training run) is left out without a word. All
    processes of `host` follow the list of the first.

    Raises: CheckpointError when none can be used, or one is of a newer version; what `find` and
        `read` raise.
    """
    damaged: dict[Path, DamagedCheckpoint] = {}
    gone: set[Path] = set()
    while True:
        folders = map(Path, host.gather("checkpoints", [str(path) for path in find()])[0])
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


def _read(state: Path, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
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
        return named_leaves(reader.restore(state, args=args))  # pyright: ignore[reportArgumentType]


def _reason(folder: Path, wanted: Mapping[str, Any], error: Exception) -> str:
    try:
        parse_json(read_file(folder / "state/_METADATA"))
    except (OSError, ValueError):
        return "state/_METADATA is damaged"
    text = f"{error} {error.__cause__}"
    stored = re.findall(r'"(\S+)/[^"/]+" in OCDBT', text)
    names = [name for name in wanted if name.replace("/", ".") in stored]
    paths = [Path(path) for path in re.findall(r'local file "([^"]+[^/])"', text)]
    code = os_error(error)
    what = "is damaged" if code is None else f"cannot be read: {os.strerror(code)}"
    manifest = folder / "state/manifest.ocdbt"
    if paths or not manifest.exists():
        path = paths[-1] if paths else manifest
        needed = f" (`{names[0]}` is in it)" if names else ""
        return f"{os.path.relpath(path, folder)} {what if path.exists() else 'is missing'}{needed}"
    if names:
        return f"`{names[0]}` {what}"
    return f"state/_METADATA {what} ({type(error).__name__})"


def _names(names: list[str]) -> str:
    return ", ".join(first_of([f"`{name}`" for name in names], SHOWN_ARRAYS))


def os_error(error: Exception) -> int | None:
    """The operating system's number for what went wrong, if it did, in Python or in TensorStore."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\[os_error_code='(\d+)'\]", f"{error} {error.__cause__}")
    return int(found[1]) if found else None


@functools.cache
def ignore_abandoned_work() -> None:
    """Leaves out, from now on, what is reported, perhaps late, of other arrays when one cannot be
    read or written: orbax closes the event loop in which TensorStore's threads are at work."""
    # The module may be gone when these are called.
    hook, known, not_asked = sys.unraisablehook, _ABANDONED, _NOT_ASKED
    sys.unraisablehook = lambda raised: (
        None if str(raised.exc_value).startswith(known) else hook(raised)
    )
    message = rf"coroutine '({_UNSTARTED}).*' was never awaited"
    warnings.filterwarnings("ignore", message, RuntimeWarning)
    # With a traceback for every array: hundreds, when the program ends.
    logging.getLogger("asyncio").addFilter(lambda record: not_asked not in record.getMessage())


@functools.cache
def time_saves_by_a_steady_clock() -> None:
    """Lets orbax measure its time limits, from now on, by a clock that nobody can set: if the
    wall's, which it uses, jumps forward, a save fails at once."""
    names = ("futures.future", "futures.signaling_client", "checkpointers.async_checkpointer")
    for module in (sys.modules.get(f"orbax.checkpoint._src.{name}") for name in names):
        if hasattr(module, "time"):
            clock = {**vars(time), "time": time.monotonic}
            module.time = types.SimpleNamespace(**clock)  # pyright: ignore


@contextlib.contextmanager
def silenced(*loggers: str) -> Iterator[None]:
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
    """Frees what a failed read leaves behind: coroutines that were never started, of which Python
    would print a traceback later on."""
    ignored = warnings.catch_warnings(action="ignore", category=RuntimeWarning)
    with ignored, silenced("asyncio"):
        gc.collect()


def one_line(error: BaseException) -> str:
    """What went wrong; from the libraries' long lines, which name a file thrice, the reason alone
    if the operating system gave one."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if reason := re.search(r"\[(?:os_error_code='|Errno )(\d+)'?\]", lines[0]):
        return os.strerror(int(reason[1]))
    return lines[0][:240]
