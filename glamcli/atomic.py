"""Files that exist whole or not at all, also when several processes write them.

They survive the death of the process, not a power failure: nothing is synced to the disk.
"""

import contextlib
import errno
import os
import stat
import uuid
from pathlib import Path

from glamcli.storage import Remote


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
        mode = path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):  # root could replace a device
            raise OSError(errno.EINVAL, "not a regular file", str(path))
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        unfinished.write_bytes(data)
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise
