"""The parts of a report, in order: each a heading with charts, tables and lines."""

from html import escape

from glamcli.config.dump import as_yaml
from glamcli.config.sizes import short
from glamcli.progress import duration
from glamcli.report.charts import Chart, curve_charts
from glamcli.report.events import EVENT_KINDS, clock_text
from glamcli.report.learning import losses_section, optimizer_section, routers_section
from glamcli.report.parts import Part, Runs, Section, head_of, name_of, number_text, soft
from glamcli.report.reached import mixture_section, scores_section
from glamcli.report.run import ReportRun
from glamcli.report.spent import cost_section, memory_section, speed_section
from glamcli.webpage import cards, colour_key, escaped_rows, html_table, text


def sections(runs: Runs) -> list[Section]:
    """All parts of the page."""
    made = [
        _overview(runs),
        losses_section(runs),
        optimizer_section(runs),
        routers_section(runs),
        mixture_section(runs),
        scores_section(runs),
        speed_section(runs),
        memory_section(runs),
        cost_section(runs),
        _events(runs),
        _recipe(runs),
    ]
    charts = (part for each in made for part in each.parts if isinstance(part, Chart))
    return [*made, _others(runs, {name for chart in charts for name in chart.names})]


def _overview(runs: Runs) -> Section:
    facts = [_facts(run) for run in runs]
    if len(runs) == 1:
        parts: list[Part] = [cards((value, name) for name, value in facts[0].items())]
    else:
        names = list(dict.fromkeys(name for each in facts for name in each))
        swatches = [f"{colour_key(f'var(--c{i})')}{text(run.name)}" for i, run in enumerate(runs)]
        rows = [[escape(name), *(escape(each.get(name, "-")) for each in facts)] for name in names]
        parts = [html_table(["", *(f">{name}" for name in swatches)], rows)]
    for run in runs:
        of = f"{text(run.name)}: " if len(runs) > 1 else ""
        parts += [soft(f"{of}{text(note)}") for note in run.notes]
    return Section("Overview", parts)


def _facts(run: ReportRun) -> dict[str, str]:
    """The most important figures by name."""
    latest = run.curves.latest
    last = None if run.recipe is None else run.recipe.train.steps
    found = {"step": f"{run.step:,}" + (f" of {last:,}" if last else "")}
    if run.tokens_per_step:
        found["tokens seen, padding included"] = short(run.step * run.tokens_per_step)
    if "loss" in latest or not run.is_loss_finite:
        loss = number_text(latest["loss"]) if run.is_loss_finite else "not finite"
        found["training loss, nats per token"] = loss
    if heldout := [latest[name] for name in run.curves.names("heldout/")]:
        found["held-out loss, mean of sources"] = number_text(sum(heldout) / len(heldout))
    if total := sum(run.seconds.values()):
        found["run time"] = duration(total)
        found["goodput"] = f"{100 * run.seconds.get('step', 0.0) / total:.1f} %"
    if "tokens_per_second" in latest:
        found["tokens per second"] = short(latest["tokens_per_second"])
    if "mfu" in latest:
        found["model FLOPs utilization"] = f"{100 * latest['mfu']:.1f} %"
    if latest.get("seconds_left"):
        found["left, at this speed"] = duration(latest["seconds_left"])
    if "unix_seconds" in latest:
        found["last line written"] = clock_text(latest["unix_seconds"])
    return found


def _events(runs: Runs) -> Section:
    rows = [
        [*name_of(runs, run), f"{each.step:,}", *EVENT_KINDS[each.kind], each.text]
        for run in runs
        for each in run.events
    ]
    columns = (*head_of(runs), ">step", "mark", "what", "")
    parts: list[Part] = [html_table(columns, escaped_rows(rows))] if rows else []
    return Section("Events", parts, "Nothing has happened: no restart, save, alarm or rewind.")


def _recipe(runs: Runs) -> Section:
    parts: list[Part] = []
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    if len(runs) > 1:
        values = {key: [_value(run, key) for run in runs] for key in keys}
        rows = [[key, *each] for key, each in values.items() if len(set(each)) > 1]
        names = [text(run.name) for run in runs]
        parts += [html_table(["differs", *names], escaped_rows(rows))] if rows else []
        parts += [] if rows else [soft("The recipes are the same.")]
    for run in runs:
        if run.settings:
            rows = [[key, _value(run, key), run.origins.get(key, "")] for key in run.settings]
            table = html_table(("setting", "value", "from"), escaped_rows(rows))
            parts += [f"<details><summary>Recipe of {text(run.name)}</summary>{table}</details>"]
    return Section("Recipe", parts, "No recipe.yaml or run.json that can be read.")


def _value(run: ReportRun, key: str) -> str:
    """A setting as it is written in a recipe."""
    shown = as_yaml(run.settings[key]) if key in run.settings else "-"
    return shown if len(shown) <= 300 else shown[:297] + "..."


_NOT_DRAWN = ("seconds/", "eval/", "unigram/", "tokens_seen", "unix_seconds", "seconds_left")
_MAX_OTHERS = 60


def _others(runs: Runs, drawn: set[str]) -> Section:
    """Every other curve of the metrics, those that this version does not know included."""
    names = dict.fromkeys(
        name
        for run in runs
        for name in run.curves.names("")
        if name not in drawn and not name.startswith(_NOT_DRAWN)
    )
    shown = [*names][:_MAX_OTHERS]
    charts = [chart for name in shown for chart in curve_charts(runs, name, "", {name: name})]
    if not charts:
        return Section("Other numbers", missing="The metrics have no others.")
    more = (
        soft(f"{len(names) - len(shown):,} more are not drawn.") if len(names) > len(shown) else ""
    )
    opened = "<details><summary>Every other number of the metrics</summary>"
    return Section("Other numbers", [opened, *charts, f"{more}</details>"])
