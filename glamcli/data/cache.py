"""The cache folder as a person meets it when it cannot be written."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from glamcli.errors import DataError

# A full disk; these errors come without the name of a file.
_DISK = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def writing_cache(cache: Path) -> Iterator[None]:
    """Tells what keeps the cache folder from being written.

    Raises: DataError in place of an OSError that is about a file of the cache or a full disk.
    """
    try:
        yield
    except OSError as error:
        # pathlib names the file; a folder above the cache may be what is in the way.
        place = Path(error.filename) if isinstance(error.filename, str | os.PathLike) else None
        related = place is not None and (place.is_relative_to(cache) or cache.is_relative_to(place))
        if not related and error.errno not in _DISK:
            raise
        raise DataError(
            f"the cache folder {cache} cannot be written: {error.strerror or error}",
            hint="name another with `data.cache_dir` or the environment variable XDG_CACHE_HOME",
        ) from error
