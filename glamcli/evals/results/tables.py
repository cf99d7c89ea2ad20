"""Scores as cells of tables: in percent, with errors, baselines and what others published."""

from __future__ import annotations

from collections.abc import Sequence

from glamcli.evals.results.scores import Average, Reported, Score

TABLE_COLUMNS = (
    "task",
    ">shots",
    "metric",
    ">score",
    ">error",
    ">random",
    ">position",
    ">majority",
    ">items",
    ">fitted",
)
LARGE_PERPLEXITY = 1e6
UNCONFIRMED = "?"
"""behind published scores that were not seen in the paper itself"""


def models(entries: Sequence[Sequence[Reported]]) -> list[str]:
    """Models that anything is published of, in order of appearance."""
    return list(dict.fromkeys(each.model for entry in entries for each in entry))


def score_columns(scores: Sequence[Score]) -> tuple[str, ...]:
    """Names of the columns; `>` marks those aligned to the right."""
    return (*TABLE_COLUMNS, *(f">{model}" for model in _models(scores)))


def table_rows(scores: Sequence[Score]) -> list[list[str]]:
    """Cells of the table people see: one row per score and metric, in percent."""
    others = _models(scores)
    rows = []
    for score in scores:
        for measured in score.measured:
            base = (measured.baselines[name] for name in ("random", "position", "majority"))
            error = measured.stderr
            rows.append(
                [
                    score.task,
                    str(score.shots),
                    measured.metric,
                    shown(measured.metric, measured.value),
                    "" if error is None else "± " + shown(measured.metric, error),
                    *("-" if each is None else shown(measured.metric, each) for each in base),
                    str(score.num_items),
                    f"{score.shots_fitted:.1f}",
                    *reported(others, measured.published),
                ]
            )
    return rows


def average_columns(averages: Sequence[Average]) -> tuple[str, ...]:
    """The same for averages."""
    others = models([each.published for each in averages])
    return ("average", ">shots", ">score", ">entries", *(f">{model}" for model in others))


def average_rows(averages: Sequence[Average]) -> list[list[str]]:
    """One row per average and number of shots; `7 of 8` where entries are missing."""
    others = models([each.published for each in averages])
    return [
        [
            each.name,
            each.setting,
            "-" if each.value is None else f"{100 * each.value:.1f}",
            f"{each.num_entries - len(each.missing)} of {each.num_entries}",
            *reported(others, each.published),
        ]
        for each in averages
    ]


def missing_text(averages: Sequence[Average]) -> str | None:
    """Entries that averages lack, by number of shots; None when they are complete."""
    lacking: dict[str, dict[str, None]] = {}
    for each in averages:
        lacking.setdefault(each.setting, {}).update(dict.fromkeys(each.missing))
    parts = [
        f"at {setting} shots {', '.join(names)}" for setting, names in lacking.items() if names
    ]
    return "; ".join(parts) or None


def shown(metric: str, value: float) -> str:
    """A score as people read it: in percent, a perplexity as it is."""
    if metric != "perplexity":
        return f"{100 * value:.1f}"
    return f"{value:.2f}" if value < LARGE_PERPLEXITY else f"{value:.2e}"


def reported(others: Sequence[str], published: Sequence[Reported]) -> list[str]:
    """One cell per model."""
    by_model = {each.model: each for each in published}
    return [
        f"{by_model[model].value:g}{'' if by_model[model].confirmed else UNCONFIRMED}"
        if model in by_model
        else "-"
        for model in others
    ]


def _models(scores: Sequence[Score]) -> list[str]:
    return models([each.published for score in scores for each in score.measured])
