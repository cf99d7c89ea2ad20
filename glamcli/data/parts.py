"""Parts of a source: some documents each, tokenised and packed into a shard per split, then joined.

Parts are cut by text alone and made independently of each other, in any process, so the bytes on
disk do not depend on the number of processes, and a finished part survives an interruption.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glamcli.data.cache import ANOTHER_CACHE
from glamcli.data.pack import pack
from glamcli.data.rows import Counts, Shard, write_rows_meta, write_shard
from glamcli.data.tokenizer import Tokenizer
from glamcli.errors import DataError
from glamcli.untrusted import parse_as, read_file

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

Document = tuple[str, bool]
"""a text, and whether it is held out"""


def make_part(
    tokenizer: Tokenizer, packing: str, row_tokens: int, folder: Path, documents: list[Document]
) -> None:
    """Writes the folder of a part: whole or not at all.

    Raises: DataError when it cannot be written or the tokenizer's ids do not make sense.
    """
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        train = [text for text, is_heldout in documents if not is_heldout]
        heldout = [text for text, is_heldout in documents if is_heldout]
        content = {
            split: _make_split(texts, unfinished / split, packing, row_tokens, tokenizer)
            for split, texts in zip(SPLITS, (train, heldout), strict=True)
        }
        _keep_documents(heldout, unfinished / DOCUMENTS_FILE)
        (unfinished / PART_FILE).write_text(json.dumps(content))
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    except (OSError, RuntimeError) as error:  # the latter from array_record
        reason = getattr(error, "strerror", None) or str(error).split(";")[0]
        raise DataError(f"{folder}: cannot be written: {reason}", ANOTHER_CACHE) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _make_split(
    texts: list[str], path: Path, packing: str, row_tokens: int, tokenizer: Tokenizer
) -> dict[str, Any]:
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

    if not texts:
        return {"counts": counts.as_dict(), "shard": None}
    bos_id, eos_id = tokenizer.bos_id, tokenizer.eos_id
    shard = write_shard(
        path, row_tokens, pack(map(encoded, texts), packing, row_tokens, bos_id, eos_id)
    )
    counts.num_rows = shard.num_rows
    counts.num_tokens += len(texts)  # BOS among the inputs, EOS among the targets
    if counts.max_id >= tokenizer.vocab_size:
        raise DataError(
            f"the tokenizer made token id {counts.max_id}, "
            f"but its vocabulary has {tokenizer.vocab_size}"
        )
    return {"counts": counts.as_dict(), "shard": asdict(shard)}


def _keep_documents(texts: list[str], path: Path) -> None:
    num_chars = 0
    with path.open("w", encoding="utf-8", errors="replace") as file:
        for text in texts[:KEPT_DOCUMENTS]:
            file.write(json.dumps({"text": text[:KEPT_CHARS]}) + "\n")
            num_chars += len(text)
            if num_chars >= KEPT_CHARS:
                break


def part_chars(num_bytes: int) -> int:
    """Characters of a part of a source whose files have `num_bytes`."""
    return min(max(PART_CHARS, num_bytes // PARTS_WANTED), MAX_PART_CHARS)


def cut(documents: Iterable[Document], limit: int) -> Iterator[list[Document]]:
    """The documents in parts of `limit` characters, or some more."""
    part: list[Document] = []
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
        made = [(f, p[split]) for f, p in zip(folders, parts, strict=True) if p and p[split].shard]
        for number, (folder, part) in enumerate(made):
            # The file name TFDS expects.
            name = f"rows-{split}.array_record-{number:05d}-of-{len(made):05d}"
            try:
                (joined / name).hardlink_to(folder / split)
            except OSError:  # the file system has no links
                shutil.copyfile(folder / split, joined / name)
            shards.append({**vars(part.shard), "file": name})
            counts += part.counts
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


@dataclass(frozen=True)
class _Made:
    """A split of a part."""

    counts: Counts
    shard: Shard | None


def finished_part(folder: Path) -> dict[str, _Made] | None:
    """What a part holds; None when it still has to be made."""
    try:
        content = parse_as(dict[str, _Made], read_file(folder / PART_FILE))
        for split in SPLITS:
            shard = content[split].shard
            if shard and (folder / split).stat().st_size != shard.num_bytes:
                return None
    except (OSError, ValueError, KeyError):
        return None
    return content
