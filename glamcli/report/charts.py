"""What is drawn: curves of runs over their steps, and loads of experts, as JSON for `report.js`.

Steps become tokens and FLOPs in the page, both being multiples of them.
"""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from glamcli.config.sizes import flops_per_token
from glamcli.errors import printable
from glamcli.report.curves import Point, significant
from glamcli.report.events import EVENT_KINDS
from glamcli.report.run import ReportRun
from glamcli.train.metric_files import as_number

PER_OCTAVE, FAIR, MOST = 32, 128, 255
"""A load is drawn as FAIR + PER_OCTAVE x log2(share x experts), from 1 to MOST, which is a
16th to 16 times an even share; 0 is no token."""


@dataclass(frozen=True)
class Line:
    """A curve of a run; `errors` are those of its points, half the height of their bars."""

    label: str
    run: int
    points: Sequence[Point]
    errors: Sequence[float] | None = None
    name: str = ""
    """in the metrics."""

    def to_json(self) -> dict[str, Any]:
        """For the page, its name escaped for a screen."""
        found: dict[str, Any] = {
            "label": printable(self.label),
            "run": self.run,
            "at": [each.step for each in self.points],
            "mean": significant(each.mean for each in self.points),
        }
        if any(each.low < each.high for each in self.points):
            found["low"] = significant(each.low for each in self.points)
            found["high"] = significant(each.high for each in self.points)
        if self.errors is not None:
            found["errors"] = significant(self.errors)
        return found


@dataclass(frozen=True)
class Chart:
    """Curves over the same axes."""

    title: str
    unit: str
    lines: Sequence[Line]
    is_log: bool = False
    from_zero: bool = False
    levels: Sequence[tuple[str, float]] = ()
    """lines across, each with its name."""

    def to_json(self) -> dict[str, Any]:
        """For the page."""
        return {
            "kind": "lines",
            "title": printable(self.title),
            "unit": self.unit,
            "log": self.is_log,
            "zero": self.from_zero,
            "levels": [[printable(n), y] for n, y in self.levels if math.isfinite(y)],
            "lines": [each.to_json() for each in self.lines],
        }

    @property
    def names(self) -> set[str]:
        """Those in the metrics."""
        return {each.name for each in self.lines}

    @property
    def words(self) -> str:
        """What it shows, for those who cannot see it."""
        ends = [
            f"{each.label} from {each.points[0].mean:.4g} at step {each.points[0].step:,} to "
            f"{each.points[-1].mean:.4g} at step {each.points[-1].step:,}"
            for each in self.lines
        ]
        return f"{self.title}, {self.unit}: {'; '.join(ends)}"


@dataclass(frozen=True)
class LoadChart:
    """Every expert's load of a layer over the steps."""

    title: str
    run: int
    steps: Sequence[int]
    shares: np.ndarray
    """[columns, experts]."""
    unit: str = "times an even share"

    def to_json(self) -> dict[str, Any]:
        """For the page: a byte per column and expert."""
        num_experts = self.shares.shape[1]
        with np.errstate(divide="ignore", invalid="ignore"):
            octaves = np.log2(self.shares * num_experts)
        drawn = np.clip(np.nan_to_num(FAIR + PER_OCTAVE * octaves, nan=0.0), 1, MOST)
        cells = np.where(self.shares > 0, np.round(drawn), 0).astype(np.uint8)
        return {
            "kind": "loads",
            "title": printable(self.title),
            "unit": self.unit,
            "run": self.run,
            "at": list(self.steps),
            "experts": num_experts,
            "fair": FAIR,
            "octave": PER_OCTAVE,
            "cells": base64.b64encode(cells.tobytes()).decode(),
        }

    @property
    def words(self) -> str:
        """What it shows, for those who cannot see it."""
        last = self.shares[-1] * self.shares.shape[1]
        return (
            f"{self.title}: at step {self.steps[-1]:,} the most popular expert has "
            f"{last.max():.3g} times an even share, the least popular {last.min():.3g} times"
        )


AnyChart = Chart | LoadChart


def curve_charts(
    runs: Sequence[ReportRun],
    title: str,
    unit: str,
    names: Mapping[str, str],
    *,
    scale: float = 1.0,
    **options: Any,
) -> list[Chart]:
    """Charts of the curves with these names in the metrics, by label. Those of one run share a
    chart; of several runs, each curve has its own, with a line per run. None without any point."""
    lines = [
        (label, Line(label, number, _scaled(points, scale), name=name))
        for label, name in names.items()
        for number, run in enumerate(runs)
        if (points := run.curves.points(name))
    ]
    return arranged(runs, title, unit, lines, **options)


def arranged(
    runs: Sequence[ReportRun],
    title: str,
    unit: str,
    lines: Sequence[tuple[str, Line]],
    **options: Any,
) -> list[Chart]:
    """Lines by label as one chart of one run, or as a chart per label of several."""
    if not lines:
        return []
    if len(runs) == 1:
        return [Chart(title, unit, [line for _, line in lines], **options)]
    charts = []
    labels = list(dict.fromkeys(label for label, _ in lines))
    for label in labels:
        mine = [replace(line, label=runs[line.run].name) for other, line in lines if other == label]
        named = title if label == title or len(labels) == 1 else f"{title}: {label}"
        charts.append(Chart(named, unit, mine, **options))
    return charts


def load_charts(runs: Sequence[ReportRun]) -> list[LoadChart]:
    """A heat map per run and expert layer."""
    charts = []
    for number, run in enumerate(runs):
        steps, shares = run.loads.columns()
        of = f", {run.name}" if len(runs) > 1 else ""
        for layer in range(shares.shape[1]):
            title = f"Load of every expert, layer {layer + 1}{of}"
            charts.append(LoadChart(title, number, steps, shares[:, layer]))
    return charts


def run_json(run: ReportRun) -> dict[str, Any]:
    """What the page needs of a run beside its curves: the sizes of a step, and its marks."""
    per_step = run.tokens_per_step
    flops = None if run.recipe is None else as_number(flops_per_token(run.recipe).training)
    return {
        "last": run.step,
        "tokens": per_step,
        "flops": None if flops is None or per_step is None else as_number(flops * per_step),
        "marks": [
            [each.step, each.kind, EVENT_KINDS[each.kind][0], printable(each.text)[:300]]
            for each in run.events
        ],
    }


def _scaled(points: Sequence[Point], scale: float) -> Sequence[Point]:
    if scale == 1.0:
        return points
    return [Point(p.step, p.mean * scale, p.low * scale, p.high * scale) for p in points]
