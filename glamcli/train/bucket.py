"""A run in a bucket: its lease, its working folder, and where its arrays go.

URL of the run/lock.json             who owns it (`hosts/lease.py`)
               steps.json            the descriptions of its steps (`mirror.py`)
               arrays/ATTEMPT/SAVE-STEP/
               metrics.jsonl, ...    as in a run folder
"""

import functools
import json
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from glamcli import s3
from glamcli.data.cache import ANOTHER_CACHE, json_digest, user_cache_dir
from glamcli.errors import EXIT_PEER_GONE, CheckpointError, RecipeError, name_folder
from glamcli.hosts.join import ALONE, Host
from glamcli.hosts.lease import Lease
from glamcli.hosts.lock import ANOTHER_RUN, NAME, hold
from glamcli.progress import Progress
from glamcli.step_folders import ARRAYS_URL
from glamcli.step_writers import LAST_CHANCE_SECONDS, StepsInBucket
from glamcli.storage import Remote
from glamcli.stored_runs import MOVED, OWNER, STEPS
from glamcli.train.mirror import Mirror
from glamcli.train.working_folder import objects_of_run, packed_steps, write_steps
from glamcli.untrusted import parse_as, parse_json

_ARRAYS = "arrays"
"""the folder that has one for every attempt, with the arrays of its steps."""
_PATTERN = re.compile(r"[*?\[\]\\]")
_DELETED_AT_ONCE = 500
"""objects, before it is looked again whether the run is still held."""
RELEASE_SECONDS = 10.0
"""what an ending run gives to giving it back, without which the next start has to wait."""


@dataclass(frozen=True)
class Bucket:
    """A run in a bucket that this process owns; or the first one, of several."""

    url: Remote
    folder: Path
    """the working folder, which no other process sees."""
    mirror: Mirror | None
    """in the process that owns the run."""

    def uploaded(self, seconds: float) -> bool:
        """Whether all that is written by now is in the bucket after so many seconds at most."""
        return self.mirror is None or self.mirror.wait(self.mirror.ask(), seconds)

    def new_steps(self, host: Host) -> StepsInBucket:
        """Where an attempt saves, after all earlier ones by any clock.

        By then other processes have the steps of the first one; from itself, because the bucket may
        be behind.

        Raises: CheckpointError when one of them cannot write its working folder.
        """
        steps = packed_steps(self.folder).decode() if host.is_first else ""
        steps = host.of_first("steps", steps)
        if not host.is_first:
            try:
                write_steps(self.folder, steps.encode(), self.url)
            except OSError as error:
                what = f"the working folder {self.folder} cannot be written: {error.strerror}"
                raise CheckpointError(what) from error
        urls = (self.folder / "checkpoints").rglob(ARRAYS_URL)
        newest = max((_age(url.read_text())[0] for url in urls), default=0)
        attempt = host.of_first("attempt", max(time.time_ns(), newest + 1))
        return StepsInBucket(str(self.url / _ARRAYS / f"{attempt}"), self._publish)

    def _publish(self) -> Callable[[float], bool]:
        if (mirror := self.mirror) is None:
            return lambda seconds: True
        number = mirror.ask()
        return lambda seconds: mirror.wait_while_it_works(number, seconds)


@contextmanager
def owned(
    url: Remote, progress: Progress, host: Host = ALONE, hint: str = ANOTHER_RUN
) -> Iterator[Bucket]:
    """Takes the run, in the first process; the others wait for it when they next hear of it. `hint`
    says what to do when another process owns it.

    Raises: CheckpointError when another process owns it, or the bucket cannot be used; RecipeError
        for a URL that libraries take for a pattern of names.
    """
    if found := _PATTERN.search(str(url)):
        what = f"no run can be at {url}: libraries take `{found[0]}` in a URL for a pattern"
        raise RecipeError(what, hint="give another URL with `--run`")
    if str(url).startswith(s3.SCHEME):
        s3.options()  # what is wrong with them is said now, and not at the first save
    mirror = None
    held, closing = ExitStack(), threading.Lock()

    def lost(why: str) -> None:
        host.last = lambda: None  # nothing may be written any more
        progress.warn(f"{why}: this process ends, the run goes on there")
        host.end_all(why, EXIT_PEER_GONE)

    def close() -> None:
        with closing:  # a thread that ends this process waits for the one that is at it
            held.close()

    host.last = close
    try:
        folder = held.enter_context(_working_folder(url))
        if host.is_first:
            lease = Lease(url / OWNER, progress.say, lost, hint)  # pyright: ignore
            collect = functools.partial(_collect, url / _ARRAYS)
            mirror = Mirror(url, folder, lease.holds, progress.warn, lost, collect)
            held.callback(_close, mirror, lease, progress, url)
            mirror.open()
        yield Bucket(url, folder, mirror)
    finally:
        close()
        host.last = lambda: None


@contextmanager
def _working_folder(url: Remote) -> Iterator[Path]:
    """One that no other process has, not even one that owned the run and does not know yet that it
    has lost it. Those of processes that ended are deleted.

    Raises: CheckpointError when it cannot be made.
    """
    folders = user_cache_dir() / "runs" / json_digest(str(url))[:16]
    folder = folders / uuid.uuid4().hex[:12]
    try:
        folders.mkdir(parents=True, exist_ok=True)
        with hold(folders / NAME, lambda holder: None):
            for path in folders.glob("*/"):
                with suppress(_InUse), hold(path / NAME, _refuse):
                    shutil.rmtree(path, ignore_errors=True)
            folder.mkdir()
            held = hold(folder / NAME, _refuse)
    except OSError as error:
        what = f"the working folder {folder} cannot be made: {error.strerror or error}"
        raise CheckpointError(what, ANOTHER_CACHE) from error
    name_folder(str(folder), str(url))
    with held:
        yield folder


class _InUse(Exception):
    pass


def _refuse(holder: str) -> None:
    raise _InUse


def _close(mirror: Mirror, lease: Lease, progress: Progress, url: Remote) -> None:
    if not mirror.close(LAST_CHANCE_SECONDS):
        progress.warn(f"not all files of {url} could be uploaded; a start goes on from what it has")
    mirror.after_end(lambda: lease.release(RELEASE_SECONDS))


def move_run_aside(url: Remote, progress: Progress) -> Remote | None:
    """Moves an earlier run to `<run>.1`, `<run>.2`, ...; None where there is none. The server
    copies all objects, the list of steps last; then it deletes them, those the list needs last.

    Raises: CheckpointError when it is in use, or cannot be moved.
    """
    try:
        if not any(name != OWNER for name in objects_of_run(url)):
            return None
        lease = Lease(url / OWNER, progress.say, lambda why: None)  # pyright: ignore
        try:
            return _move(url, lease)
        finally:
            lease.release(RELEASE_SECONDS)
    except OSError as error:
        raise CheckpointError(f"cannot move {url}: {error.filename}: {error.strerror}") from error


def _move(url: Remote, lease: Lease) -> Remote:
    """Where it is then. One that was killed when all was copied is only brought to its end.

    Raises: CheckpointError when another process takes the run meanwhile: what it needs stays.
    """
    steps, version = (url / STEPS).read_at()
    names = [name for name in objects_of_run(url) if name not in (OWNER, STEPS)]
    arrays = [name for name in names if name.startswith(f"{_ARRAYS}/")]
    plain = [name for name in names if name not in arrays]
    if (target := _moved(steps)) is None:
        number = 1
        while (target := url.with_name(f"{url.name}.{number}")).files():
            number += 1
        for some in filter(None, (arrays, plain)):
            url.copy(some, target)
        if steps:
            (target / STEPS).write(steps)
            # An owner writes the steps when it takes the run (`Mirror.open`): then this fails.
            (url / STEPS).write_at(json.dumps({MOVED: str(target)}).encode(), version)
    names = [*plain, *arrays, *([STEPS] if steps else [])]
    for first in range(0, len(names), _DELETED_AT_ONCE):
        if not lease.holds():
            what = f"{url} was taken by another process: it is copied to {target}, and not deleted"
            raise CheckpointError(what, hint="choose another folder with `--run`")
        url.remove(names[first : first + _DELETED_AT_ONCE])
    return target


def _moved(steps: bytes) -> Remote | None:
    """Where all of a run with these steps was copied to, and still is."""
    with suppress(ValueError, KeyError):
        target = Remote(parse_as(dict[str, str], steps)[MOVED])
        return target if (target / STEPS).exists() else None
    return None


def _collect(arrays: Remote, steps: bytes) -> Iterator[None]:
    """Deletes the arrays that no step names, but for those that may be being saved: they are newer
    than all that are named. Stops before each."""
    with suppress(OSError, ValueError):  # the next save tries again
        texts = parse_json(steps)
        named = {text for name, text in texts.items() if name.endswith(ARRAYS_URL)}
        newest = max(map(_age, named), default=(0, 0))
        for place in map(str, arrays.folders(2)):
            if place not in named and _age(place) < newest:
                yield
                Remote(place).delete()


def _age(url: str) -> tuple[int, int]:
    """A number of the attempt that saved these arrays and of the save: greater ones are newer."""
    attempt, save = url.split("/")[-2:]
    return int(attempt), int(save.split("-")[0])
