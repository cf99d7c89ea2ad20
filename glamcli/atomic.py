"""Files that are there whole or not at all, whoever else writes them at the same time."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path


def write(path: Path, content: str | bytes) -> None:
    """Puts `content` (text as UTF-8) in place of the file, making its folder if need be.

    Every call writes under a name of its own first: threads, processes and hosts that share a
    folder may all write the same file, and each leaves a whole one.

    Raises: OSError; what was there before is then still there, and nothing else.
    """
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        unfinished.write_bytes(data)
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise
