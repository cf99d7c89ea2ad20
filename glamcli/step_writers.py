"""What writes the arrays of a step while training goes on: on a disk orbax's own manager of
checkpoints, in a bucket a thread that does the same with fewer requests.

Both have the methods of `ocp.CheckpointManager` that are used: `save` returns when the arrays are
copied off the devices, `is_saving_in_progress` and `wait_until_finished` tell how it ended. A
bucket is written from threads alone, so no request ever keeps the training waiting.
"""

import asyncio
import errno
import json
import os
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from glamcli import atomic, step_folders
from glamcli.errors import SaveFailed
from glamcli.hosts.join import Host
from glamcli.orbax_setup import prepare_for_bucket

SAVE_SECONDS = 1800.0
"""what the arrays of one step may take on their way to a bucket, which may be far."""
LAST_CHANCE_SECONDS = 60.0
"""what an ending run gives to its last uploads."""
PUBLISH_SECONDS = 60.0
"""what the small files may take after them, before the save counts as failed."""


class _Durable(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A step folder that gets its name when all files in it are on the disk. Orbax syncs those of
    arrays alone: a power failure could leave a complete step with an empty description."""

    async def finalize(self) -> None:
        if self.get_final().name.isdecimal():  # an item becomes a part of it before
            sync(Path(self.get()))
        await super().finalize()
        sync_names(Path(self.get_final()).parent)


def disk_writer(folder: Path) -> ocp.CheckpointManager:
    """Writes step folders into `folder`. Raises: OSError."""
    return ocp.CheckpointManager(
        epath.Path(folder),
        options=ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=True,
            temporary_path_class=_Durable,
            lightweight_initialize=True,  # other steps' _CHECKPOINT_METADATA is unread
        ),
    )


@dataclass(frozen=True)
class StepsInBucket:
    """Where the steps of an attempt to train go that has its run in a bucket."""

    arrays: str
    """URL of a folder that no other attempt has."""
    publish: Callable[[], Callable[[float], bool]]
    """asks for an upload of the small files; the answer tells, in so many seconds, if it is done"""


class BucketWriter:
    """Writes the arrays of steps to a bucket, and then their descriptions into the step folders of
    `folder`, whose upload makes them count. `retire` is called between the two, so that what need
    not stay goes with the same upload. Of several processes all write; the first uploads what the
    others then note for themselves.
    """

    def __init__(
        self, folder: Path, in_bucket: StepsInBucket, host: Host, retire: Callable[[], object]
    ):
        self._folder, self._in_bucket, self._host, self._retire = folder, in_bucket, host, retire
        self._num_saves = 0
        self._remains: threading.Thread | None = None
        """lives as long as writes of a save that failed do, which hold copies of arrays."""
        self.published = next(iter(step_folders.complete_steps(folder)), None)
        """the newest step that the bucket has for certain."""
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._patience: float | None = None
        self._describing, self._is_abandoned = threading.Lock(), False

    def hurry(self, seconds: float) -> None:
        """From now on, what is not complete after so many seconds of waiting is given up."""
        self._patience = seconds

    def save(self, step: int, args: Any) -> bool:
        """Copies the arrays and starts writing. A save that failed may have left objects behind, so
        each has a folder of its own.

        Raises: SaveFailed while one is still writing: host memory has room for the copies of one.
        """
        if self._remains is not None:
            self._remains.join(1.0)
        if self._remains is not None and self._remains.is_alive():
            what = f"saving step {step} failed: the arrays of the save before it are still written"
            raise SaveFailed(what, self.kept())
        self._num_saves += 1
        prepare_for_bucket()
        place = epath.Path(f"{self._in_bucket.arrays}/{self._num_saves}-{step}")
        arrays = ocp.type_handlers.ArrayHandler(enable_write_sharding_file=False)
        writer = ocp.PyTreeCheckpointHandler(
            type_handler_registry=ocp.type_handlers.create_type_handler_registry(
                (jax.Array, arrays)
            ),
        )
        # Writing starts here, in threads; what is awaited are the copies.
        written = _run(writer.async_save(place, args=args["state"])) or []
        about = (step, writer, written, place, args["meta"].item)
        self._thread = threading.Thread(target=self._finish, args=about, daemon=True)
        self._thread.start()
        return True

    def is_saving_in_progress(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def wait_until_finished(self) -> None:
        """Raises: whatever ended the save, once."""
        if self._thread is not None:
            self._thread.join(self._patience)
            with self._describing:
                self._is_abandoned = self._thread.is_alive()
            if self._is_abandoned:
                raise TimeoutError(f"not complete after {self._patience:.0f} s")
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def kept(self) -> str:
        """What the bucket has, in words."""
        has = "no step" if self.published is None else f"step {self.published}"
        return f"{has} is in the bucket"

    def close(self) -> None:
        pass

    def _finish(self, step: int, writer: Any, written: list[Any], place: Any, meta: Any) -> None:
        try:
            until = time.monotonic() + SAVE_SECONDS
            for each in written:
                each.result(max(0.0, until - time.monotonic()))
            self._wait_for_others(f"{place} written")
            if self._host.is_first:
                writer.finalize(place)
                with self._describing:
                    if self._is_abandoned:
                        return
                    self._describe(step, str(place), meta)
                    self._retire()
                if not self._in_bucket.publish()(PUBLISH_SECONDS):
                    what = f"saving step {step} failed: its files are not uploaded yet"
                    raise SaveFailed(what, f"its arrays are; {self.kept()}")
                self.published = step
            self._wait_for_others(f"{place} published")
            if not self._host.is_first:
                self._describe(step, str(place), meta)
                self._retire()
                self.published = step
        except BaseException as error:
            self._remains = threading.Thread(target=_await_all, args=(written,), daemon=True)
            self._remains.start()
            self._error = error
        finally:
            writer.close()

    def _describe(self, step: int, place: str, meta: Any) -> None:
        """In the place of an earlier save of this step, whose upload failed."""
        step_folders.empty_trash(self._folder)
        unfinished = self._folder / f"{step}.orbax-checkpoint-tmp"
        atomic.write(unfinished / "meta" / "metadata", json.dumps(meta))
        atomic.write(unfinished / step_folders.ARRAYS_URL, place)
        if (self._folder / str(step)).exists():
            step_folders.delete_step(self._folder, step)
        unfinished.rename(self._folder / str(step))

    def _wait_for_others(self, name: str) -> None:
        """A barrier of jax's coordinator, which any thread may use, and no collective of devices;
        nothing for a single process."""
        ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=int(1000 * SAVE_SECONDS))


def _run(copying: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine returns, also where an event loop runs already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(copying)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, copying).result()


def _await_all(writes: list[Any]) -> None:
    for each in writes:
        with suppress(Exception):  # which ended it
            each.result()


def sync(folder: Path) -> None:
    """Returns when everything below a folder is on the disk, folders after what is in them.

    Raises: OSError.
    """
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(os.path.join(place, name))
        sync_names(Path(place))


def sync_names(folder: Path) -> None:
    """Returns when the names in a folder are on the disk, if its file system knows such a request.

    Raises: OSError.
    """
    try:
        _sync(str(folder))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def _sync(path: str) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
