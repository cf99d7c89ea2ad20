"""A random order of the rows of a source without storing it: a keyed bijection, in O(1) per row."""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import numpy as np


def permute(positions: np.ndarray, size: int, seed: int, name: str, epoch: int) -> np.ndarray:
    """Images of `positions` under a bijection of 0..size keyed by (seed, name, epoch).

    A Feistel network on (row, column) of a grid just larger than `size`; what falls outside is
    sent through again until it falls inside, which keeps it a bijection (cycle walking).
    """
    num_rows = math.isqrt(size - 1) + 1
    num_columns = -(-size // num_rows)
    keys = _keys(seed, name, epoch)
    result = np.asarray(positions, np.uint64)
    outside = np.ones(result.shape, bool)
    while outside.any():
        row, column = np.divmod(result[outside], np.uint64(num_columns))
        for i in range(0, len(keys), 2):
            row = (row + _mix(column ^ keys[i]) % np.uint64(num_rows)) % np.uint64(num_rows)
            column = (column + _mix(row ^ keys[i + 1]) % np.uint64(num_columns)) % np.uint64(
                num_columns
            )
        result = result.copy()
        result[outside] = row * np.uint64(num_columns) + column
        outside = result >= np.uint64(size)
    return result.astype(np.int64)


@lru_cache(maxsize=4096)
def _keys(seed: int, name: str, epoch: int) -> np.ndarray:
    """Eight round keys for one pass over one source."""
    text = f"{seed}\0{epoch}\0{name}".encode()
    return np.frombuffer(hashlib.blake2b(text, digest_size=64).digest(), "<u8")


def _mix(x: np.ndarray) -> np.ndarray:
    """A well-spread 64-bit hash (the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
