"""Equal documents in and between sources, counted by hash (`glam data verify --duplicates`)."""

from __future__ import annotations

import hashlib

import numpy as np

from glamcli.config.mixtures import Mixture
from glamcli.data.sources import documents
from glamcli.progress import Progress


def count_duplicates(mixture: Mixture, progress: Progress) -> dict[str, tuple[int, int]]:
    """Per source: documents equal to an earlier one of it, and those of an earlier source.

    Reads every source once and keeps 8 bytes per document: among 2^32 documents about one pair
    is taken for equal that is not.
    """
    before = np.zeros(0, np.uint64)
    counts = {}
    for name, source in mixture.sources.items():
        with progress.phase(f"reading `{name}`", None, "documents") as phase:
            hashes = []
            for text in documents(source, name):
                data = text.encode("utf-8", "surrogatepass")
                hashes.append(hashlib.blake2b(data, digest_size=8).digest())
                phase.advance()
        found = np.frombuffer(b"".join(hashes), np.uint64)
        unique = np.unique(found)
        across = int(np.isin(unique, before, assume_unique=True).sum())
        counts[name] = (len(found) - len(unique), across)
        before = np.union1d(before, unique)
    return counts
