"""Documents of a source, one after another: JSON lines, text files, array_record, TFDS folders.

Paths may be remote (any fsspec URL), globs or folders; files are read in sorted order and
`.gz` and `.zst` are unpacked on the way. Text that comes with Python itself is in `embedded.py`.

A record of an array_record file is a JSON object when the first record of its file is one, and
UTF-8 text otherwise. Bytes that are no UTF-8 are replaced and counted, never dropped silently.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from glamcli.config.mixtures import Source
from glamcli.data import embedded
from glamcli.data.source_files import File, content_hash, find_files, lines, local, local_path
from glamcli.errors import DataError

# Settings of a source that change which documents it has.
READ_SETTINGS = ("kind", "field", "split", "where", "min_chars", "separator", "max_documents")
SUFFIXES = {
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst"),
    "text": (".txt", ".txt.gz", ".txt.zst"),
}


@dataclass
class Reading:
    """What was noticed while a source was read; filled in as its documents are taken."""

    num_read: int = 0
    num_empty: int = 0
    num_short: int = 0
    num_unmatched: int = 0
    num_replaced: int = 0
    """documents with bytes that are no UTF-8, or with lone surrogates"""
    done_bytes: int = 0
    """how far into its files reading is"""
    missing: dict[str, DataError] = field(default_factory=dict)
    """fields of `where` that no record so far has, with the first record's complaint"""
    present: set[str] = field(default_factory=set)

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
        if not text:
            reading.num_empty += 1
        elif len(text) < source.min_chars:
            reading.num_short += 1
        else:
            yield text
            num_kept += 1
            if num_kept == source.max_documents:
                return
    # A record without the field does not match; if none has it, its name is probably wrong.
    for complaint in reading.missing.values():
        raise complaint


def files(source: Source, name: str) -> list[File]:
    """The files of a source in reading order.

    Raises: DataError when the pattern matches nothing, or one file in two ways.
    """
    path = _path(source, name)
    if source.kind == "embedded":
        try:
            return [local(str(found), shown) for shown, found in embedded.embedded_files(path)]
        except DataError as error:
            raise DataError(f"source `{name}`: {error.what}", error.hint) from error
    return find_files(path, lambda base: _belongs(base, source.kind), name)


def source_inputs(source: Source, name: str) -> dict[str, Any]:
    """What decides which documents a source has; where its files lie does not."""
    return {
        "source": source.model_dump(include=set(READ_SETTINGS)),
        "part": source.path if source.kind == "embedded" else None,
        "files": [[file.name, file.num_bytes, content_hash(file)] for file in files(source, name)],
    }


def _path(source: Source, name: str) -> str:
    if source.path is None:
        raise DataError(f"source `{name}`: needs a `path`")
    return source.path


def _belongs(base: str, kind: str) -> bool:
    """Whether a file of a folder is read for a kind of source."""
    if kind == "array_record":
        return ".array_record" in base
    return kind == "tfds" or base.endswith(SUFFIXES[kind])


def _lines(file: File, reading: Reading) -> Iterator[bytes]:
    start = reading.done_bytes

    def at(position: int) -> None:
        reading.done_bytes = start + position

    return lines(file, at)


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
            yield _text(b"".join(lines), reading)
        elif source.separator == "line":
            for line in lines:
                yield _text(line.rstrip(b"\r\n"), reading)
        else:
            paragraph: list[bytes] = []
            for line in lines:
                if line.strip():
                    paragraph.append(line)
                elif paragraph:
                    yield _text(b"".join(paragraph).rstrip(b"\r\n"), reading)
                    paragraph = []
            if paragraph:
                yield _text(b"".join(paragraph).rstrip(b"\r\n"), reading)


def _read_jsonl(source: Source, name: str, reading: Reading) -> Iterator[str]:
    for file in files(source, name):
        for number, line in enumerate(_lines(file, reading), 1):
            if not line.strip():
                continue
            yield from _from_json(line, f"{file.url}:{number}", source, reading)


def _from_json(data: bytes, place: str, source: Source, reading: Reading) -> Iterator[str]:
    """The document of a JSON object, if it passes `where`."""
    try:
        record = json.loads(_text(data, reading))
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON: {error.msg} (character {error.pos + 1})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{place}: expected a JSON object, found {_kind(record)}")
    yield from _from_record(record, place, source, reading)


def _from_record(
    record: dict[str, Any], place: str, source: Source, reading: Reading
) -> Iterator[str]:
    for key, expected in source.where.items():
        if not _matches(record, key, expected, place, reading):
            reading.num_read += 1
            reading.num_unmatched += 1
            return
    value = _look_up(record, source.field, place)
    if isinstance(value, bytes):
        yield _text(value, reading)
    elif value is None:
        yield ""
    elif isinstance(value, str):
        # JSON escapes can spell half a surrogate pair, which no encoding can store.
        if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            reading.num_replaced += 1
            value = value.encode("utf-8", "replace").decode()
        yield value
    else:
        raise DataError(f"{place}: field `{source.field}` should be text, found {_kind(value)}")


def _matches(record: dict[str, Any], key: str, expected: Any, place: str, reading: Reading) -> bool:
    """Whether a field has the value that `where` asks for."""
    try:
        value = _look_up(record, key, place)
    except DataError as error:
        if key not in reading.present:
            reading.missing.setdefault(key, error)
        return False
    reading.present.add(key)
    reading.missing.pop(key, None)
    return _equal(value, expected)


def _look_up(record: dict[str, Any], key: str, place: str) -> Any:
    """A field by name, or by path (`meta.language`) into nested objects."""
    if key in record:
        return record[key]
    value: Any = record
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            names = [str(found) for found in record]
            near = difflib.get_close_matches(key, names, 1)
            hint = f"did you mean `{near[0]}`?" if near else f"it has {', '.join(names)}"
            raise DataError(f"{place}: no field `{key}`", hint)
        value = value[part]
    return value


def _equal(value: Any, expected: str | int | float | bool) -> bool:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return value == expected and isinstance(value, bool) == isinstance(expected, bool)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value"}
    return names.get(type(value), "null" if value is None else f"the number {value}")


def _read_array_record(source: Source, name: str, reading: Reading) -> Iterator[str]:
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
                    as_json = _is_json_object(data)
                if as_json:
                    yield from _from_json(data, f"{file.url}: record {index}", source, reading)
                else:
                    yield _text(data, reading)
                reading.done_bytes = start + file.num_bytes * (index + 1) // num_records
            reader.close()
        except (RuntimeError, ValueError, IndexError) as error:
            raise DataError(f"{file.url}: damaged: {str(error).splitlines()[0]}") from error
        reading.done_bytes = start + file.num_bytes


def _is_json_object(data: bytes) -> bool:
    try:
        return isinstance(json.loads(data), dict)
    except (ValueError, RecursionError):
        return False


def _read_tfds(source: Source, name: str, reading: Reading) -> Iterator[str]:
    import tensorflow_datasets as tfds

    path = _path(source, name)
    total = sum(file.num_bytes for file in files(source, name))
    try:
        builder: Any = tfds.builder_from_directory(path)
    except Exception as error:  # TFDS raises many kinds for a folder that is not a dataset
        raise DataError(
            f"source `{name}`: `{path}` is not a prepared TFDS folder: {error}"
        ) from error
    splits = sorted(builder.info.splits)
    split = source.split or (splits[0] if len(splits) == 1 else None)
    if split is None:
        raise DataError(f"source `{name}`: name a `split` of {', '.join(splits)}")
    if builder.info.file_format is None or builder.info.file_format.value != "array_record":
        raise DataError(
            f"source `{name}`: `{path}` is not stored as array_record",
            hint='prepare it with `download_and_prepare(file_format="array_record")`',
        )
    try:
        examples = builder.as_data_source(split)
    except (ValueError, KeyError, AssertionError) as error:
        raise DataError(f"source `{name}`: no split `{split}` in {', '.join(splits)}") from error
    for index in range(len(examples)):
        place = f"{path}: example {index} of `{split}`"
        try:
            record = examples[index]
        except (RuntimeError, ValueError, IndexError) as error:
            raise DataError(f"{place}: damaged: {str(error).splitlines()[0]}") from error
        yield from _from_record(record, place, source, reading)
        reading.done_bytes = total * (index + 1) // len(examples)


def _read_embedded(source: Source, name: str, reading: Reading) -> Iterator[str]:
    for text, done_bytes in embedded.embedded_documents(_path(source, name)):
        yield text
        reading.done_bytes = done_bytes


_READERS: dict[str, Callable[[Source, str, Reading], Iterator[str]]] = {
    "embedded": _read_embedded,
    "jsonl": _read_jsonl,
    "text": _read_text,
    "array_record": _read_array_record,
    "tfds": _read_tfds,
}
