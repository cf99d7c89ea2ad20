"""Which documents are held out from training: by a hash of their text, for all sources alike.

White space does not count, so copies that differ in nothing else fall on the same side in every
source, and the choice depends neither on order, nor on the seed, nor on the tokenizer. A source so
small that all its documents would fall on one side makes an exception: one of them changes sides,
in every source. So the exceptions of all sources are collected before any is prepared. The first
documents of a source, by digest, are kept in the cache.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glamcli import atomic
from glamcli.config.mixtures import Mixture
from glamcli.data.cache import cache_path, json_digest, writing_cache
from glamcli.data.sources import documents, source_inputs
from glamcli.progress import Progress
from glamcli.untrusted import parse_as, read_file

# Part of every key: raise it when the same inputs would give another division.
SPLIT_FORMAT = 1
# When one side has no document after this much text, by chance, it is given one.
WINDOW_DOCUMENTS = 2000
WINDOW_CHARS = 4 << 20
# Of a text, at once.
DIGESTED_CHARS = 1 << 20

Window = dict[bytes, int]
"""Digest and length of the different documents a source begins with."""


@dataclass(frozen=True)
class Sides:
    """The side of every text, in any source of a mixture."""

    heldout_frac: float
    exceptions: Mapping[bytes, bool]
    """by digest: whether it is held out, against its hash"""

    def divide(self, texts: Iterable[str]) -> Iterator[tuple[str, bool]]:
        """The documents in their order, each with whether it is held out."""
        for text in texts:
            key = document_digest(text)
            yield text, self.exceptions.get(key, is_heldout(key, self.heldout_frac))

    def inputs(self) -> dict[str, Any]:
        """Everything the division depends on, for a fingerprint."""
        moved = {key.hex(): side for key, side in sorted(self.exceptions.items())}
        return {"heldout_format": SPLIT_FORMAT, "heldout_frac": self.heldout_frac, "moved": moved}


def divide_mixture(mixture: Mixture, cache: Path, progress: Progress) -> Sides:
    """How the documents of a mixture are divided; reads the sources that are not in the cache.

    Raises: DataError for a source that cannot be read and a cache that cannot be written.
    """
    frac = mixture.heldout_frac
    if frac == 0:
        return Sides(0.0, {})
    windows: dict[str, Window] = {}
    missing: dict[str, Path] = {}
    for name, source in mixture.sources.items():
        inputs = {
            "format": SPLIT_FORMAT,
            "window": [WINDOW_DOCUMENTS, WINDOW_CHARS],
            "heldout_frac": frac,
            **source_inputs(source, name),
        }
        path = cache_path(cache, "heldout", json_digest(inputs)[:16])
        try:
            entries = parse_as(list[tuple[str, int]], read_file(path))
            windows[name] = {bytes.fromhex(key): size for key, size in entries}
        except (OSError, ValueError):
            windows[name] = {}
        if not windows[name]:  # also where a file is damaged
            missing[name] = path
    if missing:
        with (
            writing_cache(cache),
            progress.phase("choosing held-out documents", len(missing), "sources") as phase,
        ):
            for name, path in missing.items():
                windows[name] = first_documents(documents(mixture.sources[name], name), frac)
                content = [[key.hex(), size] for key, size in windows[name].items()]
                atomic.write(path, json.dumps(content))
                phase.advance()
    return Sides(frac, exceptions(windows, frac))


def first_documents(texts: Iterable[str], heldout_frac: float) -> Window:
    """A source's first documents: until both sides have one, or until a window is full."""
    window: Window = {}
    sides: set[bool] = set()
    num_chars = 0
    for num_read, text in enumerate(texts, 1):
        key = document_digest(text)
        window[key] = len(text)
        sides.add(is_heldout(key, heldout_frac))
        num_chars += len(text)
        full = num_read >= WINDOW_DOCUMENTS or num_chars >= WINDOW_CHARS
        if len(window) > 1 and (full or len(sides) == 2):
            break
    return window


def exceptions(windows: Mapping[str, Window], heldout_frac: float) -> dict[bytes, bool]:
    """The digests that change sides, so that every source trains on a document, and holds one out
    if it has two and can spare one.

    To be trained on, a source's longest document; to be held out, one with a low hash, if it can
    be among the shorter half, so that training loses little. Every source keeps a document
    to train on, also when others of its documents change sides for another source.
    """
    ordered = [windows[name] for name in sorted(windows)]
    held = {key: is_heldout(key, heldout_frac) for window in ordered for key in window}
    moved: dict[bytes, bool] = {}
    for window in ordered:
        if window and all(held[key] for key in window):
            moved[_by_length(window)[-1]] = held[_by_length(window)[-1]] = False
    for window in ordered:
        if any(held[key] for key in window):
            continue
        by_length = _by_length(window)
        half = len(window) // 2
        for key in sorted(by_length[:half]) + sorted(by_length[half:]):
            left = (sum(not held[each] for each in other) for other in ordered if key in other)
            if min(left) > 1:
                moved[key] = held[key] = True
                break
    return moved


def _by_length(window: Window) -> list[bytes]:
    return sorted(window, key=lambda key: (window[key], key))


def document_digest(text: str) -> bytes:
    """SHA-256 of the text with every run of white space as one space."""
    found = hashlib.sha256()
    begun = gap = False
    # Piece by piece: the words of a long text take a dozen times its memory.
    for start in range(0, len(text), DIGESTED_CHARS):
        part = text[start : start + DIGESTED_CHARS]
        words = " ".join(part.split())
        if words:
            between = " " if begun and (gap or part[0].isspace()) else ""
            found.update((between + words).encode("utf-8", "replace"))
        begun, gap = begun or bool(words), part[-1].isspace()
    return found.digest()


def is_heldout(key: bytes, heldout_frac: float) -> bool:
    """Whether a digest, read as a number in [0, 1), is below `heldout_frac`."""
    return int.from_bytes(key[:8], "big") < int(heldout_frac * 2**64)
