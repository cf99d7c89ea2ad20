"""The tokenizer of a recipe: a model file, plain bytes, or trained on the mixture's documents.

Which text a tokenizer is trained on is decided here: training documents only, from every source by
its weight. How one is trained and used is `tokenizer.py`.
"""

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from itertools import accumulate
from pathlib import Path

from glamcli import atomic
from glamcli.config.mixtures import Mixture, Source
from glamcli.config.schema import Recipe
from glamcli.data.cache import cache_path, json_digest, shared_cache, writing_cache
from glamcli.data.shared import copy_entry, share_entry
from glamcli.data.sources import documents, source_inputs
from glamcli.data.split import Sides, divide_mixture
from glamcli.data.tokenizer import (
    Bytes,
    SentencePiece,
    Tokenizer,
    load_sentencepiece,
    slices,
    train_sentencepiece,
)
from glamcli.errors import DataError
from glamcli.progress import Progress
from glamcli.storage import Remote, place
from glamcli.untrusted import parse_json, read_file

# Part of every key: raise it when the same inputs would give another tokenizer.
VOCABULARY_FORMAT = 3
# Text to train on: enough for the counts of a small vocabulary, and growing with it.
SAMPLE_CHARS = 4 << 20
SAMPLE_CHARS_PER_PIECE = 1024
# A document is sampled in passages, so that a few long ones do not make up a whole sample.
PASSAGE_CHARS = 1 << 14
# Of a source, this many times its share is read at most.
READ_SHARES = 64


def open_tokenizer(recipe: Recipe, mixture: Mixture, cache: Path, progress: Progress) -> Tokenizer:
    """The recipe's tokenizer, trained now when it has to be and is not in the cache.

    Raises: DataError for a file that is not a tokenizer or was damaged, for too little text, and
        for a cache folder that cannot be written.
    """
    spec = recipe.data.tokenizer
    if spec.kind == "bytes":
        return Bytes()
    if spec.path is not None:
        return load_sentencepiece(place(spec.path))
    vocab_size = spec.train_vocab_size or recipe.model.vocab_size
    with writing_cache(cache):
        sides = divide_mixture(mixture, cache, progress)
        inputs = {
            "format": VOCABULARY_FORMAT,
            "vocab_size": vocab_size,
            **sides.inputs(),
            "sources": {
                name: {"weight": source.weight, **source_inputs(source, name)}
                for name, source in mixture.sources.items()
            },
        }
        path = cache_path(cache, "tokenizers", json_digest(inputs)[:16])
        record, shared = path.with_suffix(".json"), shared_cache(recipe)
        there = shared and shared / "tokenizers" / path.stem
        if there and not record.exists():
            _copy(there, path, record, progress)
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            recorded = parse_json(read_file(record))["sha256"]
            if path.exists():
                tokenizer = load_sentencepiece(path)
                if tokenizer.fingerprint != recorded:
                    raise DataError(
                        f"{path}: checksum differs from the one recorded when it was trained",
                        hint=f"delete {record}; the next run trains it again",
                    )
                if there:
                    share_entry(there, (path, record), progress)
                return tokenizer
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):  # before minutes of training rather than after
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path.parent))
        tokenizer = train_on(mixture, vocab_size, sides, path, progress)
        content = {"inputs": inputs, "sha256": tokenizer.fingerprint}
        atomic.write(record, json.dumps(content, indent=1, sort_keys=True) + "\n")
        if there:
            share_entry(there, (path, record), progress)
        return tokenizer


def _copy(there: Remote, path: Path, record: Path, progress: Progress) -> None:
    """Copies a shared tokenizer, if there is one, its record last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        copy = Path(folder, path.stem)
        if copy_entry(there, copy, progress):
            for file in (path, record):
                os.replace(copy / file.name, file)


def train_on(
    mixture: Mixture, vocab_size: int, sides: Sides, path: Path, progress: Progress
) -> SentencePiece:
    """Trains a tokenizer on a sample of the mixture's documents and writes it to `path`."""
    total = max(SAMPLE_CHARS, vocab_size * SAMPLE_CHARS_PER_PIECE)
    all_weights = sum(source.weight for source in mixture.sources.values())
    sample: list[str] = []
    with progress.phase("training the tokenizer", len(mixture.sources), "sources") as phase:
        for name, source in mixture.sources.items():
            num_chars = round(total * source.weight / all_weights)
            sample += _passages(source, name, sides, num_chars)
            phase.advance()
        return train_sentencepiece(sample, vocab_size, path)


def _passages(source: Source, name: str, sides: Sides, num_chars: int) -> list[str]:
    """About `num_chars` of a source's training text: the passages with the lowest hashes."""
    kept: list[tuple[bytes, str]] = []
    num_kept = num_read = 0
    training = (text for text, heldout in sides.divide(documents(source, name)) if not heldout)
    for passage in (part for text in training for part in slices(text, PASSAGE_CHARS)):
        if num_read >= READ_SHARES * num_chars:
            break
        num_read += len(passage)
        num_kept += len(passage)
        kept.append((hashlib.sha256(passage.encode()).digest(), passage))
        if num_kept > 4 * num_chars:
            kept = _lowest(kept, num_chars)
            num_kept = sum(len(passage) for _, passage in kept)
    return [passage for _, passage in _lowest(kept, num_chars)]


def _lowest(kept: list[tuple[bytes, str]], num_chars: int) -> list[tuple[bytes, str]]:
    """The entries with the lowest hashes that together have `num_chars`."""
    kept = sorted(kept)
    before = accumulate((len(passage) for _, passage in kept), initial=0)
    return [entry for entry, total in zip(kept, before, strict=False) if total < num_chars]
