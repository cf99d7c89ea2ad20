"""Which prepared row is row k of a run: arithmetic, nothing to store and nothing to replay.

Row k is a pure function of (seed, stages, k, rows per source), so resuming is starting at k, any
number of hosts agree without a message, and "what did step N see" needs no log. Two ideas:

- Interleaving. A Huffman tree over the weights splits 0, 1, 2, ... in two at every node: of the
  first c rows that reach a node, round(c x share) go left. A source's rows in any window of
  length n then differ from weight x n by less than `MAX_DEVIATION`, for any number of sources,
  and both counting and locating take one step per level of the tree.
- Shuffling. A source's own sequence is epoch after epoch of its rows, each epoch in an order that
  depends on (seed, source name, epoch) alone (`permute`). Changing weights or adding sources
  only changes when the next row of a source comes, never which row that is.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from glamcli.errors import DataError, RecipeError

# An inner node carries at most 2/3 of its parent (Huffman: its parts were no heavier than its
# sibling), and a split adds less than 1, so the deviation d obeys d < 1 + 2/3 d: below 3 at inner
# nodes, below 1 + 3 at sources.
MAX_DEVIATION = 4

# Weights become integers that sum to this at most; finer differences are rounded away.
WEIGHT_PARTS = 2**40
# With sums up to WEIGHT_PARTS, this many rows at a time fit the arithmetic into 64 bits.
MAX_RANGE = 2**20


class RowOrigin(NamedTuple):
    """Where a row of the run comes from: source, pass over it, and which of its rows."""

    source: str
    epoch: int
    row: int


class RowOrigins(NamedTuple):
    """The same for a range of rows: three arrays of equal length; `source` indexes `names`."""

    source: np.ndarray
    epoch: np.ndarray
    row: np.ndarray


@dataclass(frozen=True)
class _Split:
    """A node of the tree; a leaf is the index of a source."""

    left: int | _Split
    right: int | _Split
    left_parts: int
    parts: int

    def num_left(self, count: int) -> int:
        """How many of the first `count` rows go left: count x share, rounded half up."""
        return (2 * count * self.left_parts + self.parts) // (2 * self.parts)

    def goes_left(self, start: int, stop: int) -> np.ndarray:
        """For rows start..stop: whether each goes left."""
        base = (2 * start * self.left_parts + self.parts) % (2 * self.parts)
        steps = np.arange(stop - start + 1, dtype=np.int64) * (2 * self.left_parts) + base
        return np.diff(steps // (2 * self.parts)) == 1


@dataclass(frozen=True)
class _Stage:
    first_row: int
    parts: dict[str, int]
    tree: int | _Split
    used: tuple[int, ...]
    """rows of every source consumed by earlier stages."""


class Schedule:
    """The order of rows of a run (GLaM section 3: sources sampled by fixed weights).

    `stages` are (first row, weights) pairs, the first at row 0; a source without a weight has
    none. Weights are relative and decimal: 0.42 means 42/100 exactly.

    Raises: RecipeError for weights without a meaning, DataError when a weighted source is empty.
    """

    def __init__(
        self,
        seed: int,
        stages: Sequence[tuple[int, Mapping[str, float]]],
        num_rows: Mapping[str, int],
    ):
        if not stages or stages[0][0] != 0:
            raise ValueError("the first stage starts at row 0")
        self.seed = seed
        self.num_rows = dict(num_rows)
        self.names = tuple(num_rows)
        self._stages: list[_Stage] = []
        for first_row, weights in stages:
            if self._stages and first_row <= (before := self._stages[-1].first_row):
                raise ValueError(f"stage at row {first_row} is not after row {before}")
            parts = integer_weights(weights)
            for name in parts:
                if name not in self.num_rows:
                    raise RecipeError(
                        f"the mixture gives a weight to `{name}`, which is not a source"
                    )
                if not self.num_rows[name]:
                    raise DataError(
                        f"source `{name}` has weight {weights[name]} but no rows",
                        hint="set its weight to 0, or check its path and filters",
                    )
            used = self._used(first_row) if self._stages else (0,) * len(self.names)
            self._stages.append(_Stage(first_row, parts, _huffman(parts, self.names), used))

    def _used(self, k: int) -> tuple[int, ...]:
        """Rows of every source among rows 0..k of the run."""
        stage = next(s for s in reversed(self._stages) if s.first_row < k or s.first_row == 0)
        used = list(stage.used)
        nodes: list[tuple[int | _Split, int]] = [(stage.tree, k - stage.first_row)]
        while nodes:
            node, count = nodes.pop()
            if isinstance(node, _Split):
                left = node.num_left(count)
                nodes += [(node.left, left), (node.right, count - left)]
            else:
                used[node] += count
        return tuple(used)

    def counts(self, k0: int, k1: int) -> dict[str, int]:
        """Rows of every source among rows k0..k1, by arithmetic."""
        before, after = self._used(k0), self._used(k1)
        return {name: after[i] - before[i] for i, name in enumerate(self.names)}

    def epochs(self, k: int) -> dict[str, float]:
        """Passes over every source after k rows; 0 for an empty source."""
        counts = self.counts(0, k)
        return {name: counts[name] / max(self.num_rows[name], 1) for name in self.names}

    def locate(self, k: int) -> RowOrigin:
        """Where row k of the run comes from."""
        origins = self.locate_range(k, k + 1)
        return RowOrigin(self.names[origins.source[0]], int(origins.epoch[0]), int(origins.row[0]))

    def locate_range(self, k0: int, k1: int) -> RowOrigins:
        """Where rows k0..k1 of the run come from (at most `MAX_RANGE` of them)."""
        if not 0 <= k0 <= k1 or k1 - k0 > MAX_RANGE:
            raise ValueError(f"rows {k0}..{k1}: at most {MAX_RANGE} at a time")
        length = k1 - k0
        origins = RowOrigins(
            np.zeros(length, np.int32), np.zeros(length, np.int64), np.zeros(length, np.int64)
        )
        ends = [stage.first_row for stage in self._stages[1:]] + [k1]
        for stage, end in zip(self._stages, ends, strict=True):
            start, stop = max(k0, stage.first_row), min(k1, end)
            at = np.arange(start - k0, max(start, stop) - k0)
            reached = _reached(stage.tree, start - stage.first_row, at) if len(at) else ()
            for source, first, here in reached:
                name, size = self.names[source], self.num_rows[self.names[source]]
                index = np.arange(first, first + len(here)) + stage.used[source]
                origins.source[here] = source
                origins.epoch[here] = index // size
                for epoch in range(int(index[0]) // size, int(index[-1]) // size + 1):
                    inside = index // size == epoch
                    rows = permute(index[inside] % size, size, self.seed, name, epoch)
                    origins.row[here[inside]] = rows
        return origins

    def history(self, k: int) -> dict[str, Any]:
        """Everything rows 0..k depend on, for JSON: equal histories mean equal rows so far.

        Weights appear as whole parts. Stages that start later are left out, and so are sources
        not read yet: both may be edited ahead of a resumed run.
        """
        used = self.counts(0, k)
        return {
            "seed": self.seed,
            "stages": [[s.first_row, s.parts] for s in self._stages if s.first_row < k],
            "num_rows": {name: self.num_rows[name] for name in self.names if used[name]},
        }


def integer_weights(weights: Mapping[str, float]) -> dict[str, int]:
    """Whole parts in the exact proportion of decimal `weights`, zero weights left out.

    Beyond `WEIGHT_PARTS` parts in all they are rounded by largest remainder; every positive
    weight keeps at least one part.

    Raises: RecipeError for a negative or not finite weight, or when none is positive.
    """
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise RecipeError(f"weight of source `{name}` must be 0 or more, got {weight}")
    exact = {name: Fraction(str(weight)) for name, weight in weights.items() if weight}
    if not exact:
        raise RecipeError(f"none of the {len(weights)} sources has a positive weight")
    total = sum(exact.values(), Fraction(0))
    shares = {name: weight / total for name, weight in exact.items()}
    denominator = math.lcm(*(share.denominator for share in shares.values()))
    if denominator <= WEIGHT_PARTS:
        return {name: int(share * denominator) for name, share in shares.items()}
    scaled = {name: share * (WEIGHT_PARTS - len(shares)) for name, share in shares.items()}
    parts = {name: int(scaled[name]) + 1 for name in shares}
    by_remainder = sorted(shares, key=lambda name: (parts[name] - scaled[name], name))
    for name in by_remainder[: WEIGHT_PARTS - sum(parts.values())]:
        parts[name] += 1
    return parts


def _huffman(parts: Mapping[str, int], names: Sequence[str]) -> int | _Split:
    """The tree that joins the two lightest nodes until one is left; ties go by source name."""
    order = itertools.count()
    heap: list[tuple[int, int, int | _Split]] = [
        (parts[name], next(order), names.index(name)) for name in sorted(parts)
    ]
    heapq.heapify(heap)
    while len(heap) > 1:
        right_parts, _, right = heapq.heappop(heap)
        left_parts, _, left = heapq.heappop(heap)
        both = left_parts + right_parts
        heapq.heappush(heap, (both, next(order), _Split(left, right, left_parts, both)))
    return heap[0][2]


def _reached(
    node: int | _Split, start: int, at: np.ndarray
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Of the rows from `start` on that reach `node`, with indices `at`: for every source that has
    some of them, which of its rows is the first, and the indices."""
    if isinstance(node, int):
        yield node, start, at
        return
    is_left, left_start = node.goes_left(start, start + len(at)), node.num_left(start)
    if is_left.any():
        yield from _reached(node.left, left_start, at[is_left])
    if not is_left.all():
        yield from _reached(node.right, start - left_start, at[~is_left])


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


@functools.lru_cache(maxsize=4096)
def _keys(seed: int, name: str, epoch: int) -> np.ndarray:
    """Eight round keys for one pass over one source."""
    text = f"{seed}\0{epoch}\0{name}".encode()
    return np.frombuffer(hashlib.blake2b(text, digest_size=64).digest(), "<u8")


def _mix(x: np.ndarray) -> np.ndarray:
    """A well-spread 64-bit hash (the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
