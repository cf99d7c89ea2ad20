"""Prepared rows on disk: a folder of array_record shards that TFDS opens as well.

A row is a dict of int32 arrays `tokens`, `targets`, `segments`, each `row_tokens` long. A record
is a `tf.train.Example` with one bytes feature per array, so every record of a folder has the same
layout and decoding is three views into it. `rows.json` holds what the folder was made from, counts,
and of every shard its size, its SHA-256 and that of the rows in it. Folders are written by
`parts.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from glamcli.errors import DataError
from glamcli.untrusted import parse_as, parse_json, read_file

Row = dict[str, np.ndarray]
TOKEN_FIELDS = ("tokens", "targets", "segments")
"""The arrays of a row, and of a batch of rows."""
META_FILE = "rows.json"
# One record per chunk: a random read decompresses one row and nothing else.
WRITER_OPTIONS = "group_size:1"
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


@dataclass(frozen=True)
class Shard:
    """One file of rows."""

    file: str
    num_rows: int
    num_bytes: int
    sha256: str
    rows_sha256: str
    """of the rows themselves, which does not depend on how array_record packs them"""


@dataclass
class Counts:
    """Totals of the documents of one split; `as_dict` is what `rows.json` holds of them."""

    num_rows: int = 0
    num_documents: int = 0
    num_tokens: int = 0
    """inputs that count, BOS included (as many as targets, EOS included)"""
    max_id: int = 0
    num_changed: int = 0
    """documents that the tokenizer does not give back as they were"""
    num_unknown: int = 0
    """tokens for text that the tokenizer has no pieces for"""

    def __add__(self, other: Counts) -> Counts:
        sums = {name: value + getattr(other, name) for name, value in vars(self).items()}
        return Counts(**{**sums, "max_id": max(self.max_id, other.max_id)})

    def as_dict(self) -> dict[str, int]:
        """For JSON; what earlier versions did not count only where there is some."""
        later = ("num_changed", "num_unknown")
        return {name: value for name, value in vars(self).items() if value or name not in later}


def _field(number: int, payload: bytes) -> bytes:
    """One length-delimited protobuf field."""
    size, length = len(payload), bytearray()
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([number << 3 | 2, *length, size]) + payload


class RowCodec:
    """Rows to `tf.train.Example` records and back, for one row length."""

    def __init__(self, row_tokens: int):
        self.row_tokens = row_tokens
        # All arrays are equally long, so the bytes before each of them never change.
        blank = bytes(4 * row_tokens)
        features = [
            _field(1, _field(1, name.encode()) + _field(2, _field(1, _field(1, blank))))
            for name in TOKEN_FIELDS
        ]
        record = _field(1, b"".join(features))
        self._num_bytes = len(record)
        features[0] = record[: len(record) - sum(map(len, features[1:]))]
        self._parts = [feature[: -len(blank)] for feature in features]
        self._offsets = [end - len(blank) for end in accumulate(map(len, features))]

    def encode(self, *arrays: np.ndarray) -> bytes:
        """The record of a row, its arrays in the order of `TOKEN_FIELDS`."""
        return b"".join(
            part + array.astype("<i4", copy=False).tobytes()
            for part, array in zip(self._parts, arrays, strict=True)
        )

    def decode(self, record: bytes) -> Row:
        """The row as read-only views into `record`. Raises: ValueError for another record."""
        if len(record) != self._num_bytes or not record.startswith(self._parts[0]):
            raise ValueError("the record is not a row")
        return {
            name: np.frombuffer(record, "<i4", self.row_tokens, offset)
            for name, offset in zip(TOKEN_FIELDS, self._offsets, strict=True)
        }


def write_shard(path: Path, row_tokens: int, rows: Iterable[tuple[np.ndarray, ...]]) -> Shard:
    """Writes one shard. Raises: OSError when it cannot be read back."""
    codec = RowCodec(row_tokens)
    writer = array_record_module.ArrayRecordWriter(str(path), WRITER_OPTIONS)
    num_rows = num_stored = 0
    digest = hashlib.sha256()
    for arrays in rows:
        record = codec.encode(*arrays)
        writer.write(record)
        digest.update(record)
        num_rows += 1
    writer.close()
    with contextlib.suppress(RuntimeError, ValueError):
        reader = array_record_module.ArrayRecordReader(str(path), READER_OPTIONS)
        num_stored = reader.num_records()
    if num_stored != num_rows:
        raise OSError("rows written cannot be read back (is the disk full?)")
    sha256 = file_sha256(path)
    return Shard(path.name, num_rows, path.stat().st_size, sha256, digest.hexdigest())


def file_sha256(path: Path) -> str:
    """Hex digits. Raises: OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Rows:
    """Random access to the rows of one split; safe to pickle and to share between threads."""

    def __init__(self, folder: Path, split: Literal["train", "heldout"]):
        """Opens `folder`; shard files are checked for their size now, for their sums in `verify`.

        Raises: DataError when the folder is not whole.
        """
        self.folder = folder
        content = read_rows_meta(folder)
        self.shards = content.splits[split].shards
        self.counts = content.splits[split].counts
        self.row_tokens = content.row_tokens
        self._codec = RowCodec(self.row_tokens)
        self._starts = np.cumsum([0, *(shard.num_rows for shard in self.shards)])
        self._readers: dict[int, Any] = {}
        for shard in self.shards:
            self._check_size(shard)

    def __len__(self) -> int:
        return self.counts.num_rows

    @property
    def utilisation(self) -> float:
        """Share of row positions that hold tokens, between 0 and 1."""
        return self.counts.num_tokens / max(len(self) * self.row_tokens, 1)

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        local = int(index - self._starts[number])
        path = self.folder / self.shards[number].file
        try:
            if number not in self._readers:
                reader = array_record_module.ArrayRecordReader(str(path), READER_OPTIONS)
                self._readers[number] = reader
            return self._codec.decode(self._readers[number].read([local])[0])
        except (RuntimeError, ValueError, IndexError) as error:
            reason = (str(error) or "unreadable").splitlines()[0]
            raise damaged(path, f"record {local} is damaged ({reason})") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}}

    def verify(self) -> None:
        """Reads every shard again and compares its SHA-256.

        Raises: DataError naming the first damaged file.
        """
        for shard in self.shards:
            self._check_size(shard)
            path = self.folder / shard.file
            if file_sha256(path) != shard.sha256:
                raise damaged(path, "checksum differs from the recorded one")

    def _check_size(self, shard: Shard) -> None:
        path = self.folder / shard.file
        num_bytes = path.stat().st_size if path.exists() else None
        if num_bytes != shard.num_bytes:
            found = "is missing" if num_bytes is None else f"has {num_bytes} bytes"
            raise damaged(path, f"{found}, expected {shard.num_bytes} bytes")


def damaged(path: Path, what: str) -> DataError:
    """The error of a damaged file of a folder of rows, which can be made again."""
    return DataError(f"{path}: {what}", f"delete {path.parent}; the next run prepares it again")


def write_rows_meta(folder: Path, content: dict[str, Any]) -> None:
    """Writes `rows.json` with a checksum of itself, and `dataset_info.json` and `features.json` as
    `tfds.folder_dataset.write_metadata` writes them (importing TFDS just for this would cost more
    than preparing a small source)."""
    text = json.dumps(content, indent=1, sort_keys=True)
    signed = {"content": content, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    splits = [
        {
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            "name": name,
            "numBytes": str(sum(shard["num_bytes"] for shard in part["shards"])),
            "shardLengths": [str(shard["num_rows"]) for shard in part["shards"]],
        }
        for name, part in content["splits"].items()
        if part["shards"]
    ]
    tensor = {
        "pythonClassName": "tensorflow_datasets.core.features.tensor_feature.Tensor",
        "tensor": {
            "dtype": "int32",
            "encoding": "bytes",
            "shape": {"dimensions": [str(content["row_tokens"])]},
        },
    }
    info = {"fileFormat": "array_record", "name": "rows", "splits": splits, "version": "1.0.0"}
    features = {
        "featuresDict": {"features": dict.fromkeys(sorted(TOKEN_FIELDS), tensor)},
        "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
    }
    (folder / META_FILE).write_text(json.dumps(signed, indent=1, sort_keys=True) + "\n")
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=1) + "\n")
    (folder / "features.json").write_text(json.dumps(features, indent=1) + "\n")


@dataclass(frozen=True)
class _Inputs:
    """What is read of the inputs of a folder of rows."""

    files: list[tuple[str, int, str]]
    """name, size and digest of the files of the source."""


@dataclass(frozen=True)
class _Split:
    shards: list[Shard]
    counts: Counts


@dataclass(frozen=True)
class RowsMeta:
    """What is read of `rows.json`."""

    row_tokens: int
    splits: dict[Literal["train", "heldout"], _Split]
    documents_sha256: str = ""
    inputs: _Inputs = _Inputs([])


def read_rows_meta(folder: Path) -> RowsMeta:
    """What `rows.json` says.

    Raises: DataError when it is missing or was changed since it was written.
    """
    path = folder / META_FILE
    try:
        signed = parse_json(read_file(path))
        text = json.dumps(signed["content"], indent=1, sort_keys=True)
        if hashlib.sha256(text.encode()).hexdigest() != signed["sha256"]:
            raise damaged(path, "changed since it was written")
        return parse_as(RowsMeta, text.encode())
    except FileNotFoundError as error:
        raise DataError(f"{folder}: not a folder of prepared rows (no `{META_FILE}`)") from error
    except OSError as error:
        raise damaged(path, f"cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(path, f"cannot be read: {error}") from error
