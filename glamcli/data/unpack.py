"""Lines of a file: gzip and Zstandard are unpacked, what cannot be read as UTF-8 is refused.

How a file is stored is recognised by its first bytes; its name only has to agree. A file that was
cut short is refused, never taken for whole. Which files a source has is `source_files.py`.
"""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

import zstandard

from glamcli.data.source_files import HEAD_BYTES, PARQUET_HINT, File
from glamcli.errors import DataError

CUT_HINT = "it is cut short or damaged: copy or download it again"

_SUFFIXES = {".gz": "gzip", ".zst": "zstd"}
# RFC 1952; RFC 8878, section 3.1.1, and its skippable frames.
_PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_PACKED |= {bytes([0x50 + i]) + b"\x2a\x4d\x18": "zstd" for i in range(16)}
# Windows up to those of `zstd --long=31`; memory is taken for the window that a file has.
_MAX_WINDOW_BYTES = 1 << 31
# A line, or a document of several: a small packed file may hold zeros without end.
MAX_DOCUMENT_BYTES = 1 << 29
# Zstandard unpacks at most 128 KiB from 4 bytes: so much is read at once that this stays small.
_ZSTD_READ_BYTES = 1 << 12

_UTF8 = "convert it first: `iconv -f {} -t utf-8 OLD > NEW`"
_FOREIGN: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"\xff\xfe\0\0", "UTF-32 text", _UTF8.format("utf-32")),
    (0, b"\0\0\xfe\xff", "UTF-32 text", _UTF8.format("utf-32")),
    (0, b"\xff\xfe", "UTF-16 text", _UTF8.format("utf-16")),
    (0, b"\xfe\xff", "UTF-16 text", _UTF8.format("utf-16")),
    (0, b"PAR1\x15", "a Parquet table", PARQUET_HINT),
    (0, b"ARROW1\0\0", "an Arrow table", PARQUET_HINT.replace("parquet", "feather")),
    (0, b"Obj\x01", "an Avro table", "write JSON lines first: `avro-tools tojson OLD > NEW`"),
    (4, b"1AY&SY", "packed with bzip2", "unpack it first: `bunzip2 FILE`"),
    (257, b"ustar", "a tar archive", "unpack it first: `tar -xf FILE`"),
    (0, b"\xfd7zXZ\0", "packed with xz", "unpack it first: `unxz FILE`"),
    (0, b"\x04\x22\x4d\x18", "packed with lz4", "unpack it first: `unlz4 FILE`"),
    (0, b"PK\x03\x04", "a zip archive", "unpack it first: `unzip FILE`"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it first: `7z x FILE`"),
    (0, b"%PDF-", "a PDF document", "extract its text first, for example with `pdftotext`"),
)


def packing(file: File, head: bytes, packed: bool = True) -> str | None:
    """How a file is packed (gzip, zstd or not at all), by its first `HEAD_BYTES`; not `packed`, by
    those of its unpacked content.

    Raises: DataError for what is neither text, gzip nor Zstandard, saying what it is.
    """
    name = file.name.lower()
    found = next((how for magic, how in _PACKED.items() if head.startswith(magic)), None)
    expected = next((how for end, how in _SUFFIXES.items() if packed and name.endswith(end)), None)
    problem = None if found else _foreign(head)
    if found and not packed:
        problem = f"packed twice ({found})", "unpack it once"
    elif expected and not (found or problem):
        problem = f"not {expected}, though its name says so", "rename it"
        problem = problem if head else ("empty: not even a header is there", CUT_HINT)
    if problem:
        raise DataError(f"{file.url}: is {problem[0]}", problem[1])
    return found


def _foreign(head: bytes) -> tuple[str, str] | None:
    """What a file is that begins like this and is not text, and what to do about it."""
    for start, magic, what, hint in _FOREIGN:
        if head.startswith(magic, start):
            return f"{what}, which is not UTF-8 text", hint
    for first, order in ((0, "utf-16be"), (1, "utf-16le")):
        # Latin letters in UTF-16 have a zero byte each; no text in UTF-8 has any.
        zeros = head[first::2].count(0)
        if zeros > len(head) // 4 and not head[1 - first :: 2].count(0):
            return "UTF-16 text, which is not UTF-8", _UTF8.format(order)
    return None


def lines(file: File, at: Callable[[int], None]) -> Iterator[bytes]:
    """Lines with their ends; `at` is called with the bytes of the file used so far.

    Raises: DataError when the file cannot be read or unpacked to its end, is not text, or has a
        line that is too long.
    """
    try:
        with file.open() as raw:
            content = stream = io.BufferedReader(cast(io.RawIOBase, raw), 1 << 16)
            if how := packing(file, stream.peek(HEAD_BYTES)[:HEAD_BYTES]):
                unpacked = gzip.GzipFile(fileobj=stream) if how == "gzip" else _Zstandard(stream)
                content = io.BufferedReader(cast(io.RawIOBase, unpacked), 1 << 16)
                packing(file, content.peek(HEAD_BYTES)[:HEAD_BYTES], packed=False)
            longest = MAX_DOCUMENT_BYTES
            for number, line in enumerate(iter(lambda: content.readline(longest + 1), b"")):
                if len(line) > longest:
                    raise too_long(f"{file.url}:{number + 1}: the line")
                at(raw.tell())
                yield line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        is_readable = not isinstance(error, OSError) or isinstance(error, gzip.BadGzipFile)
        hint = CUT_HINT if is_readable else None
        raise DataError(f"{file.url}: cannot be read to its end: {error}", hint) from error
    at(file.num_bytes)


def too_long(what: str) -> DataError:
    """The error of a line or document that no document is as long as."""
    return DataError(
        f"{what} has more than {MAX_DOCUMENT_BYTES:,} bytes",
        hint="a document has to fit into memory: cut it, or set `separator`",
    )


class _Zstandard(io.RawIOBase):
    """Frame after frame unpacked. The library's own reader ends without an error where the file
    ends, also in the middle of a frame."""

    def __init__(self, packed: BinaryIO | io.BufferedReader):
        self._packed = packed
        self._library = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
        self._frame: Any = None
        self._rest = b""
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            data = self._rest or self._packed.read(_ZSTD_READ_BYTES)
            if not data and self._frame is None:
                return 0
            if not data:
                raise EOFError("the file ends in the middle of a frame")
            self._frame = self._frame or self._library.decompressobj()
            self._unpacked = memoryview(self._frame.decompress(data))
            self._rest = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        num_bytes = min(len(buffer), len(self._unpacked))
        buffer[:num_bytes] = self._unpacked[:num_bytes]
        self._unpacked = self._unpacked[num_bytes:]
        return num_bytes
