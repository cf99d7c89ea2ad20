"""Files that exist whole or not at all, also when several processes write them; and files that grow
by whole lines.

They survive the death of the process, not a power failure: nothing is synced to the disk.
"""

import contextlib
import errno
import os
import stat
import time
import uuid
from pathlib import Path

from glamcli.storage import Remote

_SECONDS_BETWEEN = 30.0


def write(path: Path, content: str | bytes) -> None:
    """Replaces the file by `content` (text as UTF-8), making its folder if need be.

    Every call first writes under a name of its own, so threads, processes and hosts may write the
    same file at once.

    A link is replaced as well, and what it points to stays: folders from somebody else are written
    to, and nothing outside of them.

    Raises: OSError, also where something is that is neither a regular file nor a link; what was
        there before is then still there, and nothing else.
    """
    data = content.encode() if isinstance(content, str) else content
    if isinstance(path, Remote):
        path.write(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        if not _is_replaceable(path):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        unfinished.write_bytes(data)
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def _is_replaceable(path: Path) -> bool:
    """False for what root could replace and the machine needs: devices, and links like /dev/stdout.

    Raises: FileNotFoundError.
    """
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return not os.readlink(path).startswith("/proc/")
    return stat.S_ISREG(mode)


class Lines:
    """A file that begins with `content`, which replaces what was there, and grows. On a disk it has
    every line when `add` returns. An object in a bucket is written anew, every half minute at most
    and by `flush`.

    Raises: OSError, also from the methods.
    """

    def __init__(self, path: Path, content: bytes):
        self._path, self._content, self._unwritten = path, [content], False
        self._written = time.monotonic()
        write(path, content)

    def add(self, line: bytes) -> None:
        """Adds a line with its end."""
        if not isinstance(self._path, Remote):
            with self._path.open("ab") as file:
                file.write(line)
            return
        self._content.append(line)
        self._unwritten = True
        if time.monotonic() > self._written + _SECONDS_BETWEEN:
            self.flush()

    def flush(self) -> None:
        """Returns when everything is there."""
        if self._unwritten:
            self._written = time.monotonic()
            write(self._path, b"".join(self._content))
            self._unwritten = False
