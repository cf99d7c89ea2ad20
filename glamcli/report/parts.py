"""What sections of a report are made of: HTML, charts, and small helpers for both."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from glamcli.report.charts import AnyChart
from glamcli.report.curves import Point
from glamcli.report.run import ReportRun

Runs = Sequence[ReportRun]
Part = str | AnyChart


@dataclass
class Section:
    """A part of the page; `parts` are HTML and charts in order, and where there are none, `missing`
    says why."""

    title: str
    parts: list[Part] = field(default_factory=list)
    missing: str = ""


def soft(html: str) -> str:
    """A line of small print."""
    return f"<p class=soft>{html}</p>"


def head_of(runs: Runs) -> list[str]:
    """The column of the runs' names, where there are several."""
    return ["run"] if len(runs) > 1 else []


def name_of(runs: Runs, run: ReportRun) -> list[str]:
    """A run's cell in that column."""
    return [run.name] if len(runs) > 1 else []


def number_text(value: float | None, form: str = ".3f") -> str:
    """A number as text, `-` for none; a large one with few digits."""
    if value is None:
        return "-"
    return format(value, form if abs(value) < 1e6 else ".4g")


def points_of(values: Iterable[tuple[int, float]], scale: float = 1.0) -> list[Point]:
    """Points of single steps."""
    return [Point(step, value * scale, value * scale, value * scale) for step, value in values]
