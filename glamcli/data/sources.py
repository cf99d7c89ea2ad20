"""Documents of a source, one after another: JSON lines, text files, array_record, TFDS folders.

Paths may be remote (any fsspec URL), patterns or folders (`source_files.py`); files are read in
sorted order and unpacked on the way (`unpack.py`). Text that comes with Python itself is in
`embedded.py`, and prepared TFDS folders are opened by `examples.py`.

A record of an array_record file is a JSON object when the first record of its file is one, and
UTF-8 text otherwise. Bytes that are not UTF-8 are replaced and counted, never dropped silently.

A new kind of source is a reader in `_READERS`, a name in `Source.kind` (`config/mixtures.py`), and
its suffixes in `source_files.py`; binary files, which nothing unpacks, have a branch in `_is_of`
there, as array_record has.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from glamcli.config.mixtures import Source
from glamcli.config.nearest import did_you_mean
from glamcli.data.embedded import embedded_documents, embedded_files
from glamcli.data.examples import stored_example, stored_examples
from glamcli.data.source_files import SUFFIXES, File, contents, describe, find_files, local_path
from glamcli.data.unpack import CUT_HINT, MAX_DOCUMENT_BYTES, lines, packing, too_long
from glamcli.errors import DataError
from glamcli.storage import file_system
from glamcli.untrusted import parse_json

# Settings of a source that change which documents it has.
READ_SETTINGS = ("kind", "field", "split", "where", "min_chars", "separator", "max_documents")


@dataclass
class Reading:
    """Counts of a source's documents, filled in as they are read."""

    num_read: int = 0
    num_empty: int = 0
    num_short: int = 0
    num_unmatched: int = 0
    num_replaced: int = 0
    """documents with bytes that are not UTF-8, or with lone surrogates"""
    done_bytes: int = 0
    """bytes of its files that were read"""
    missing: dict[str, DataError | None] = field(default_factory=dict)
    """by field of `where`: the error of the first record, None once a record has the field"""

    def counts(self) -> dict[str, int]:
        """The numbers, for JSON."""
        return {name: value for name, value in vars(self).items() if isinstance(value, int)}


def documents(source: Source, name: str, reading: Reading | None = None) -> Iterator[str]:
    """The documents of a source that pass its filters, in order; memory stays bounded.

    Raises: DataError naming the source, and file and line where there is one.
    """
    reading = Reading() if reading is None else reading
    num_kept = 0
    for text in _READERS[source.kind](source, name, reading):
        reading.num_read += 1
        if text is None:
            reading.num_unmatched += 1
        elif not text:
            reading.num_empty += 1
        elif len(text) < source.min_chars:
            reading.num_short += 1
        else:
            yield text
            num_kept += 1
            if num_kept == source.max_documents:
                return
    # A record without the field does not match; if none has it, its name is probably wrong.
    for error in filter(None, reading.missing.values()):
        raise error


def files(source: Source, name: str) -> list[File]:
    """The files of a source in reading order.

    Raises: DataError when the pattern matches nothing, or one file in two ways.
    """
    if source.path is None:
        raise DataError(f"source `{name}`: needs a `path`")
    if source.kind != "embedded":
        return find_files(source.path, source.kind, name)
    disk, _ = file_system("/")
    with _naming(name):
        return [describe(disk, str(path), as_) for as_, path in embedded_files(source.path)]


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Adds the name of the source to an error."""
    try:
        yield
    except DataError as error:
        raise DataError(f"source `{name}`: {error.what}", error.hint) from error


def source_inputs(source: Source, name: str) -> dict[str, Any]:
    """What decides which documents a source has; the folder of its files does not.

    Raises: DataError for a file that cannot be read, or is not text where text is expected.
    """
    inputs: dict[str, Any] = {
        "source": source.model_dump(include=set(READ_SETTINGS)),
        "part": source.path if source.kind == "embedded" else None,
        "files": [],
    }
    for file in files(source, name):
        sha256, head = contents(file)
        inputs["files"].append([file.name, file.num_bytes, sha256])
        how = packing(file, head) if source.kind in SUFFIXES else None
        if how == "zstd" or (how == "gzip" and not file.name.endswith(".gz")):
            # Before, a Zstandard file that was cut short counted as whole, and one with another
            # name as text: such rows are prepared again.
            inputs["unpacking"] = 2
    return inputs


def _lines(file: File, reading: Reading) -> Iterator[bytes]:
    start = reading.done_bytes
    return lines(file, lambda used: setattr(reading, "done_bytes", start + used))


def _text(data: bytes, reading: Reading) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        reading.num_replaced += 1
        return data.decode("utf-8", "replace")


def _read_text(source: Source, name: str, reading: Reading) -> Iterator[str]:
    for file in files(source, name):
        lines = _lines(file, reading)
        if source.separator == "file":
            yield _text(_joined(lines, file), reading)
        elif source.separator == "line":
            for line in lines:
                yield _text(line.rstrip(b"\r\n"), reading)
        else:
            for is_blank, group in itertools.groupby(lines, lambda line: not line.strip()):
                if not is_blank:
                    yield _text(_joined(group, file).rstrip(b"\r\n"), reading)


def _joined(lines: Iterable[bytes], file: File) -> bytes:
    """The lines as one document. Raises: DataError when it is too long."""
    kept, num_bytes = [], 0
    for line in lines:
        kept.append(line)
        num_bytes += len(line)
        if num_bytes > MAX_DOCUMENT_BYTES:
            raise too_long(f"{file.url}: a document")
    return b"".join(kept)


def _read_jsonl(source: Source, name: str, reading: Reading) -> Iterator[str | None]:
    for file in files(source, name):
        for number, line in enumerate(_lines(file, reading), 1):
            if not line.strip():
                continue
            place = f"{file.url}:{number}"
            if not line.endswith((b"\n", b"}")) and not _is_json(line):
                raise DataError(f"{place}: the file ends in the middle of this line", CUT_HINT)
            yield _from_json(line, place, source, reading)


def _is_json(data: bytes, kind: type = object) -> bool:
    try:
        return isinstance(parse_json(data), kind)
    except ValueError:
        return False


def _from_json(data: bytes, place: str, source: Source, reading: Reading) -> str | None:
    try:
        record = parse_json(_text(data, reading))
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON: {error.msg} (character {error.pos + 1})") from error
    except ValueError as error:
        raise DataError(f"{place}: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{place}: expected a JSON object, found {_kind(record)}")
    return _from_record(record, place, source, reading)


def _from_record(
    record: dict[str, Any], place: str, source: Source, reading: Reading
) -> str | None:
    """The document of a record; None when it does not pass `where`."""
    for key, expected in source.where.items():
        try:
            value = _look_up(record, key, place)
        except DataError as error:
            reading.missing.setdefault(key, error)
            return None
        reading.missing[key] = None
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        if value != expected or isinstance(value, bool) != isinstance(expected, bool):
            return None
    value = _look_up(record, source.field, place)
    if isinstance(value, bytes):
        return _text(value, reading)
    if isinstance(value, str):
        # JSON escapes can spell half a surrogate pair, which no encoding can store.
        if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            reading.num_replaced += 1
            value = value.encode("utf-8", "replace").decode()
        return value
    if value is not None:
        raise DataError(f"{place}: field `{source.field}` should be text, found {_kind(value)}")
    return ""


def _look_up(record: dict[str, Any], key: str, place: str) -> Any:
    """A field by name, or by path (`meta.language`) into nested objects."""
    if key in record:
        return record[key]
    value: Any = record
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            names = [str(each) for each in record]
            hint = did_you_mean(key, names, f"it has {', '.join(names)}")
            raise DataError(f"{place}: no field `{key}`", hint)
        value = value[part]
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value"}
    return names.get(type(value), "null" if value is None else f"the number {value}")


def _read_array_record(source: Source, name: str, reading: Reading) -> Iterator[str | None]:
    from array_record.python import array_record_module  # pyright: ignore

    for file in files(source, name):
        start = reading.done_bytes
        try:
            reader = array_record_module.ArrayRecordReader(local_path(file))
            num_records = reader.num_records()
            as_json = False
            for index in range(num_records):
                data = reader.read()
                if index == 0:
                    as_json = _is_json(data, dict)
                place = f"{file.url}: record {index}"
                yield _from_json(data, place, source, reading) if as_json else _text(data, reading)
                reading.done_bytes = start + file.num_bytes * (index + 1) // num_records
            reader.close()
        except (RuntimeError, ValueError, IndexError) as error:
            reason = (str(error) or "cut short").splitlines()[0]
            raise DataError(f"{file.url}: damaged: {reason}") from error
        reading.done_bytes = start + file.num_bytes


def _read_tfds(source: Source, name: str, reading: Reading) -> Iterator[str | None]:
    total = sum(file.num_bytes for file in files(source, name))
    with _naming(name):
        examples, split = stored_examples(source.path or "", source.split)
    for index in range(len(examples)):
        place = f"{source.path}: example {index} of `{split}`"
        record = stored_example(examples, index, source.path or "")
        yield _from_record(record, place, source, reading)
        reading.done_bytes = total * (index + 1) // len(examples)


def _read_embedded(source: Source, name: str, reading: Reading) -> Iterator[str]:
    for text, done_bytes in embedded_documents(source.path or ""):
        yield text
        reading.done_bytes = done_bytes


_READERS: dict[str, Callable[[Source, str, Reading], Iterator[str | None]]] = {
    "embedded": _read_embedded,
    "jsonl": _read_jsonl,
    "text": _read_text,
    "array_record": _read_array_record,
    "tfds": _read_tfds,
}
