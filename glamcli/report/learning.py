"""What a run learned and how: losses, optimizer, routers."""

import math
from typing import Any

from glamcli.report.charts import curve_charts, load_charts
from glamcli.report.parts import Part, Runs, Section, head_of, name_of, number_text, soft
from glamcli.report.run import ReportRun
from glamcli.webpage import escaped_rows, html_table

_HELDOUT = ("heldout/", "unigram/")


def losses_section(runs: Runs) -> Section:
    """Loss of training and of held-out text, of all sources and of each."""
    nats = "nats per token"
    parts: list[Part] = [
        *curve_charts(runs, "Training loss", nats, {"all sources": "loss"}),
        *curve_charts(runs, "Training loss by source", nats, _by_source(runs, "loss/")),
        *curve_charts(runs, "Held-out loss by source", nats, _by_source(runs, "heldout/")),
    ]
    rows = [
        [
            *name_of(runs, run),
            source,
            *(number_text(run.curves.latest.get(k + source)) for k in _HELDOUT),
        ]
        for run in runs
        for source in _by_source([run], "heldout/")
    ]
    if rows:
        columns = (*head_of(runs), "source", ">held-out loss", ">unigram entropy")
        parts += [html_table(columns, escaped_rows(rows))]
        parts += [soft("Unigram entropy: the best possible without looking at the context.")]
    else:
        parts += [soft("No held-out loss yet: <code>every.heldout_steps</code> says how often.")]
    return Section("Loss", parts)


def _by_source(runs: Runs, prefix: str) -> dict[str, str]:
    """Label and name of the curves that begin so, in any run."""
    names = dict.fromkeys(name for run in runs for name in run.curves.names(prefix))
    return {name.removeprefix(prefix): name for name in names}


def optimizer_section(runs: Runs) -> Section:
    """Learning rate, norms and skipped updates."""
    norms = {"gradient": "grad_norm", "update": "update_norm"}
    skipped = {"skipped so far": "bad_steps_total"}
    parts = [
        *curve_charts(
            runs, "Learning rate", "", {"learning rate": "learning_rate"}, from_zero=True
        ),
        *curve_charts(runs, "Norm", "over all parameters", norms, is_log=True),
        *curve_charts(runs, "Norm of the parameters", "", {"parameters": "param_norm"}),
        *curve_charts(runs, "Skipped updates", "steps", skipped, from_zero=True),
    ]
    return Section("Optimizer", [*parts], "The metrics have no learning rate.")


def routers_section(runs: Runs) -> Section:
    """Drops, entropy, balance and dead experts, and the load of every expert."""
    experts = {run.recipe.moe.num_experts for run in runs if run.recipe and run.recipe.moe}
    even = [(f"ln {E}", math.log(E)) for E in sorted(experts)]
    dropped = {
        "first choices": "dropped_first_frac",
        "second choices": "dropped_second_frac",
        "tokens with no expert": "unserved_frac",
    }
    entropy = {"entropy": "router_entropy_nats"}
    popular = "Tokens whose first choice is the most popular expert"
    from_zero, percent = {"from_zero": True}, {"from_zero": True, "scale": 100}
    made: tuple[tuple[str, str, dict[str, str], dict[str, Any]], ...] = (
        ("Dropped for lack of capacity", "%", dropped, percent),
        ("Entropy of the routers", "nats", entropy, {**from_zero, "levels": even}),
        ("Balance loss", "1 is ideal", {"balance": "balance"}, {"levels": [("ideal", 1)]}),
        ("Dead experts", "in all layers", {"dead": "dead_experts"}, from_zero),
        (popular, "%", {"most popular": "max_first_frac"}, percent),
        ("Alarms raised", "", {"alarms": "router_alarms"}, from_zero),
    )
    parts: list[Part] = [
        chart
        for title, unit, names, options in made
        for chart in curve_charts(runs, title, unit, names, **options)
    ]
    if not parts:
        return Section("Routers", missing="No router in the metrics: a dense model has none.")
    parts += [soft("Curves are means over expert layers, of single steps.")]
    if loads := load_charts(runs):
        parts += [_load_key(), *loads]
    rows = [
        [*name_of(runs, run), str(layer + 1), *(_layer_cell(run, name, layer) for name in _LAYER)]
        for run in runs
        for layer in range(max(map(len, run.by_layer.values()), default=0))
    ]
    if rows:
        columns = (*head_of(runs), ">layer", *(f">{title}" for title in _LAYER.values()))
        parts += [
            html_table(columns, escaped_rows(rows)),
            soft("Expert layers at the newest step."),
        ]
    return Section("Routers", parts)


_LAYER = {
    "max_first_frac": "most popular first %",
    "dropped_first_frac": "first dropped %",
    "dropped_second_frac": "second dropped %",
    "router_entropy_nats": "entropy",
    "balance": "balance",
    "dead_experts": "dead",
}


def _layer_cell(run: ReportRun, name: str, layer: int) -> str:
    values = run.by_layer.get(name, [])
    value = values[layer] if layer < len(values) else None
    if value is not None and name.endswith("_frac"):
        return f"{100 * value:.1f}"
    return number_text(value, "g" if name == "dead_experts" else ".3f")


def _load_key() -> str:
    return (
        '<p class="soft load-key"><i class=none></i>no token <i class=scale></i>'
        "1/16 · 1/4 · 1 · 4 · 16 times an even share, of the choices asked for</p>"
    )
