"""The numbers of a run over its steps, thinned while they are read, in bounded memory.

A curve has at most `MAX_POINTS` points. While there are more, steps are taken together in twos,
fours, eights, ...; a point is then the mean of what was logged in its steps, and keeps the
least and greatest value of it, so that no spike is lost.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from glamcli.train.metric_files import as_number

MAX_POINTS = 1000
MAX_COLUMNS = 240
"""of a heat map."""
MAX_NAMES = 2000
MAX_LOADS = 1 << 16
"""layers x experts of a heat map."""
MAX_STEP = 1 << 53
"""Steps are exact in JavaScript below."""
LOAD = "load_by_layer"
EVALUATIONS = ("eval/", "heldout/", "unigram/")
"""How names of numbers begin that were measured at just one step."""

_Range = tuple[int, int, float, float, float]
"""the last step of a range, how many numbers, their sum, the least, the greatest"""
_Column = tuple[int, int, np.ndarray]
"""the last step of a range, how many loads, their sum"""
_Kind = TypeVar("_Kind")


class Point(NamedTuple):
    """A number at a step: of that step alone, or of all since the point before."""

    step: int
    mean: float
    low: float
    high: float


class Curves:
    """Curves by name. Each is thinned by itself: numbers that are rare keep all their points."""

    def __init__(self) -> None:
        self.num_left_out = 0
        """numbers of names beyond the first `MAX_NAMES`."""
        self.latest: dict[str, float] = {}
        self._curves: dict[str, _Ranges[_Range]] = {}

    @property
    def width(self) -> int:
        """The most steps that are taken together in a curve."""
        return max((curve.width for curve in self._curves.values()), default=1)

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Takes the numbers of a line; everything else in it is passed over."""
        for name, value in values.items():
            number = as_number(value)
            if number is None or name == "step":
                continue
            if name not in self._curves:
                if len(self._curves) >= MAX_NAMES:
                    self.num_left_out += 1
                    continue
                merge = _newer if name.startswith(EVALUATIONS) else _mean
                self._curves[name] = _Ranges(MAX_POINTS, merge)
            self.latest[name] = number
            self._curves[name].put(step, (step, 1, number, number, number))

    def points(self, name: str) -> list[Point]:
        """A curve in order of steps; empty for one that is not there."""
        ranges = self._curves[name].ordered() if name in self._curves else []
        return [Point(step, total / n, low, high) for step, n, total, low, high in ranges]

    def names(self, prefix: str) -> list[str]:
        """The names that begin so, in the order they came."""
        return [name for name in self.latest if name.startswith(prefix)]


class Loads:
    """The load of every expert over the steps, [layers, experts], thinned in the same way."""

    def __init__(self) -> None:
        self._shape: tuple[int, ...] | None = None
        self._columns = _Ranges[_Column](MAX_COLUMNS, _both)
        self.num_left_out = 0
        """lines with another number of layers or experts than the first, or with no numbers."""

    def add(self, step: int, load: Any) -> None:
        """Takes `load_by_layer` of a step."""
        try:
            shares = np.array(load, np.float64)
        except (ValueError, TypeError, OverflowError):
            shares = np.zeros(0)
        is_load = shares.ndim == 2 and 0 < shares.size <= MAX_LOADS and np.isfinite(shares).all()
        self._shape = self._shape or (shares.shape if is_load else None)
        if not is_load or shares.shape != self._shape:
            self.num_left_out += 1
            return
        self._columns.put(step, (step, 1, shares))

    def columns(self) -> tuple[list[int], np.ndarray]:
        """Last steps, and the mean shares since the column before, [columns, layers, experts]."""
        ordered = self._columns.ordered()
        if not ordered:
            return [], np.zeros((0, 0, 0))
        return [end for end, _, _ in ordered], np.stack([s / count for _, count, s in ordered])


class _Ranges(Generic[_Kind]):
    """Steps in at most `most` ranges of `width`, which are doubled while they are more; `merge`
    makes one of what is there in a range and what comes."""

    def __init__(self, most: int, merge: Callable[[_Kind, _Kind], _Kind]) -> None:
        self.width = 1
        self._most, self._merge = most, merge
        self._ranges: dict[int, _Kind] = {}

    def put(self, step: int, one: _Kind) -> None:
        self._add(step // self.width, one)
        while len(self._ranges) > self._most:
            self.width *= 2
            before, self._ranges = self._ranges, {}
            for at, each in before.items():
                self._add(at // 2, each)

    def ordered(self) -> list[_Kind]:
        return [self._ranges[at] for at in sorted(self._ranges)]

    def _add(self, at: int, more: _Kind) -> None:
        have = self._ranges.get(at)
        self._ranges[at] = more if have is None else self._merge(have, more)


def _mean(have: _Range, more: _Range) -> _Range:
    (a, n, total, low, high), (b, m, other, least, most) = have, more
    return (
        a if a > b else b,
        n + m,
        total + other,
        low if low < least else least,
        high if high > most else most,
    )


def _newer(have: _Range, more: _Range) -> _Range:
    """Of evaluations the newest alone: a mean of several was measured at no step."""
    return have if have[0] > more[0] else more


def _both(have: _Column, more: _Column) -> _Column:
    return max(have[0], more[0]), have[1] + more[1], have[2] + more[2]


def significant(values: Iterable[float]) -> list[float]:
    """The values with five digits, enough for a screen."""
    return [float(f"{value:.5g}") if math.isfinite(value) else 0.0 for value in values]
