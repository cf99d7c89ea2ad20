"""What a run read and what it scores: mixture and evaluations."""

from collections.abc import Sequence

from glamcli.config.sizes import short
from glamcli.report.charts import Chart, Line, arranged
from glamcli.report.parts import Part, Runs, Section, head_of, name_of, points_of, soft
from glamcli.report.run import ReportRun
from glamcli.report.scores import ScoreCurve, models_of
from glamcli.webpage import escaped_rows, html_table, text


def mixture_section(runs: Runs) -> Section:
    """Planned and realised shares of the sources, and passes over them."""
    shares, epochs, rows = [], [], []
    for number, run in enumerate(runs):
        read = run.rows
        total = sum(read.rows.values()) if read else 0
        for name in dict.fromkeys([*run.planned, *(read.rows if read else ())]):
            passes = read.epochs.get(name, []) if read else []
            mine = read.rows.get(name, 0) if read else 0
            rows.append(
                [
                    *name_of(runs, run),
                    name,
                    _percent(run.planned.get(name)),
                    _planned_so_far(run, name),
                    _percent(mine / total) if total else "-",
                    short(mine) if read else "-",
                    f"{passes[-1][1]:.3g}" if passes else "-",
                ]
            )
            if read and name in read.shares:
                shares.append((name, Line(name, number, points_of(read.shares[name], 100))))
                epochs += [(name, Line(name, number, points_of(passes)))] if passes else []
    parts: list[Part] = [
        *arranged(runs, "Realised share of rows", "%", shares, from_zero=True),
        *arranged(runs, "Epochs", "passes over the source", epochs, from_zero=True),
    ]
    if rows:
        columns = (*head_of(runs), "source", ">planned, whole run", ">planned so far")
        columns += (">realised so far", ">rows", ">epochs")
        parts += [html_table(columns, escaped_rows(rows))]
        ends = sorted({run.rows.step for run in runs if run.rows})
        until = (
            f" Up to the newest saved step, {', '.join(f'{s:,}' for s in ends)}." if ends else ""
        )
        parts += [soft(f"Shares are of rows; those that a rewind left out do not count.{until}")]
    return Section("Mixture", parts, "Nothing is known of the mixture.")


def _planned_so_far(run: ReportRun, name: str) -> str:
    """The planned share of a source up to the step that the realised one goes up to."""
    if run.rows is None or not run.rows.step:
        return "-"
    ends = [*(first for first, _ in run.rows.stages[1:]), run.rows.step]
    parts = [
        max(0, min(end, run.rows.step) - first) * shares.get(name, 0.0)
        for (first, shares), end in zip(run.rows.stages, ends, strict=True)
    ]
    return _percent(sum(parts) / run.rows.step)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def scores_section(runs: Runs) -> Section:
    """Scores of tasks over the steps, and at the newest one beside published ones."""
    named = [(number, run, curve) for number, run in enumerate(runs) for curve in run.scores]
    if not named:
        hint = "<code>every.eval_steps</code> or <code>glam eval RUN</code> makes them."
        return Section("Scores", missing=f"No scores yet: {hint}")
    parts: list[Part] = []
    for key in dict.fromkeys((c.task, c.metric, c.setting) for _, _, c in named):
        same = [(n, run, c) for n, run, c in named if (c.task, c.metric, c.setting) == key]
        if any(len(curve.points) > 1 for _, _, curve in same):
            parts.append(_score_chart(runs, same))
    models = models_of(curve for _, _, curve in named)
    rows = [
        [*name_of(runs, run), curve.task, curve.setting, curve.metric, str(last.step)]
        + [
            _score(curve, last.value),
            "" if last.stderr is None else f"± {_score(curve, last.stderr)}",
        ]
        + ["-" if last.num_items is None else str(last.num_items)]
        + ["-" if curve.random is None else _score(curve, curve.random)]
        + [_published_cell(curve, model) for model in models]
        for _, run, curve in named
        for last in curve.points[-1:]
    ]
    columns = (*head_of(runs), "task", ">shots", "metric", ">step", ">score", ">error", ">items",
               ">random", *(f">{text(model)}" for model in models))  # fmt: skip
    note = "Percent, but perplexities, at the newest step. Errors are standard errors; averages "
    note += "have none. random: what guessing would score."
    note += " Published scores with ? were not seen in the paper itself." * bool(models)
    return Section("Scores", [*parts, html_table(columns, escaped_rows(rows)), soft(note)])


def _score_chart(runs: Runs, same: Sequence[tuple[int, ReportRun, ScoreCurve]]) -> Chart:
    first = same[0][2]
    scale = 100.0 if first.in_percent else 1.0
    lines = []
    for number, run, curve in same:
        points = points_of(((each.step, each.value) for each in curve.points), scale)
        errors = [(each.stderr or 0.0) * scale for each in curve.points]
        label = run.name if len(runs) > 1 else curve.metric
        lines.append(Line(label, number, points, errors))
    known = {each.model: each.value for _, _, curve in same for each in curve.published}
    levels = [*known.items()]
    if random := [curve.random for _, _, curve in same if curve.random is not None]:
        levels.append(("random", random[0] * scale))
    title = f"{first.task}, {first.setting} shots"
    return Chart(
        title, f"{first.metric}, %" if first.in_percent else first.metric, lines, levels=levels
    )


def _score(curve: ScoreCurve, value: float) -> str:
    return f"{100 * value:.1f}" if curve.in_percent else f"{value:.2f}"


def _published_cell(curve: ScoreCurve, model: str) -> str:
    found = (
        f"{e.value:g}{'' if e.confirmed else '?'}" for e in curve.published if e.model == model
    )
    return next(found, "-")
