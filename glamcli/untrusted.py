"""Files that may hold anything, or be no files: read whole, within bounds, parsed as plain data.

The one place where the JSON of files and of other processes is parsed. What is wrong is raised as
OSError (the file) or ValueError (its content), with a text for the user; callers add what it should
have been.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from glamcli.storage import Remote

_Kind = TypeVar("_Kind")

MAX_FILE_BYTES = 1 << 31
"""of a file that is read whole: the largest of the paper's datasets has a quarter of this."""


@contextmanager
def open_regular(path: Path) -> Iterator[IO[bytes]]:
    """A regular file opened for reading, until the end of the block.

    Raises: OSError when it cannot be read, or is a device or a pipe, which may never end, or never
        begin.
    """
    if isinstance(path, Remote):
        with path.reading() as file:
            yield file
        return
    with open(path, "rb", opener=_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        yield file


def read_file(path: Path, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """The content of a regular file.

    Raises: OSError as `open_regular` does, or when it is larger than `max_bytes`.
    """
    if isinstance(path, Remote):
        return path.read(max_bytes)
    with open_regular(path) as file:
        status = os.fstat(file.fileno())
        data = b""
        if status.st_size <= max_bytes:
            data = file.read(status.st_size + 1)  # memory for so much is taken at once
        if len(data) > status.st_size:  # it has grown
            data += file.read(max_bytes + 1 - len(data))
    if max(status.st_size, len(data)) > max_bytes:
        raise OSError(errno.EFBIG, f"larger than {max_bytes:,} bytes", str(path))
    return data


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe that nobody writes to


def parse_json(data: str | bytes) -> Any:
    """The value of a JSON text, UTF-8 if given as bytes, which may begin with a byte order mark.

    Raises: ValueError for everything else; json.JSONDecodeError where there is a position to name.
    """
    if isinstance(data, bytes):
        try:
            data = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 at byte {error.start}") from None
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("not JSON: nested too deeply") from None
    except json.JSONDecodeError:
        raise
    except ValueError:
        raise ValueError("not JSON: a number is too long") from None


def parse_as(kind: type[_Kind], data: bytes) -> _Kind:
    """The JSON text as a value of a type: a dataclass of dataclasses, `dict[str, str]`, ...

    Types are strict: text is no number and `true` is not 1. Keys that the type does not have are
    ignored.

    Raises: ValueError naming the first value that is of another type.
    """
    try:
        return _adapter(kind).validate_json(data, strict=True)
    except ValueError as error:
        errors: Any = getattr(error, "errors", None)
        if errors is None:
            raise
        first = errors(include_url=False, include_context=False, include_input=False)[0]
        at = ".".join(map(str, first["loc"]))
        what = first["msg"][:1].lower() + first["msg"][1:]
        raise ValueError(f"`{at}`: {what}" if at else what) from None


@functools.cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)
