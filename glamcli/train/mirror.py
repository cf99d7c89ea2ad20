"""The small files of a run in a bucket: a working folder on this machine, and their copies.

All that a run writes but the arrays of its steps is written to the working folder, as on a disk. A
thread of its own uploads what has changed, each file as one object, on the condition that it is as
this run left it (`hosts/lease.py` says why). The bucket is the truth: a start fills the folder from
it.
"""

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from glamcli import atomic
from glamcli.errors import CheckpointError
from glamcli.progress import duration
from glamcli.storage import Remote
from glamcli.stored_runs import OWNER, RESULTS, STEPS, STEPS_FOLDER, is_plain, parse_steps
from glamcli.train.retry import WAITS

ELSEWHERE = ("arrays/", "launch/", "profile/", *(f"{folder}/" for folder in RESULTS), OWNER)
"""not the mirror's: what others write (arrays, a launch, traces, scores), and the owner."""
_NOT_FILES = (*ELSEWHERE, f"{STEPS_FOLDER}/")
_NOT_STEPS = ("trash", ".orbax-checkpoint-tmp")
_Stamp = tuple[int, int]


class Mirror:
    """The working folder `folder` of the run at `url`.

    `warn` hears of uploads that fail and are tried again, for as long as it takes; `lost` of a file
    that another process has written: then nothing is uploaded any more. Both from the thread.
    """

    def __init__(
        self,
        url: Remote,
        folder: Path,
        warn: Callable[[str], object],
        lost: Callable[[str], object],
        published: Callable[[bytes], object] = lambda steps: None,
        waits: tuple[float, ...] = WAITS,
    ):
        self._url, self._folder, self._waits = url, folder, waits
        self._warn, self._lost, self._published = warn, lost, published
        self._steps = b"{}"
        self._generations: dict[str, int] = {}
        self._stamps: dict[str, _Stamp] = {}
        """size and time of change of each file, as it was uploaded last."""
        self._changed = threading.Condition()
        self._num_asked = self._num_done = 0
        self._over = False
        self._unsure: dict[str, bytes] = {}
        """SHA-256 of what was sent last of a file, where no answer came."""
        self._thread = threading.Thread(target=self._upload, daemon=True)

    def open(self) -> None:
        """Makes the folder what the bucket has, and starts the thread.

        Raises: CheckpointError when the bucket or the folder cannot be used.
        """
        try:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
            for name in self._url.files():
                if is_plain(name) and not name.startswith(ELSEWHERE):
                    data, self._generations[name] = (self._url / name).read_at()
                    if name == STEPS:
                        self._steps = data
                        write_steps(self._folder, data, self._url)
                        continue
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
            self._changed.wait_for(lambda: self.has(number) or self._over, seconds)
            return self.has(number)

    def close(self, seconds: float) -> bool:
        """Uploads what has changed, in at most so many seconds, and ends the thread; whether all is
        in the bucket."""
        is_done = self.wait(self.ask(), seconds)
        self._end()
        return is_done

    def _upload(self) -> None:
        num_failed, since = 0, 0.0
        while (number := self._next()) is not None:
            began = time.monotonic()
            try:
                steps = self._upload_changed()
            except FileExistsError as error:
                self._lost(f"{error.filename}: {error.strerror}")
                self._end()
                return
            except Exception as error:  # whatever it was, training is worth more
                since = since or began
                wait = self._waits[min(num_failed, len(self._waits) - 1)]
                num_failed += 1
                taken = duration(time.monotonic() - since)
                what = getattr(error, "filename", None) or self._url
                self._warn(
                    f"{what}: {getattr(error, 'strerror', None) or error}; not uploaded for {taken}"
                    f", trying again in {duration(wait)}; training goes on"
                )
                with self._changed:
                    self._changed.wait_for(lambda: self._over, wait)
                continue
            num_failed, since = 0, 0.0
            with self._changed:
                self._num_done = max(self._num_done, number)
                self._changed.notify_all()
            if steps is not None:
                self._published(steps)

    def _next(self) -> int | None:
        """Waits for something to do: the number of what is asked for; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._num_asked > self._num_done)
            return None if self._over else self._num_asked

    def _end(self) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def _upload_changed(self) -> bytes | None:
        """Returns the steps, if those were not yet in the bucket."""
        steps = packed_steps(self._folder)  # as they are before the files are read
        here = {
            str(path.relative_to(self._folder)): path
            for path in sorted(self._folder.rglob("*"))
            if path.is_file() and not path.name.startswith(".")
        }
        here = {name: path for name, path in here.items() if not name.startswith(_NOT_FILES)}
        for name, path in here.items():
            try:
                stamp, data = _stamp(path), b""
                if stamp != self._stamps.get(name):
                    data = path.read_bytes()
            except FileNotFoundError:  # renamed meanwhile: its new name is uploaded
                continue
            if stamp != self._stamps.get(name):
                self._write(name, data)
                self._stamps[name] = stamp
        for name in self._stamps.keys() - here.keys():
            (self._url / name).unlink()
            del self._stamps[name], self._generations[name]
        if steps == self._steps:
            return None
        self._write(STEPS, steps)
        self._steps = steps
        return steps

    def _write(self, name: str, data: bytes) -> None:
        """Raises: FileExistsError when the object is not as this run left it. One that a request
        wrote whose answer got lost is."""
        path, generation = self._url / name, self._generations.get(name, 0)
        if name in self._unsure:
            found, at = path.read_at()
            generation = at if hashlib.sha256(found).digest() == self._unsure[name] else generation
        try:
            self._generations[name] = path.write_at(data, generation)
            self._unsure.pop(name, None)
        except FileExistsError:
            raise
        except OSError:
            self._unsure[name] = hashlib.sha256(data).digest()
            raise


def packed_steps(working: Path) -> bytes:
    """All small files of the steps of a working folder as they were at one time: a step that is
    renamed meanwhile might be missed under both names."""
    folder = working / STEPS_FOLDER
    seen, texts = None, {}
    while seen is None or seen != texts.keys():
        seen = texts.keys()
        names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*"))]
        kept = [name for name in names if not any(part in name for part in _NOT_STEPS)]
        with suppress(FileNotFoundError):
            texts = {n: (folder / n).read_text() for n in kept if (folder / n).is_file()}
    return json.dumps(texts).encode()


def write_steps(working: Path, packed: bytes, url: Remote) -> None:
    """Makes these the steps of a working folder, of the run at `url`.

    Raises: OSError; ValueError for something else than steps.
    """
    folder = working / STEPS_FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    for path, text in parse_steps(packed, url).items():
        atomic.write(folder / path, text)


def _stamp(path: Path) -> _Stamp:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
