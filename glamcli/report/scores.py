"""Scores of a run over its steps, with their errors, beside those that were published."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from glamcli.errors import GlamError
from glamcli.evals.results.scores import Measured, Reported
from glamcli.evals.results.store import load_results
from glamcli.evals.scoring.totals import published_at
from glamcli.evals.tasks.suites import TASKS, load_suite
from glamcli.report.curves import MAX_STEP, Curves
from glamcli.stored_runs import RESULTS_FOLDER
from glamcli.train.metrics import FAILED_TASKS

MAX_FILES = 500
"""of results that are read."""


@dataclass(frozen=True)
class ScoreAt:
    """A score at a step; `source` is the file it is from, empty for the metrics."""

    step: int
    value: float
    stderr: float | None = None
    num_items: int | None = None
    source: str = ""


@dataclass(frozen=True)
class ScoreCurve:
    """One metric of a task at one number of shots."""

    task: str
    metric: str
    setting: str
    """`0`, `1`, ... or `few` shots."""
    points: list[ScoreAt]
    random: float | None = None
    """what guessing would score."""
    published: tuple[Reported, ...] = field(default=())

    @property
    def in_percent(self) -> bool:
        """Whether values are shares, shown in percent; a perplexity is not."""
        return self.metric != "perplexity"


def score_curves(run_dir: Path, curves: Curves) -> tuple[list[ScoreCurve], list[str]]:
    """Every score of a run's metrics and of its kept results, which have errors and are preferred
    at the same step; and what could not be read."""
    found: dict[tuple[str, str, str], ScoreCurve] = {}
    for name in curves.names("eval/"):
        parts = name.removeprefix("eval/").rsplit("/", 2)
        if name != FAILED_TASKS and len(parts) == 3 and parts[2].endswith("_shots"):
            key = (parts[0], parts[1], parts[2].removesuffix("_shots"))
            points = [ScoreAt(each.step, each.mean) for each in curves.points(name)]
            found[key] = ScoreCurve(*key, points, published=_published(*key))
    wrong = []
    for path in sorted((run_dir / RESULTS_FOLDER).glob("*.json"))[-MAX_FILES:]:
        try:
            results = load_results(path)
        except GlamError as error:
            wrong.append(error.what)
            continue
        step = results.model.get("step")
        if type(step) is not int or not 0 <= step < MAX_STEP:
            continue
        for score in results.scores:
            for each in score.measured:
                key = (score.task, each.metric, score.setting)
                at = ScoreAt(step, each.value, each.stderr, score.num_items, path.name)
                found[key] = _with(found.get(key) or ScoreCurve(*key, []), at, each)
    return list(found.values()), wrong


def _with(curve: ScoreCurve, at: ScoreAt, measured: Measured) -> ScoreCurve:
    """The curve with a kept result in the place of what it had at this step, unless that is one of
    more items."""
    have = next((each for each in curve.points if each.step == at.step), None)
    if have and have.source and (have.num_items or 0) > (at.num_items or 0):
        return curve
    points = sorted([e for e in curve.points if e.step != at.step] + [at], key=lambda e: e.step)
    published = measured.published or curve.published
    random = measured.baselines.get("random")
    return replace(curve, points=points, random=random, published=published)


def _published(task: str, metric: str, setting: str) -> tuple[Reported, ...]:
    """What was published of a shipped task: its file has it."""
    if "/" in task or not (TASKS / f"{task}.yaml").is_file():
        return ()
    with suppress(GlamError):
        settings = load_suite(task).tasks[0].at(0)
        return published_at(settings.published, metric, setting, settings.measured[0])
    return ()


def models_of(curves: Iterable[ScoreCurve]) -> Sequence[str]:
    """Models that anything is published of, in order of appearance."""
    return list(dict.fromkeys(each.model for curve in curves for each in curve.published))
