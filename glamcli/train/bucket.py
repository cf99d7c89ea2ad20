"""A run in a bucket: its lease, its working folder, and where its arrays go.

gs://bucket/run/lock.json            who owns it (`hosts/lease.py`)
                steps.json           the descriptions of its steps (`mirror.py`)
                arrays/ATTEMPT/SAVE-STEP/
                metrics.jsonl, ...   as in a run folder
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from glamcli.data.cache import user_cache_dir
from glamcli.errors import EXIT_PEER_GONE, CheckpointError, name_folder
from glamcli.hosts.lease import Lease
from glamcli.progress import Progress
from glamcli.step_folders import ARRAYS_URL
from glamcli.step_writers import LAST_CHANCE_SECONDS, StepsInBucket
from glamcli.storage import Remote
from glamcli.stored_runs import OWNER, STEPS
from glamcli.train.mirror import Mirror
from glamcli.untrusted import parse_json

RELEASE_SECONDS = 10.0
"""and to giving the run back, without which the next start has to wait."""


@dataclass(frozen=True)
class Bucket:
    """A run in a bucket that this process owns."""

    folder: Path
    """the working folder."""
    arrays: Remote
    """the folder that has one for every attempt, with the arrays of its steps."""
    mirror: Mirror

    def new_steps(self) -> StepsInBucket:
        """Where an attempt saves, after all earlier ones by any clock."""
        urls = (self.folder / "checkpoints").rglob(ARRAYS_URL)
        newest = max((_age(url.read_text())[0] for url in urls), default=0)
        return StepsInBucket(str(self.arrays / f"{max(time.time_ns(), newest + 1)}"), self._publish)

    def _publish(self) -> Callable[[float], bool]:
        number = self.mirror.ask()
        return lambda seconds: self.mirror.wait(number, seconds)


@contextmanager
def owned(url: Remote, progress: Progress) -> Iterator[Bucket]:
    """Raises: CheckpointError when another process owns it, or the bucket cannot be used."""

    def lost(why: str) -> None:
        progress.warn(f"{why}: this process ends, the run goes on there")
        os._exit(EXIT_PEER_GONE)

    folder = user_cache_dir() / "runs" / hashlib.sha256(str(url).encode()).hexdigest()[:16]
    name_folder(str(folder), str(url))
    arrays = url / "arrays"
    lease = Lease(url / OWNER, progress.say, lost)  # pyright: ignore
    mirror = Mirror(url, folder, progress.warn, lost, lambda steps: _collect(arrays, steps))
    try:
        mirror.open()
        yield Bucket(folder, arrays, mirror)
    finally:
        mirror.close(LAST_CHANCE_SECONDS)
        lease.release(RELEASE_SECONDS)


def move_run_aside(url: Remote, progress: Progress) -> Remote | None:
    """Moves an earlier run to `<run>.1`, `<run>.2`, ...; None where there is none. The server
    copies all objects, the list of steps last; then it deletes them, those the list needs last.

    Raises: CheckpointError when it is in use, or cannot be moved.
    """
    try:
        if not any(name != OWNER for name in url.files()):
            return None
        lease = Lease(url / OWNER, progress.say, progress.warn)  # pyright: ignore
        try:
            number = 1
            while (target := url.with_name(f"{url.name}.{number}")).files():
                number += 1
            names = [name for name in url.files() if name != OWNER]
            arrays = [name for name in names if name.startswith("arrays/")]
            plain = [name for name in names if name != STEPS and name not in arrays]
            steps = [STEPS] if STEPS in names else []
            for some in filter(None, (arrays, plain, steps)):
                url.copy(some, target)
            for some in filter(None, (plain, steps, arrays)):
                url.remove(some)
        finally:
            lease.release(RELEASE_SECONDS)
    except OSError as error:
        raise CheckpointError(f"cannot move {url}: {error.filename}: {error.strerror}") from error
    return target


def _collect(arrays: Remote, steps: bytes) -> None:
    """Deletes the arrays that no step names, but for those that may be being saved: they are newer
    than all that are named."""
    with suppress(OSError, ValueError):  # the next save tries again
        texts = parse_json(steps)
        named = {text for name, text in texts.items() if name.endswith(ARRAYS_URL)}
        newest = max(map(_age, named), default=(0, 0))
        for place in map(str, arrays.folders(2)):
            if place not in named and _age(place) < newest:
                Remote(place).delete()


def _age(url: str) -> tuple[int, int]:
    """A number of the attempt that saved these arrays and of the save: greater ones are newer."""
    attempt, save = url.split("/")[-2:]
    return int(attempt), int(save.split("-")[0])
