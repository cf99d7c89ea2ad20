"""Entries of the cache that machines share behind a URL, `data.cache_dir`: made once, and copied to
each machine's own cache folder, where they are read.

    CACHE/rows/<source>-<key>/complete.json    names, sizes and digests of the files in
                              <random>/        which are there before it

So an entry is there whole or not at all. Who makes the same at the same time writes into another
folder, and either's `complete.json` may stay. What a kill leaves there is never read.
"""

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from glamcli.data.rows import file_sha256
from glamcli.errors import DataError
from glamcli.progress import Progress
from glamcli.storage import Remote, is_url
from glamcli.untrusted import parse_as

_COMPLETE = "complete.json"
_MAX_BYTES = 1 << 26


@dataclass(frozen=True)
class _Entry:
    folder: str
    files: dict[str, tuple[int, str]]
    """size and SHA-256 by name."""


def copy_entry(entry: Remote | None, folder: Path, progress: Progress) -> bool:
    """Makes a folder of the files of an entry, whole or not at all; False when there is none.

    Raises: DataError when it cannot be read, or is not as it was written; OSError when the folder
        cannot be written.
    """
    if entry is None or (found := _described(entry)) is None:
        return False
    unfinished = folder.with_name(f".{folder.name}.copy")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    total = sum(size for size, _ in found.files.values()) >> 10
    with progress.phase(f"copying {folder.name} from {entry.parent}", total, "KB") as phase:
        for name, (size, sha256) in found.files.items():
            if _copy(entry / found.folder / name, unfinished / name) != sha256:
                raise _damaged(entry, f"{name} is not as it was written")
            phase.advance(size >> 10)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return True


def share_entry(
    entry: Remote,
    files: Sequence[Path],
    progress: Progress,
    verify: Callable[[], object] = lambda: None,
) -> None:
    """Puts the files, after `verify`, there as an entry, unless there is one. Others can make it
    for themselves, so a failure costs a warning.

    Raises: OSError when a file cannot be read; what `verify` raises.
    """
    try:
        if _described(entry) is not None:
            return
    except DataError as error:
        progress.warn(error.what)
        return
    verify()
    place = entry / uuid.uuid4().hex[:12]
    sizes = [file.stat().st_size for file in files]
    digests = [file_sha256(file) for file in files]
    listed = {file.name: about for file, *about in zip(files, sizes, digests, strict=True)}
    try:
        with progress.phase(f"copying to {entry}", sum(sizes) >> 10, "KB") as phase:
            for file, size in zip(files, sizes, strict=True):
                (place / file.name).upload(file)
                phase.advance(size >> 10)
        if (entry / _COMPLETE).exists():
            place.delete()
        else:
            content = {"folder": place.name, "files": listed}
            (entry / _COMPLETE).write(json.dumps(content).encode())
    except OSError as error:
        progress.warn(f"{error.filename}: {error.strerror}; other machines make it again")


def _described(entry: Remote) -> _Entry | None:
    path = entry / _COMPLETE
    try:
        found = parse_as(_Entry, path.read(_MAX_BYTES))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise _damaged(entry, f"{_COMPLETE} cannot be read ({error})") from error
    for name in (found.folder, *found.files):
        if "/" in name or name in ("", ".", ".."):
            raise _damaged(entry, f"{_COMPLETE} names `{name}`, which is elsewhere")
    return found


def _copy(source: Remote, target: Path) -> str:
    """The SHA-256 of what was copied."""
    digest = hashlib.sha256()
    try:
        with target.open("wb") as file:
            for block in source.blocks():
                digest.update(block)
                file.write(block)
    except OSError as error:
        if is_url(error.filename):
            raise DataError(f"{source}: {error.strerror}") from error
        raise
    return digest.hexdigest()


def _damaged(entry: Remote, what: str) -> DataError:
    return DataError(f"{entry}: {what}", "delete what is there; the next run prepares it again")
