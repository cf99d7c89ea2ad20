"""The numbers of a run over its steps, thinned while they are read, in bounded memory.

A curve has at most `MAX_POINTS` points. While there are more, steps are taken together in twos,
fours, eights, ...; a point is then the mean of its steps, and keeps their least and greatest value,
so that no spike is lost.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

MAX_POINTS = 1000
MAX_COLUMNS = 240
"""of a heat map."""
MAX_NAMES = 2000
MAX_LOADS = 1 << 16
"""layers x experts of a heat map."""
MAX_STEP = 1 << 53
"""Steps are exact in JavaScript below."""
LOAD = "load_by_layer"
_HUGE = 1e300  # so that a sum of several stays finite

_Sums = dict[str, list[float]]


class Point(NamedTuple):
    """A number at a step: of that step alone, or of all since the point before."""

    step: int
    mean: float
    low: float
    high: float


class Curves:
    """Curves by name. All of them have their points in the same ranges of `width` steps."""

    def __init__(self) -> None:
        self.width = 1
        self.num_left_out = 0
        """numbers of names beyond the first `MAX_NAMES`."""
        self.latest: dict[str, float] = {}
        self._ends: dict[int, int] = {}
        """by range, its last step."""
        self._sums: dict[int, _Sums] = {}
        """by range and name: how many, sum, least, greatest."""

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Takes the numbers of a line; everything else in it is passed over."""
        at = step // self.width
        sums = self._sums.setdefault(at, {})
        self._ends[at] = max(step, self._ends.get(at, 0))
        for name, value in values.items():
            number = as_number(value)
            if number is None or name == "step":
                continue
            if name not in self.latest and len(self.latest) >= MAX_NAMES:
                self.num_left_out += 1
                continue
            self.latest[name] = number
            if name in sums:
                _add(sums[name], 1, number, number, number)
            else:
                sums[name] = [1, number, number, number]
        while len(self._sums) > MAX_POINTS:
            self._widen()

    def points(self, name: str) -> list[Point]:
        """A curve in order of steps; empty for one that is not there."""
        found = []
        for at in sorted(self._sums):
            if name in self._sums[at]:
                count, total, low, high = self._sums[at][name]
                found.append(Point(self._ends[at], total / count, low, high))
        return found

    def names(self, prefix: str) -> list[str]:
        """The names that begin so, in the order they came."""
        return [name for name in self.latest if name.startswith(prefix)]

    def _widen(self) -> None:
        self.width *= 2
        sums: dict[int, _Sums] = {}
        ends: dict[int, int] = {}
        for at, each in self._sums.items():
            ends[at // 2] = max(self._ends[at], ends.get(at // 2, 0))
            wide = sums.setdefault(at // 2, {})
            for name, more in each.items():
                if name in wide:
                    _add(wide[name], *more)
                else:
                    wide[name] = more
        self._sums, self._ends = sums, ends


def _add(have: list[float], count: float, total: float, low: float, high: float) -> None:
    have[0] += count
    have[1] += total
    if low < have[2]:
        have[2] = low
    if high > have[3]:
        have[3] = high


def as_number(value: Any) -> float | None:
    """A JSON number as a float; None for anything else, and where it is not finite."""
    if type(value) is float:
        return value if -_HUGE < value < _HUGE else None
    if type(value) is int:  # not `True`
        return float(value) if -_HUGE < value < _HUGE else None
    return None


class Loads:
    """The load of every expert over the steps, [layers, experts], thinned in the same way."""

    def __init__(self) -> None:
        self._width = 1
        self._shape: tuple[int, ...] | None = None
        self._columns: dict[int, tuple[int, int, np.ndarray]] = {}
        """by range of steps: its last one, how many, their sum."""
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
        _add_column(self._columns, step // self._width, (step, 1, shares))
        while len(self._columns) > MAX_COLUMNS:
            self._width *= 2
            before, self._columns = self._columns, {}
            for at, column in before.items():
                _add_column(self._columns, at // 2, column)

    def columns(self) -> tuple[list[int], np.ndarray]:
        """Last steps, and the mean shares since the column before, [columns, layers, experts]."""
        ordered = [self._columns[at] for at in sorted(self._columns)]
        if not ordered:
            return [], np.zeros((0, 0, 0))
        return [end for end, _, _ in ordered], np.stack([s / count for _, count, s in ordered])


def _add_column(
    columns: dict[int, tuple[int, int, np.ndarray]], at: int, more: tuple[int, int, np.ndarray]
) -> None:
    if at not in columns:
        columns[at] = more
        return
    have = columns[at]
    columns[at] = max(have[0], more[0]), have[1] + more[1], have[2] + more[2]


def significant(values: Iterable[float]) -> list[float]:
    """The values with five digits, enough for a screen."""
    return [float(f"{value:.5g}") if math.isfinite(value) else 0.0 for value in values]
