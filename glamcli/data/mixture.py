"""Which prepared row is row k of a run: arithmetic, nothing to store and nothing to replay.

Row k is a pure function of (seed, stages, k, rows per source), so resuming is starting at k, any
number of hosts agree without a message, and "what did step N see" needs no log. Two ideas:

- Interleaving. A Huffman tree over the weights splits 0, 1, 2, ... in two at every node: of the
  first c rows that reach a node, round(c x share) go left. A source's rows in any window of
  length n then differ from weight x n by less than `MAX_DEVIATION`, for any number of sources,
  and both counting and locating take one step per level of the tree.
- Shuffling. A source's own sequence is epoch after epoch of its rows, each epoch in an order that
  depends on (seed, source name, epoch) alone (`shuffle.py`). Changing weights or adding sources
  only changes when the next row of a source comes, never which row that is.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from glamcli.data.shuffle import permute
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

    def _stage(self, k: int) -> _Stage:
        return next(stage for stage in reversed(self._stages) if stage.first_row <= k)

    def _used(self, k: int) -> tuple[int, ...]:
        """Rows of every source among rows 0..k of the run."""
        stage = self._stage(max(k - 1, 0))
        used = list(stage.used)
        _count(stage.tree, k - stage.first_row, used)
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
            if start < stop:
                at = np.arange(start - k0, stop - k0)
                first = stage.first_row
                self._fill(stage, stage.tree, start - first, stop - first, at, origins)
        return origins

    def _fill(
        self,
        stage: _Stage,
        node: int | _Split,
        start: int,
        stop: int,
        at: np.ndarray,
        origins: RowOrigins,
    ) -> None:
        """Writes the origins of rows start..stop, of those that reach `node`, at indices `at`."""
        if start == stop:
            return
        if isinstance(node, _Split):
            left = node.goes_left(start, stop)
            left0, left1 = node.num_left(start), node.num_left(stop)
            self._fill(stage, node.left, left0, left1, at[left], origins)
            self._fill(stage, node.right, start - left0, stop - left1, at[~left], origins)
            return
        name = self.names[node]
        size = self.num_rows[name]
        index = np.arange(start, stop, dtype=np.int64) + stage.used[node]
        origins.source[at] = node
        origins.epoch[at] = index // size
        for epoch in range(int(index[0]) // size, int(index[-1]) // size + 1):
            inside = index // size == epoch
            origins.row[at[inside]] = permute(index[inside] % size, size, self.seed, name, epoch)

    def history(self, k: int) -> dict[str, Any]:
        """Everything rows 0..k depend on, for JSON: equal histories mean equal rows so far.

        Weights appear as whole parts. Stages that start later are left out, and so are sources
        not read yet: both may be edited ahead of a resumed run.
        """
        used = self.counts(0, k)
        return {
            "seed": self.seed,
            "stages": [
                [stage.first_row, stage.parts] for stage in self._stages if stage.first_row < k
            ],
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
            raise RecipeError(f"weight of source `{name}` must be a number from 0 on, got {weight}")
    exact = {name: Fraction(str(weight)) for name, weight in weights.items() if weight}
    if not exact:
        raise RecipeError(f"no source has a positive weight, of {len(weights)}")
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


def _count(node: int | _Split, count: int, used: list[int]) -> None:
    """Adds to `used` what every source gets of the first `count` rows that reach `node`."""
    if isinstance(node, int):
        used[node] += count
        return
    left = node.num_left(count)
    _count(node.left, left, used)
    _count(node.right, count - left, used)
