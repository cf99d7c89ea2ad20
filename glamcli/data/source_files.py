"""Files of a source: listed by path, pattern or folder, local or remote, and their digests.

What is in a file is read by `unpack.py` and `sources.py`.
"""

import fnmatch
import functools
import glob
import hashlib
import os
import stat
from collections import Counter
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from glamcli.errors import DataError
from glamcli.storage import EXTRA, file_system, local_copy

# What a folder is searched for, in any case; other kinds read every file that is not hidden.
SUFFIXES = {
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst"),
    "text": (".txt", ".txt.gz", ".txt.zst"),
}
PARQUET_HINT = (
    "write JSON lines first, for example with pandas: "
    '`read_parquet(OLD).to_json(NEW, orient="records", lines=True)`'
)
# Larger files are not hashed whole: see `contents`.
HASHED_WHOLE_BYTES = 64 << 20
SAMPLE_BYTES = 64 << 10
NUM_SAMPLES = 64
# Enough to see how a file is stored.
HEAD_BYTES = 512


@dataclass(frozen=True)
class File:
    """One file of a source, listed but not yet read."""

    url: str
    name: str
    num_bytes: int
    changed: str
    """modification time or entity tag, as far as the file system knows one"""
    fs: Any

    def open(self) -> BinaryIO:
        return cast(BinaryIO, self.fs.open(self.url, "rb"))

    @property
    def is_local(self) -> bool:
        return "file" in self.fs.protocol


def find_files(pattern: str, kind: str, name: str) -> list[File]:
    """Files matching a path, pattern or folder (there: those of the source's kind), sorted by path.

    Hidden files and folders are left out, unless the path names them.

    Raises: DataError when there is none, one file in two ways, or a pipe or device among them.
    """
    try:
        fs, root = file_system(pattern)
        is_folder = fs.isdir(root)
        if is_folder:
            paths = fs.find(root)
        elif _is_pattern(root) and not fs.exists(root):
            paths = [path for path in fs.glob(_escaped(fs, root)) if not fs.isdir(path)]
        else:
            paths = [root] if fs.exists(root) else []
        shown = [str(path) for path in sorted(paths) if not _is_hidden(str(path), root)]
        wanted = [path for path in shown if not is_folder or _is_of(path, kind)]
        found = [describe(fs, path, _base(path)) for path in wanted]
    except (OSError, ImportError, ValueError) as error:
        # fsspec names the package that it misses; the extra has those of all promised addresses.
        hint = EXTRA if isinstance(error, ImportError) else None
        raise DataError(f"source `{name}`: cannot read `{pattern}`: {error}", hint) from error
    if not found:
        raise _no_files(pattern, kind, name, shown, num_hidden=len(paths) - len(shown))
    _refuse_unlike_files(found, name)
    return found


def _is_pattern(path: str) -> bool:
    return any(mark in path for mark in "*?[")


def _escaped(fs: Any, pattern: str) -> str:
    """The pattern with folders that exist under that very name, such as `data [v1]`, as names."""
    names = pattern.split("/")
    escaped = list(names)
    for number, each in enumerate(names):
        if _is_pattern(each):
            if not fs.exists("/".join(names[: number + 1])):
                break
            escaped[number] = glob.escape(each)
    return "/".join(escaped)


def _is_hidden(path: str, pattern: str) -> bool:
    """Whether a name in the path begins with a dot that is not in the pattern, as for a shell."""
    dotted = [part for part in pattern.split("/") if part.startswith(".")]
    hidden = {part for part in path.split("/") if part.startswith(".")} - set(dotted)
    return any(not any(fnmatch.fnmatchcase(part, each) for each in dotted) for part in hidden)


def _is_of(path: str, kind: str) -> bool:
    """Whether a file of a folder is read for a kind of source."""
    base = _base(path).lower()
    if kind == "array_record":
        return ".array_record" in base
    return kind == "tfds" or base.endswith(SUFFIXES[kind])


def _no_files(pattern: str, kind: str, name: str, shown: list[str], num_hidden: int) -> DataError:
    """What there is instead, and the path or kind that reads it."""
    if not shown:
        hidden = f" ({num_hidden} hidden ones are left out)" if num_hidden else ""
        return DataError(f"source `{name}`: no file matches `{pattern}`{hidden}")
    counts = Counter(_suffix(path) for path in shown).most_common(4)
    most = counts[0][0]
    listed = ", ".join(f"{count} `{suffix}`" for suffix, count in counts)
    expected = ", ".join(SUFFIXES.get(kind, (".array_record",)))
    other = next((k for k in (*SUFFIXES, "array_record") if any(_is_of(p, k) for p in shown)), None)
    hint = f"`path: {pattern.rstrip('/')}/*{most}` reads them"
    if other:
        hint = f"`kind: {other}` reads such files"
    elif most == ".parquet":
        hint = PARQUET_HINT
    what = f"no file of the folder `{pattern}` is {kind} ({expected}); it has {listed}"
    return DataError(f"source `{name}`: {what}", hint)


def _suffix(path: str) -> str:
    """`.json.gz` of `c4.00000.json.gz`; the whole name where there is no dot."""
    base, last = os.path.splitext(_base(path).lower())
    inner = os.path.splitext(base)[1] if last in (".gz", ".zst", ".bz2", ".xz") else ""
    return inner + last or base


def _base(path: str) -> str:
    """The name of a file; the query of a web address is not part of it, and may be a secret."""
    if path.startswith(("http://", "https://")):
        path = path.partition("?")[0]
    return os.path.basename(path)


def describe(fs: Any, path: str, name: str) -> File:
    """A file as its file system describes it. Raises: OSError when it is gone."""
    info = fs.info(path)
    changed = next((info[key] for key in ("mtime", "ETag", "etag", "md5Hash") if key in info), "")
    return File(path, name, int(info["size"] or 0), str(changed), fs)


def _refuse_unlike_files(found: list[File], name: str) -> None:
    """Pipes and devices, and links to a file already listed; `prepare` warns of copies, as it has
    their hashes anyway."""
    seen: dict[tuple[int, int], str] = {}
    for file in found:
        if file.is_local:
            status = os.stat(file.url)
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"source `{name}`: `{file.url}` is not a regular file")
            other = seen.setdefault((status.st_dev, status.st_ino), file.url)
            if other != file.url:
                raise DataError(
                    f"source `{name}`: the same file is listed twice: `{other}` and `{file.url}`"
                )


@functools.lru_cache(maxsize=1 << 16)
def contents(file: File) -> tuple[str, bytes]:
    """SHA-256 of a file of up to 64 MiB, of a larger one that of size, modification mark and
    samples; and the first `HEAD_BYTES` of either.

    So a changed small file is always noticed, and a large one unless an edit is between the
    samples and its modification time was restored.
    """
    try:
        with file.open() as stream:
            if file.num_bytes <= HASHED_WHOLE_BYTES:
                data = stream.read()
                return hashlib.sha256(data).hexdigest(), data[:HEAD_BYTES]
            head = b""
            digest = hashlib.sha256(f"{file.num_bytes} {file.changed}".encode())
            for i in range(NUM_SAMPLES):
                stream.seek((file.num_bytes - SAMPLE_BYTES) * i // (NUM_SAMPLES - 1))
                data = stream.read(SAMPLE_BYTES)
                digest.update(data)
                head = head or data[:HEAD_BYTES]
    except OSError as error:
        raise DataError(f"{file.url}: cannot be read: {error}") from error
    return f"sampled-{digest.hexdigest()}", head


def local_path(file: File) -> str:
    """The path for a reader that needs a real file; a remote file is fetched for this process."""
    if file.is_local:
        return file.url
    return local_copy(file.fs.unstrip_protocol(file.url))
