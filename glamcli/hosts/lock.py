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
from glamcli.untrusted import open_regular

NAME = ".lock"
ANOTHER_RUN = "choose another folder with `--run`"
"""what to do when a run is in use, for who would start one."""
_HOLDER = re.compile(r"process (?P<process>\d+) on (?P<host>[\w.-]+)")


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


def holder(folder: Path) -> str | None:
    """The process that holds a run folder, such as `process 12 on its-machine`; None where none
    does that this machine can see."""
    try:
        with open_regular(folder / NAME) as file:
            text = file.read(300).decode(errors="replace")
            named = _HOLDER.fullmatch(text)
            # Where its process is gone, nothing holds it: a run that starts just then must not find
            # it held by this look.
            if named is None or not _is_gone(named["host"], int(named["process"])):
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return text if named else "another process"
    except OSError:
        pass
    return None


def _is_gone(host: str, process: int) -> bool:
    try:
        return host == socket.gethostname() and os.kill(process, 0) is not None
    except PermissionError:
        return False
    except (OSError, OverflowError):
        return True


@contextmanager
def locked(folder: Path, hint: str = ANOTHER_RUN) -> Iterator[None]:
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
