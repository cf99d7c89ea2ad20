"""Scores of a run over its steps, with their errors, beside those that were published."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from glamcli.errors import GlamError
from glamcli.evals.results.scores import Measured, Reported, Results
from glamcli.evals.results.store import load_results
from glamcli.evals.scoring.totals import published_at
from glamcli.evals.tasks.schema import Task
from glamcli.evals.tasks.suites import TASKS, load_suite
from glamcli.report.curves import MAX_STEP, Curves
from glamcli.stored_runs import RESULTS_FOLDER
from glamcli.train.metrics import STDERR

AVERAGE = "average"
"""the metric of what is a mean over tasks."""
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
    """One metric of a task, or an average over tasks, at one number of shots."""

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
    at the same step, by task and number of shots; and what could not be read."""
    found: dict[tuple[str, str, str], ScoreCurve] = {}
    for name in curves.names("eval/"):
        of, _, shots = name.removeprefix("eval/").rpartition("/")
        if of and shots.endswith("_shots"):
            task, _, metric = of.rpartition("/") if "/" in of else (of, "", AVERAGE)
            key = (task, metric, shots.removesuffix("_shots"))
            errors = {each.step: each.mean for each in curves.points(name + STDERR)}
            points = [ScoreAt(at.step, at.mean, errors.get(at.step)) for at in curves.points(name)]
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
        for task, setting, num_items, each in _kept(results):
            key = (task, each.metric, setting)
            at = ScoreAt(step, each.value, each.stderr, num_items, path.name)
            found[key] = _with(found.get(key) or ScoreCurve(*key, []), at, each)
    tasks = list(dict.fromkeys(key[0] for key in found))
    ordered = sorted(found, key=lambda key: (tasks.index(key[0]), key[2].zfill(9)))
    return [found[key] for key in ordered], wrong


def _kept(results: Results) -> Iterator[tuple[str, str, int | None, Measured]]:
    """Task, setting, number of items and score: of all scores, and of averages that lack none."""
    for score in results.scores:
        for each in score.measured:
            yield score.task, score.setting, score.num_items, each
    for mean in results.averages:
        if mean.value is not None and not mean.missing:
            measured = Measured(AVERAGE, mean.value, None, {}, published=mean.published)
            yield mean.name, mean.setting, None, measured


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
    settings = _shipped(task)
    if settings is None:
        return ()
    return published_at(settings.published, metric, setting, settings.measured[0])


@lru_cache(maxsize=64)
def _shipped(name: str) -> Task | None:
    """The settings of a task that comes with the program."""
    if "/" in name or not (TASKS / f"{name}.yaml").is_file():
        return None
    with suppress(GlamError):
        return load_suite(name).tasks[0].at(0)
    return None


def models_of(curves: Iterable[ScoreCurve]) -> Sequence[str]:
    """Models that anything is published of, in order of appearance."""
    return list(dict.fromkeys(each.model for curve in curves for each in curve.published))
