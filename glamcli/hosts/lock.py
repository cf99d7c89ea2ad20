"""One process per run folder: who holds it, and whether that process is still alive.

The lock is a small file that names host and process. A process that was killed leaves it behind;
the next run on the same host takes it over once the kernel says that process is gone.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glamcli.errors import CheckpointError

NAME = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[Callable[[], None]]:
    """Holds `folder` for this process; yields what lets go of it at once.

    Raises: CheckpointError when another living process holds it or the folder cannot be written.
    """
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _exchange(path, lambda holder: _take(folder, holder, mine))
    except OSError as error:
        raise CheckpointError(
            f"cannot write to the run folder {folder}: {error.strerror or error}",
            hint="name another folder with `--run`",
        ) from error

    def release() -> None:
        _exchange(path, lambda holder: {} if holder == mine else holder)

    try:
        yield release
    finally:
        release()


def _take(folder: Path, holder: dict[str, Any], mine: dict[str, Any]) -> dict[str, Any]:
    if holder and not (holder.get("host") == mine["host"] and _is_dead(holder)):
        raise CheckpointError(
            f"run folder {folder} is in use by process {holder.get('pid')} on {holder.get('host')}",
            hint="choose another folder with `--run`"
            if holder.get("host") == mine["host"]
            else f"if that process has ended, delete {folder / NAME}",
        )
    return mine


def _exchange(path: Path, decide: Any) -> None:
    """Replaces the holder by `decide(holder)`; two processes never do this at once."""
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            holder = json.loads(file.read() or "{}")
        except ValueError:
            holder = {}  # written by a process killed half way: it never started
        new = decide(holder)
        file.seek(0)
        file.truncate()
        # Emptied, never deleted: somebody may be waiting with the file open.
        file.write(json.dumps(new) if new else "")


def _is_dead(holder: dict[str, Any]) -> bool:
    pid = holder.get("pid")
    if not isinstance(pid, int):
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    # The number may have been given to another process since.
    return _started(pid) != holder.get("started")


def _started(pid: int) -> str | None:
    """When a process started, in the kernel's words; None where the kernel does not say."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state == "Z" else rest[18]
