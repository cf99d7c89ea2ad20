"""Files of a source: found by path, glob or folder, local or remote, unpacked while reading."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import fsspec
import zstandard

from glamcli.errors import DataError

# Larger files are not hashed whole: see `content_hash`.
HASHED_WHOLE_BYTES = 64 << 20
SAMPLE_BYTES = 64 << 10
NUM_SAMPLES = 64


@dataclass(frozen=True)
class File:
    """One file of a source, found but not yet read."""

    url: str
    name: str
    num_bytes: int
    changed: str
    """modification time or entity tag, as far as the file system tells"""
    fs: Any

    def open(self) -> BinaryIO:
        return cast(BinaryIO, self.fs.open(self.url, "rb"))

    @property
    def is_local(self) -> bool:
        return self.fs.protocol == "file" or "file" in self.fs.protocol


def find_files(pattern: str, belongs: Callable[[str], bool], name: str) -> list[File]:
    """Files matching a path, glob or folder (there: those that `belongs`), sorted by path.

    Raises: DataError when there is none, or one file in two ways.
    """
    try:
        fs, root = fsspec.core.url_to_fs(pattern)
        if any(mark in root for mark in "*?[") and not fs.exists(root):
            paths = [path for path in fs.glob(root) if not fs.isdir(path)]
        elif fs.isdir(root):
            paths = [path for path in fs.find(root) if belongs(_base(path))]
        else:
            paths = [root] if fs.exists(root) else []
        found = [describe(fs, str(path), _base(str(path))) for path in sorted(paths)]
    except (OSError, ImportError, ValueError) as error:
        # fsspec names the package that it misses; the extra has those of all promised addresses.
        hint = "pip install 'glamcli[remote]'" if isinstance(error, ImportError) else None
        raise DataError(f"source `{name}`: cannot read `{pattern}`: {error}", hint) from error
    if not found:
        raise DataError(f"source `{name}`: no file matches `{pattern}`")
    _refuse_same_file(found, name)
    return found


def _base(path: str) -> str:
    """The name of a file; the query of a web address is no part of it, and may be a secret."""
    if path.startswith(("http://", "https://")):
        path = path.partition("?")[0]
    return os.path.basename(path)


def describe(fs: Any, path: str, name: str) -> File:
    info = fs.info(path)
    changed = next((info[key] for key in ("mtime", "ETag", "etag", "md5Hash") if key in info), "")
    return File(path, name, int(info["size"] or 0), str(changed), fs)


def local(path: str, name: str) -> File:
    return describe(fsspec.filesystem("file"), path, name)


def _refuse_same_file(found: list[File], name: str) -> None:
    """Links to a file already listed; `prepare` warns of copies, whose hashes it has anyway."""
    seen: dict[tuple[int, int], str] = {}
    for file in found:
        if file.is_local:
            stat = os.stat(file.url)
            other = seen.setdefault((stat.st_dev, stat.st_ino), file.url)
            if other != file.url:
                raise DataError(
                    f"source `{name}`: the same file is listed twice: `{other}` and `{file.url}`"
                )


@functools.lru_cache(maxsize=1 << 16)
def content_hash(file: File) -> str:
    """SHA-256 of a file of up to 64 MiB; of a larger one, of size, modification mark and samples.

    So a changed small file is always noticed, and a large one unless somebody edits it between
    the samples and also restores its modification time.
    """
    try:
        with file.open() as stream:
            if file.num_bytes <= HASHED_WHOLE_BYTES:
                return hashlib.sha256(stream.read()).hexdigest()
            digest = hashlib.sha256(f"{file.num_bytes} {file.changed}".encode())
            for i in range(NUM_SAMPLES):
                stream.seek((file.num_bytes - SAMPLE_BYTES) * i // (NUM_SAMPLES - 1))
                digest.update(stream.read(SAMPLE_BYTES))
    except OSError as error:
        raise DataError(f"{file.url}: cannot be read: {error}") from error
    return f"sampled-{digest.hexdigest()}"


def lines(file: File, at: Callable[[int], None]) -> Iterator[bytes]:
    """Lines with their ends, unpacked by suffix; `at` is told the bytes of the file used so far.

    Raises: DataError when the file cannot be read or unpacked to its end.
    """
    try:
        with file.open() as raw:
            for number, line in enumerate(_unpacked(file.name, raw)):
                at(raw.tell())
                yield line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{file.url}: cannot be read to its end: {error}") from error
    at(file.num_bytes)


def _unpacked(name: str, raw: BinaryIO) -> Iterable[bytes]:
    if name.endswith(".gz"):
        return io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=raw)))
    if name.endswith(".zst"):
        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        return io.BufferedReader(cast(io.RawIOBase, reader))
    return raw


def local_path(file: File) -> str:
    """Where a reader that needs a real file finds it; remote files are fetched for this process."""
    if file.is_local:
        return file.url
    return str(fsspec.open_local(f"simplecache::{file.fs.unstrip_protocol(file.url)}"))
