"""A run in a bucket: its lease, its working folder, and where its arrays go.

gs://bucket/run/lock.json            who owns it (`hosts/lease.py`)
                steps.json           the descriptions of its steps (`mirror.py`)
                arrays/<start>/<step>/state
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
from glamcli.errors import EXIT_PEER_GONE, name_folder
from glamcli.hosts.lease import Lease
from glamcli.progress import Progress
from glamcli.step_folders import ARRAYS_URL
from glamcli.storage import Remote
from glamcli.train.mirror import Mirror
from glamcli.untrusted import parse_json

LAST_CHANCE_SECONDS = 60.0
"""what an ending run gives to its last uploads."""


@dataclass(frozen=True)
class Bucket:
    """A run in a bucket that this process owns."""

    folder: Path
    """the working folder."""
    arrays: Remote
    """the folder that has one for every attempt, with the arrays of its steps."""
    mirror: Mirror

    def new_arrays(self) -> str:
        """URL of a folder for the arrays of an attempt; those of earlier ones stay as they are."""
        return str(self.arrays / f"{time.time_ns()}")

    def publish(self) -> Callable[[float], bool]:
        """Asks for an upload of all that is written; tells, in so many seconds, if it is done."""
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
    arrays, began = url / "arrays", time.time_ns()
    lease = Lease(url / "lock.json", progress.say, lost)  # pyright: ignore
    mirror = Mirror(url, folder, progress.warn, lost, lambda steps: _collect(arrays, began, steps))
    try:
        mirror.open()
        yield Bucket(folder, arrays, mirror)
    finally:
        mirror.close(LAST_CHANCE_SECONDS)
        lease.release()


def _collect(arrays: Remote, began: int, steps: bytes) -> None:
    """Deletes the arrays of steps that are no longer named, but for one that may be being saved: of
    the newest attempt since this process began, and newer than all of its steps that are named."""
    texts = parse_json(steps)
    named = {text for name, text in texts.items() if name.endswith(ARRAYS_URL)}
    with suppress(OSError):
        places = [place for place in arrays.folders(2) if place.name.isdecimal()]
        newest = max((int(place.parent.name) for place in places), default=0)
        for place in places:
            attempt = int(place.parent.name)
            done = [int(Remote(t).parent.name) for t in named if f"/{attempt}/" in t]
            is_new = attempt == newest > began and int(place.name) > max(done, default=-1)
            if f"{place}/state" not in named and not is_new:
                place.delete()
