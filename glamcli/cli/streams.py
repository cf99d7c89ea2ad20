"""Standard output and error where they cannot be written: closed, without reader, on a full disk.

Progress is dropped then and the run goes on; a result that cannot be shown is an error (`main`).
"""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TextIO

UNWANTED = (errno.EPIPE, errno.EIO)
"""of a reader that left (`| head`) and of a terminal that was closed."""


class OutputError(OSError):
    """Standard output cannot be written, for another reason than a reader that left."""


class _Guarded:
    """A stream, as a file, whose failures `_failing` takes."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes the text."""
        with self._failing():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Hands everything written to the system."""
        with self._failing():
            self._stream.flush()

    def _failing(self) -> AbstractContextManager[None]:
        raise NotImplementedError


class Lossy(_Guarded):
    """A stream whose end does not matter."""

    def _failing(self) -> AbstractContextManager[None]:
        return _dropping(self._stream)


class Output(_Guarded):
    """Standard output, which is known by its error.

    Raises: OutputError instead of the system's error; a BrokenPipeError as it is.
    """

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(error.errno, error.strerror) from None


def write_line(stream: TextIO, line: str) -> None:
    """Writes one line at once, or drops it and everything further. A loss that nobody can have
    meant, as on a full disk, is told on stderr, once."""
    with _dropping(stream):
        stream.write(line + "\n")
        stream.flush()


@contextmanager
def _dropping(stream: TextIO) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        to_nowhere(stream)
        if error.errno not in UNWANTED and stream is not sys.stderr:
            reason = error.strerror or error
            write_line(sys.stderr, f"warning: output cannot be written ({reason}); going on")


def to_nowhere(stream: TextIO) -> None:
    """Drops what is written to a stream from now on, also by the flush at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def open_missing() -> None:
    """Opens the standard streams that the process was started without (`>&-`) on nothing: what is
    opened next must not get their descriptors and receive what is meant for them."""
    while (opened := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(opened)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
