"""A file that one process at a time holds: the kernel releases it when its holder ends, however.

The file stays where it is: another process may be waiting with it open. Where a file system keeps
`flock` to one machine (gcsfuse, Lustre with `localflock`), processes of two machines do not see
each other.
"""

import fcntl
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from glamcli.errors import CheckpointError

NAME = ".lock"
_HOLDER = re.compile(r"process \d+ on [\w.-]+")


def hold(path: Path, occupied: Callable[[str], object]) -> IO[str]:
    """Waits for the file at `path` and holds it until what is returned is closed.

    `occupied` is called first, with `process 12 on its-machine`, if another process holds it; it
    may raise instead of waiting.
    """
    file = path.open("a+", encoding="utf-8", errors="replace")
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            text = file.read(300)
            occupied(text if _HOLDER.fullmatch(text) else "another process")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    except BaseException:
        file.close()
        raise
    return file


@contextmanager
def locked(folder: Path, hint: str = "choose another folder with `--run`") -> Iterator[None]:
    """Holds a run folder, which is made if need be, for this process; `hint` says what to do when
    that fails.

    Raises: CheckpointError when another process holds it or the folder cannot be written.
    """

    def refuse(holder: str) -> None:
        raise CheckpointError(
            f"run folder {folder} is in use by {holder}",
            hint=hint,
        )

    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = hold(folder / NAME, refuse)
    except OSError as error:
        raise CheckpointError(
            f"cannot write to the run folder {folder}: {error.strerror or error}",
            hint=hint,
        ) from error
    with file:
        yield
