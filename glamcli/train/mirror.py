"""The small files of a run in a bucket: a working folder on this machine, and their copies.

All that a run writes but the arrays of its steps is written to the working folder, as on a disk. A
thread of its own uploads what has changed, each file as one object, on the condition that it is as
this run left it (`hosts/lease.py` says why). The bucket is the truth: a start fills the folder from
it.
"""

import errno
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from glamcli import atomic
from glamcli.conditional import ABSENT
from glamcli.errors import CheckpointError
from glamcli.progress import duration
from glamcli.storage import Remote
from glamcli.stored_runs import STEPS, is_plain
from glamcli.train.retry import WAITS
from glamcli.train.working_folder import (
    ELSEWHERE,
    as_packed,
    as_written,
    objects_of_run,
    packed_steps,
    refuse_run_of_disk,
    small_files,
    write_steps,
)
from glamcli.untrusted import MAX_FILE_BYTES

_MARK = ".mirror"
"""a file of a working folder, by which a mirror knows it as its own, and whole."""
_END_SECONDS = 10.0
"""what a request that is under way has to end, when a mirror is closed."""
_Stamp = tuple[int, int]


class _Closed(Exception):
    pass


class Mirror:
    """The new working folder `folder` of the run at `url`.

    `owns` asks the bucket whether this process holds the run. `warn` hears of uploads that fail and
    are tried again, for as long as it takes; `lost` of a file that another process has written,
    which holds the run now: then nothing is uploaded any more. `published` is given the steps that
    the bucket has; what it returns is gone through, one by one, while nothing is to be uploaded.
    All four are called from the thread.
    """

    def __init__(
        self,
        url: Remote,
        folder: Path,
        owns: Callable[[], bool],
        warn: Callable[[str], object],
        lost: Callable[[str], object],
        published: Callable[[bytes], Iterable[object]] = lambda steps: (),
        waits: tuple[float, ...] = WAITS,
    ):
        self._url, self._folder, self._waits, self._owns = url, folder, waits, owns
        self._warn, self._lost, self._published = warn, lost, published
        self._steps = b""
        self._mark = uuid.uuid4().hex
        self._versions: dict[str, str] = {}
        self._stamps: dict[str, _Stamp] = {}
        """size and time of change of each file, as it was uploaded last."""
        self._changed = threading.Condition()
        self._num_asked = self._num_done = 0
        self._is_closing = self._is_over = False
        self._failing_since: float | None = None
        self._thread = threading.Thread(target=self._upload, daemon=True)

    def open(self) -> None:
        """Makes the folder what the bucket has, and starts the thread.

        Raises: CheckpointError when the bucket or the folder cannot be used, or holds something
            else than a run in a bucket.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / _MARK).write_text(self._mark)
            refuse_run_of_disk(self._url, objects_of_run(self._url))
            self._take_steps()
            for name, listed in objects_of_run(self._url).items():
                if name == STEPS or name.startswith(ELSEWHERE) or not is_plain(name):
                    continue
                if listed.num_bytes > MAX_FILE_BYTES:
                    raise ValueError(f"{name} is larger than {MAX_FILE_BYTES:,} bytes")
                data, self._versions[name] = (self._url / name).read_at()
                atomic.write(self._folder / name, data)
                self._stamps[name] = _stamp(self._folder / name)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            what = f"{self._url} cannot be copied to {self._folder.parent}: {reason}"
            raise CheckpointError(what) from error
        self._thread.start()

    def ask(self) -> int:
        """Asks for all that was written so far; a number for `has`."""
        with self._changed:
            self._num_asked += 1
            self._changed.notify_all()
            return self._num_asked

    def has(self, number: int) -> bool:
        """Whether everything that was written when this number was given is in the bucket."""
        return self._num_done >= number

    def wait(self, number: int, seconds: float) -> bool:
        """Waits for that, at most so long; whether it is so."""
        with self._changed:
            self._changed.wait_for(lambda: self.has(number) or self._is_over, seconds)
            return self.has(number)

    def wait_while_it_works(self, number: int, seconds: float) -> bool:
        """The same, however long it takes, until uploads have failed for so many seconds."""
        while not self.wait(number, 1.0):
            since = self._failing_since
            if self._is_over or (since is not None and time.monotonic() > since + seconds):
                return self.has(number)
        return True

    def close(self, seconds: float) -> bool:
        """Uploads what has changed, in at most so many seconds, and ends the thread; whether all is
        in the bucket."""
        number = self.ask()
        if self._thread.ident is not None:
            with self._changed:
                self._is_closing = True
                self._changed.notify_all()
            self._thread.join(seconds)
            self._end()
            self._thread.join(_END_SECONDS)
            return self.has(number)
        return True

    def after_end(self, call: Callable[[], object]) -> None:
        """Calls `call` when the thread writes nothing any more: before it returns, if it can."""
        if not self._thread.is_alive():
            call()
            return
        threading.Thread(target=lambda: (self._thread.join(), call()), daemon=True).start()

    def _upload(self) -> None:
        num_failed = 0
        rest: Iterator[object] = iter(())
        with suppress(_Closed):
            while (number := self._next()) is not None:
                began = time.monotonic()
                try:
                    steps = self._upload_changed()
                except _Closed:
                    raise
                except FileExistsError as error:
                    self._end()
                    self._lost(f"{error.filename}: {error.strerror}")
                    return
                except Exception as error:  # whatever it was, training is worth more
                    self._failing_since = self._failing_since or began
                    self._failed(error, self._failing_since, num_failed, number)
                    num_failed += 1
                    continue
                num_failed, self._failing_since = 0, None
                with self._changed:
                    self._num_done = max(self._num_done, number)
                    self._changed.notify_all()
                if steps is not None:
                    rest = iter(self._published(steps))
                for _ in rest:
                    self._go_on()
                    if self._num_asked > self._num_done:
                        break
        self._end()

    def _failed(self, error: Exception, since: float, num_failed: int, number: int) -> None:
        """Tells it, and waits until it is time for another attempt."""
        wait = self._waits[0 if self._is_closing else min(num_failed, len(self._waits) - 1)]
        taken = duration(time.monotonic() - since)
        what = getattr(error, "filename", None) or self._url
        self._warn(
            f"{what}: {getattr(error, 'strerror', None) or error}; not uploaded for {taken}"
            f", trying again in {duration(wait)}; training goes on"
        )
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or self._num_asked > number, wait)

    def _next(self) -> int | None:
        """Waits for something to do: the number of what is asked for; None at the end."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_over or self._is_closing or self._num_asked > self._num_done
            )
            is_end = self._is_over or self._num_asked == self._num_done
            return None if is_end else self._num_asked

    def _end(self) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def _go_on(self) -> None:
        """Raises: _Closed when nothing may be written any more."""
        if self._is_over:
            raise _Closed

    def _take_steps(self) -> None:
        """Writes the steps anew, first of all: an owner before this one that is still at work
        cannot change them any more, nor what belongs to them."""
        while True:
            data, version = (self._url / STEPS).read_at()
            with suppress(FileExistsError):
                self._steps = as_packed(data)
                write_steps(self._folder, self._steps, self._url)
                written = as_written(self._steps)
                self._versions[STEPS] = (self._url / STEPS).write_at(written, version)
                return

    def _upload_changed(self) -> bytes | None:
        """Returns the steps, if those were not yet in the bucket. Raises: OSError."""
        self._look()
        steps = packed_steps(self._folder)  # as they are before the files are read
        here = small_files(self._folder)
        self._look()
        for name, path in here.items():
            try:
                if (stamp := _stamp(path)) == self._stamps.get(name):
                    continue
                data = path.read_bytes()
            except FileNotFoundError:  # renamed meanwhile: its new name is uploaded
                continue
            self._write(name, data)
            self._stamps[name] = stamp
        for name in self._stamps.keys() - here.keys():
            self._delete(name)
        if steps == self._steps:
            return None
        self._look()
        self._write(STEPS, as_written(steps))
        self._steps = steps
        return steps

    def _look(self) -> None:
        """Raises: OSError when the working folder is not as it was left: what is missing in it must
        not go in the bucket as well."""
        with suppress(OSError):
            if (self._folder / _MARK).read_text() == self._mark:
                return
        raise OSError(f"its working folder {self._folder.parent} was deleted by another program")

    def _write(self, name: str, data: bytes) -> None:
        """Writes an object that is as this run left it. Where it is not, but this process still
        holds the run, the answer to an earlier request got lost, or an owner before this one wrote
        it in its last moments.

        Raises: FileExistsError when another process holds the run.
        """
        path = self._url / name
        while True:
            self._go_on()
            try:
                version = self._versions.get(name, ABSENT)
                self._versions[name] = path.write_at(data, version)
                return
            except FileExistsError:
                self._versions[name] = path.read_at()[1]
                if not self._owns():
                    raise

    def _delete(self, name: str) -> None:
        path = self._url / name
        self._look()
        if os.path.lexists(self._folder / name):
            return
        if not self._owns():
            raise FileExistsError(errno.EEXIST, "another process holds the run", str(path))
        self._go_on()
        path.unlink()
        del self._stamps[name], self._versions[name]


def _stamp(path: Path) -> _Stamp:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
