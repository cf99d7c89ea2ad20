"""Averages over the tasks of a suite, by a rule that is told beside them.

An entry is a task (its first metric) or `task/metric`; every entry counts the same, whatever its
number of items. What is missing is named, and the mean of the rest is never shown without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from glamcli.evals.results.scores import Average, Reported, Score
from glamcli.evals.tasks.suites import SuiteFile

OVERALL = "overall"


def averages(suite: SuiteFile, scores: Sequence[Score], settings: Sequence[str]) -> list[Average]:
    """Every average of the suite at every number of shots, `overall` last."""
    wanted = {name: list(entries) for name, entries in suite.averages.items()}
    if suite.overall:
        wanted[OVERALL] = [entry for name in suite.overall for entry in suite.averages[name]]
    return [
        _average(suite, name, entries, setting, _entries(scores, setting))
        for name, entries in wanted.items()
        for setting in settings
    ]


def rule(suite: SuiteFile) -> str:
    """The rule of the averages, in words; empty for a suite without any."""
    if not suite.averages:
        return ""
    words = "averages: arithmetic means of task scores, every entry alike"
    entries = {entry for each in suite.averages.values() for entry in each}
    tasks: dict[str, list[str]] = {}
    for entry in sorted(entries):
        task, _, metric = entry.partition("/")
        tasks.setdefault(task, []).append(metric)
    for task, metrics in tasks.items():
        if len(metrics) > 1:
            words += f"; {task} counts {len(metrics)} times, by {' and '.join(metrics)}"
    if suite.overall:
        count = sum(len(suite.averages[name]) for name in suite.overall)
        words += f"; overall: over the {count} entries of {' and '.join(suite.overall)}"
    return words


def _entries(scores: Sequence[Score], setting: str) -> dict[str, float]:
    """Scores by entry: every metric of a task, and its first one by the task's name alone."""
    found: dict[str, float] = {}
    for score in scores:
        if score.setting == setting:
            found[score.task] = score.measured[0].value
            found |= {f"{score.task}/{each.metric}": each.value for each in score.measured}
    return found


def _average(
    suite: SuiteFile,
    name: str,
    entries: Sequence[str],
    setting: str,
    found: Mapping[str, float],
) -> Average:
    values = [found[entry] for entry in entries if entry in found]
    return Average(
        name=name,
        setting=setting,
        value=math.fsum(values) / len(values) if values else None,
        num_entries=len(entries),
        missing=tuple(entry for entry in entries if entry not in found),
        published=tuple(
            Reported(each.model, value, each.confirmed)
            for each in suite.published
            if each.of == name and (value := each.at(setting)) is not None
        ),
    )
