"""A path is on a local disk or behind a URL; the one door to the second kind, which is fsspec.

`place` gives a `Path` for a local path, and for a URL a `Remote`: an object in a bucket or on a web
server, by any scheme that fsspec knows. `untrusted.read_file` and `atomic.write` take both, and so
does everything that reads and writes through them. An object appears whole or not at all.

Local paths never come near this module's libraries, which are imported at the first use of a URL.
"""

from __future__ import annotations

import errno
import logging
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, cast

from glamcli import conditional
from glamcli.conditional import ABSENT
from glamcli.errors import RecipeError, redacted

EXTRA = "pip install 'glamcli[remote]'"
_ROOT = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")
_PATTERN = re.compile(r"[*?\[]")
_BLOCK_BYTES = 1 << 22
REQUEST_SECONDS = 30.0  # in which a store begins to answer, and goes on with it


def is_url(text: object) -> bool:
    """Whether a text or path is a URL."""
    return _ROOT.match(str(text)) is not None and "://" in str(text)


def place(text: str) -> Path:
    """What a text means: a local path, or the `Remote` of a URL. That is no `Path`, and has those
    methods of one that are asked of files which may be behind a URL.

    Raises: RecipeError for a URL that does not end in a path, or in one that would be changed.
    """
    if not is_url(text):
        return Path(text)
    scheme, rest = text.split("://", 1)
    if scheme.lower() == "file" and rest.startswith("/"):
        return Path(rest)
    if scheme.lower() == "file" or re.search(r"[?#]|//|^/|^$", rest):
        hint = "write SCHEME://SERVER/PATH without `?`, `#` and `//` in it, or file:///PATH"
        raise RecipeError(f"not the URL of a file: `{redacted(text)}`", hint)
    return cast(Path, Remote(text))


def file_system(url: str, **options: Any) -> tuple[Any, str]:
    """The file system of fsspec for a URL or local path, and the path there.

    Raises: ImportError when a package is missing that the scheme needs; ValueError for an unknown
        scheme.
    """
    import fsspec

    prepare_libraries()
    return fsspec.core.url_to_fs(url, **options)


def prepare_libraries() -> None:
    """Call it before another library, as orbax, makes itself a file system of fsspec."""
    # Else gcsfs asks, with other credentials and a library of its own, what kind of bucket it is,
    # for renames of folders, which are not used here.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # failures are raised as well
    # Unlike Amazon's own tools, its library for Python knows one name of this.
    if region := os.environ.get("AWS_REGION"):
        os.environ.setdefault("AWS_DEFAULT_REGION", region)


def local_copy(url: str) -> str:
    """The path of a copy of a remote file, which lasts as long as this process."""
    import fsspec

    return str(fsspec.open_local(f"simplecache::{url}"))


class Listed(NamedTuple):
    """What a listing says of an object."""

    version: str
    """changes with its content."""
    num_bytes: int
    unix_seconds: float
    """when it was written, by the server's clock; 0 where the server does not say."""

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Listed:
        """An entry of fsspec, whose file systems have names of their own for these."""
        written = entry.get("mtime") or entry.get("LastModified")
        seconds = written.timestamp() if isinstance(written, datetime) else 0.0
        num_bytes = int(entry.get("size") or 0)
        version = entry.get("generation") or entry.get("ETag") or f"{num_bytes} {seconds}"
        return cls(str(version), num_bytes, seconds)


class Remote(PurePosixPath):
    """A file or folder behind a URL. Methods that ask the server raise OSError with the reason in
    words, FileNotFoundError and PermissionError where it is that."""

    def __str__(self) -> str:
        return _ROOT.sub(r"\1://", super().__str__(), count=1)

    def __fspath__(self) -> str:
        return str(self)

    def absolute(self) -> Remote:
        return self

    def resolve(self) -> Remote:
        """Without `..`, which servers do not know."""
        return Remote(posixpath.normpath(super().__str__()))

    def exists(self) -> bool:
        with self._asking() as (fs, path):
            return bool(fs.exists(path))

    def is_file(self) -> bool:
        """False also where the server does not say, as of a local path that cannot be looked at."""
        with suppress(OSError), self._asking() as (fs, path):
            return bool(fs.isfile(path))
        return False

    def read(self, max_bytes: int) -> bytes:
        """As it was at one time. Raises: OSError, also when it is larger than `max_bytes`."""
        with self._asking() as (fs, path):
            while True:
                with fs.open(path, "rb") as file:  # as large as it is now, and read in parts
                    version, data = Listed.of(file.details).version, file.read(max_bytes + 1)
                if path.startswith("http") or Listed.of(fs.info(path)).version == version:
                    break  # on the web, each answer may name another version
        if len(data) > max_bytes:
            raise OSError(errno.EFBIG, f"larger than {max_bytes:,} bytes", str(self))
        return data

    def reading(self) -> IO[bytes]:
        """For reading from the start, a block at a time."""
        with self._asking() as (fs, path):
            return fs.open(path, "rb")

    def write(self, data: bytes) -> None:
        """Replaces the object as a whole, or leaves the one that is there."""
        with self._asking() as (fs, path):
            fs.pipe_file(path, data)

    def upload(self, file: Path) -> None:
        """Replaces the object by a local file, as a whole, or leaves the one that is there."""
        with self._asking() as (fs, path):
            fs.put_file(str(file), path)

    def blocks(self) -> Iterator[bytes]:
        """The content of an object, some megabytes at a time."""
        with self.reading() as file:
            while True:
                with self._asking():
                    block = file.read(_BLOCK_BYTES)
                if not block:
                    return
                yield block

    def files(self) -> list[str]:
        """Names of all objects below this one, relative to it."""
        return sorted(self.tree())

    def listed(self) -> dict[str, Listed]:
        """The objects directly below this one by name, as one request for each thousand of them and
        folders has them."""
        with self._asking() as (fs, path):
            found = {entry["name"]: entry for entry in fs.ls(path, detail=True)}
        objects = (each for each in found.values() if each["type"] == "file")
        return {posixpath.basename(each["name"]): Listed.of(each) for each in objects}

    def tree(self) -> dict[str, Listed]:
        """The same of all objects below this one, relative to it."""
        with self._asking() as (fs, path):
            found = fs.find(path, detail=True)
        return {name.removeprefix(f"{path}/"): Listed.of(each) for name, each in found.items()}

    def read_from(self, start: int) -> bytes:
        """The content of an object from a byte on that it has, in one request."""
        with self._asking() as (fs, path):
            return fs.cat_file(path, start=start or None)

    def folders(self, depth: int) -> list[Remote]:
        """Folders so many levels below this one."""
        with suppress(FileNotFoundError), self._asking() as (fs, path):
            level = [path]
            for _ in range(depth):
                found = [entry for each in level for entry in fs.ls(each, detail=True)]
                level = sorted({each["name"] for each in found if each["type"] == "directory"})
            return [Remote(fs.unstrip_protocol(each)) for each in level]
        return []

    def delete(self) -> None:
        """Deletes all objects below this one."""
        self.remove(self.files())

    def copy(self, names: list[str], target: Remote) -> None:
        """Copies these objects below this one; within a store the server does it."""
        with self._asking() as (fs, path):
            there = file_system(str(target))[1]
            fs.copy([f"{path}/{name}" for name in names], [f"{there}/{name}" for name in names])

    def remove(self, names: list[str]) -> None:
        """Deletes these objects below this one."""
        with self._asking() as (fs, path):
            paths = {f"{path}/{name}" for name in names}
            patterns = {each for each in paths if _PATTERN.search(each)}  # as fsspec takes them
            if paths - patterns:
                fs.rm(sorted(paths - patterns))
            for each in patterns:
                fs.rm_file(each)

    def unlink(self, missing_ok: bool = True) -> None:
        """Deletes the object; there need be none, whatever is asked for."""
        del missing_ok
        with suppress(FileNotFoundError), self._asking() as (fs, path):
            fs.rm_file(path)

    def read_at(self, seconds: float | None = None) -> tuple[bytes, str]:
        """The content of an object and its version, which every write of another content changes;
        nothing and `ABSENT` when there is none. In so many seconds, or it has failed."""
        with suppress(FileNotFoundError), self._asking() as (fs, path):
            return conditional.fetch(fs, path, seconds)
        return b"", ABSENT

    def write_at(self, data: bytes, version: str, seconds: float | None = None) -> str:
        """Replaces an object if it is at this version (`ABSENT`: if there is none); the new one.
        `data` must be unlike all that others write: when an answer gets lost, it is how a write is
        known to have been ours. In so many seconds, or it has failed.

        Raises: FileExistsError when it is not at this version.
        """
        with self._asking() as (fs, path):
            seconds = seconds or 6 * REQUEST_SECONDS + len(data) / 1e5
            try:
                return conditional.replace(fs, path, data, version, seconds)
            except FileExistsError:
                found, at = self.read_at(seconds)
                if found == data:
                    return at
                raise

    @contextmanager
    def _asking(self) -> Iterator[tuple[Any, str]]:
        try:
            # Others write to the same bucket: what it held a minute ago is no answer.
            fs, path = file_system(str(self), use_listings_cache=False, **_limits(str(self)))
            if str(self).startswith("s3://"):
                fs.retries = 1  # of its own, each of which would be all of those in `_limits`
            yield fs, path
        except Exception as error:
            raise in_words(error, str(self)) from error


def _limits(url: str) -> dict[str, Any]:
    """Of buckets: gcsfs has none, and s3fs asks 25 times. Other file systems have their own."""
    seconds = REQUEST_SECONDS
    if url.startswith("s3://"):
        limits = {"connect_timeout": seconds, "read_timeout": seconds}
        retries = {"mode": "standard", "total_max_attempts": 6}
        return {"config_kwargs": {**limits, "retries": retries}}
    if not url.startswith(("gs://", "gcs://")):
        return {}
    from aiohttp import ClientTimeout

    return {"requests_timeout": ClientTimeout(sock_connect=seconds, sock_read=seconds)}


def in_words(error: Exception, url: str) -> OSError:
    """The OSError for what a library of fsspec raised; each has exceptions of its own."""
    is_web = url.startswith("http")
    if is_web and isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # what any error of a web server is made of
    code = getattr(error, "status", None) or getattr(error, "code", None)
    reason = str(error).strip().split("\n")[0][:240] or type(error).__name__
    if isinstance(error, FileNotFoundError) or code == 404:
        return FileNotFoundError(errno.ENOENT, "there is no such object or bucket", url)
    if isinstance(error, FileExistsError):
        return FileExistsError(errno.EEXIST, "it was written by another process", url)
    if isinstance(error, ImportError):
        return OSError(errno.ENOPKG, f"a package is missing: {EXTRA}", url)
    if isinstance(error, PermissionError) or code in (401, 403) or reason.startswith("Forbidden"):
        return PermissionError(errno.EACCES, f"no permission: {reason}", url)
    return OSError(errno.EIO, f"no answer, or none that helps: {reason}", url)
