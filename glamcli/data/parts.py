"""Parts of a source: some documents each, tokenised and packed into a shard per split, then joined.

Parts are cut by text alone and made independently of each other, in any process, so the bytes on
disk do not depend on the number of processes, and a finished part survives an interruption.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glamcli.data.pack import pack
from glamcli.data.rows import (
    Counts,
    RowCodec,
    Shard,
    file_sha256,
    num_records,
    shard_name,
    write_rows_meta,
    write_shard,
)
from glamcli.data.tokenizer import Tokenizer
from glamcli.errors import DataError

SPLITS = ("train", "heldout")
PART_FILE = "part.json"
DOCUMENTS_FILE = "heldout.jsonl"
# Held-out documents whose text is kept for evaluation, per source and in all.
KEPT_DOCUMENTS = 512
KEPT_CHARS = 1 << 20
# Text in one part: small enough to share out a small corpus, larger when that gives many parts.
PART_CHARS = 1 << 19
MAX_PART_CHARS = 1 << 26
PARTS_WANTED = 256


@dataclass(frozen=True)
class Part:
    """Documents to prepare, and where to."""

    folder: Path
    documents: list[tuple[str, bool]]
    """texts, each with whether it is held out"""
    packing: str
    row_tokens: int


def make_part(part: Part, tokenizer: Tokenizer) -> None:
    """Writes a part's folder: whole or not at all.

    Raises: DataError when it cannot be written or the tokenizer's ids do not make sense.
    """
    unfinished = part.folder.with_name(f".{part.folder.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        content: dict[str, Any] = {}
        for split in SPLITS:
            texts = [text for text, heldout in part.documents if heldout == (split == "heldout")]
            content[split] = _make_split(texts, unfinished / split, part, tokenizer)
            if split == "heldout":
                _keep_documents(texts, unfinished / DOCUMENTS_FILE)
        (unfinished / PART_FILE).write_text(json.dumps(content))
        shutil.rmtree(part.folder, ignore_errors=True)
        unfinished.rename(part.folder)
    except (OSError, RuntimeError) as error:  # the latter from array_record
        raise DataError(f"{part.folder}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _make_split(texts: list[str], path: Path, part: Part, tokenizer: Tokenizer) -> dict[str, Any]:
    counts = Counts(num_documents=len(texts))

    def encoded(text: str) -> Iterator[np.ndarray]:
        kept: list[int] = []
        for ids in tokenizer.encode_chunks(text):
            counts.num_tokens += len(ids)
            counts.max_id = max(counts.max_id, int(ids.max(initial=0)))
            if not tokenizer.keeps_text:
                counts.num_unknown += int(np.count_nonzero(ids == tokenizer.unk_id))
                kept += ids.tolist()
            yield ids
        counts.num_changed += not tokenizer.keeps_text and tokenizer.decode(kept) != text

    rows = pack(
        map(encoded, texts), part.packing, part.row_tokens, tokenizer.bos_id, tokenizer.eos_id
    )
    if not texts:
        return {"counts": counts.as_dict(), "shard": None}
    counts.num_rows, digest = write_shard(path, RowCodec(part.row_tokens), rows)
    counts.num_tokens += len(texts)  # BOS among the inputs, EOS among the targets
    if counts.max_id >= tokenizer.vocab_size:
        raise DataError(
            f"the tokenizer made token id {counts.max_id}, "
            f"but its vocabulary has {tokenizer.vocab_size}"
        )
    if num_records(path) != counts.num_rows:
        raise OSError("rows written cannot be read back (is the disk full?)")
    shard = Shard(path.name, counts.num_rows, path.stat().st_size, file_sha256(path), digest)
    return {"counts": counts.as_dict(), "shard": asdict(shard)}


def _keep_documents(texts: list[str], path: Path) -> None:
    num_chars = 0
    with path.open("w", encoding="utf-8", errors="replace") as file:
        for text in texts[:KEPT_DOCUMENTS]:
            file.write(json.dumps({"text": text[:KEPT_CHARS]}) + "\n")
            num_chars += len(text)
            if num_chars >= KEPT_CHARS:
                break


def cut(documents: Iterable[tuple[str, bool]], num_bytes: int) -> Iterator[list[tuple[str, bool]]]:
    """The documents of a source of `num_bytes` in parts of about equal text."""
    limit = min(max(PART_CHARS, num_bytes // PARTS_WANTED), MAX_PART_CHARS)
    part: list[tuple[str, bool]] = []
    num_chars = 0
    for document in documents:
        part.append(document)
        num_chars += len(document[0])
        if num_chars >= limit:
            yield part
            part, num_chars = [], 0
    if part:
        yield part


def join_parts(folders: list[Path], content: dict[str, Any], target: Path) -> None:
    """Makes the folder of a source's rows from its parts; `content` goes into `rows.json`.

    Raises: DataError when a part is gone.
    """
    parts = [finished_part(folder) for folder in folders]
    if None in parts:
        raise DataError(f"{folders[parts.index(None)]}: disappeared while it was being written")
    joined = folders[0].with_name("joined")
    shutil.rmtree(joined, ignore_errors=True)
    joined.mkdir()
    splits: dict[str, Any] = {}
    for split in SPLITS:
        counts = Counts()
        shards = []
        made = [
            (f, p[split]) for f, p in zip(folders, parts, strict=True) if p and p[split]["shard"]
        ]
        for number, (folder, part) in enumerate(made):
            name = shard_name(split, number, len(made))
            try:
                (joined / name).hardlink_to(folder / split)
            except OSError:  # the file system has no links
                shutil.copyfile(folder / split, joined / name)
            shards.append({**part["shard"], "file": name})
            counts += Counts(**part["counts"])
        splits[split] = {"shards": shards, "counts": counts.as_dict()}
    lines: list[bytes] = []
    for folder in folders:
        lines += (folder / DOCUMENTS_FILE).read_bytes().splitlines(keepends=True)
        if len(lines) >= KEPT_DOCUMENTS or sum(map(len, lines)) >= KEPT_CHARS:
            break
    kept = b"".join(lines[:KEPT_DOCUMENTS])
    (joined / DOCUMENTS_FILE).write_bytes(kept)
    documents_sha256 = hashlib.sha256(kept).hexdigest()
    write_rows_meta(joined, {**content, "splits": splits, "documents_sha256": documents_sha256})
    shutil.rmtree(target, ignore_errors=True)
    joined.rename(target)


def finished_part(folder: Path) -> dict[str, Any] | None:
    """What a part holds; None when it still has to be made."""
    try:
        content = json.loads((folder / PART_FILE).read_text())
        for split in SPLITS:
            shard = content[split]["shard"]
            if shard and (folder / split).stat().st_size != shard["num_bytes"]:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return content
