"""`glam eval show`: kept results as a table, or two of them item by item; how results look."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from glamcli.cli import render
from glamcli.cli.options import json_option
from glamcli.errors import RecipeError, printable

if TYPE_CHECKING:
    from glamcli.evals.results.compare import Comparison
    from glamcli.evals.results.scores import Results

SHOWN_CONDITIONS = ("preset", "limit", "seed")
# Keys of the model's description, with the words people know them by.
SHOWN_IDENTITY = {
    "run": "run",
    "step": "step",
    "params_digest": "weights",
    "recipe_hash": "recipe",
    "tokenizer": "tokenizer",
    "dtype": "dtype",
    "dispatch": "dispatch",
    "window": "window",
}


@click.command()
@click.argument("first", metavar="A", type=click.Path(path_type=Path))
@click.argument("second", metavar="[B]", type=click.Path(path_type=Path), required=False)
@click.option("--suite", help="Of a run folder: the results of this suite.")
@json_option
def show(first: Path, second: Path | None, suite: str | None, as_json: bool) -> int:
    """Show results A as a table, or compare B with A item by item.

    A and B are files RUN/eval/NAME.json, or run folders. Only what was asked by the same
    conventions is compared; what differs is named, and the exit code tells.
    """
    from glamcli.evals.results import kept

    places = [kept.find(each, suite) for each in (first, second) if each is not None]
    found = [kept.load(place) for place in places]
    if len(found) == 1:
        show_results(found[0], as_json)
        _show_conditions(found[0], as_json)
        return 0

    from glamcli.evals.results.compare import compare

    told = compare(found[0], found[1], kept.items(places[0]), kept.items(places[1]))
    progress = render.make_progress(as_json)
    for each in told.refused:
        progress.warn(f"task `{each.task}` at {each.setting} shots is not compared: {each.reason}")
    if not told.paired:
        raise RecipeError(
            f"{places[0]} and {places[1]} cannot be compared: "
            + (told.refused[0].reason if told.refused else "no task was scored in both"),
            hint="score both by the same conventions, on the same items",
        )
    _show_comparison(told, places, as_json)
    return RecipeError.exit_code if told.refused else 0


def show_results(results: Results, as_json: bool) -> None:
    """Scores and averages on stdout."""
    from glamcli.evals.results import tables

    if as_json:
        click.echo(json.dumps({"event": "eval", **results.as_dict()}))
        return
    if results.scores:
        render.table(
            tables.score_columns(results.scores),
            tables.table_rows(results.scores),
            title=f"suite {results.suite}, step {results.model.get('step')}, percent",
            note="random, position, majority: what guessing would score; "
            "fitted: demonstrations within the window"
            + _unconfirmed(any(m.published for s in results.scores for m in s.measured)),
        )
    if results.scores and results.averages:
        missing = tables.missing_text(results.averages)
        click.echo()
        render.table(
            tables.average_columns(results.averages),
            tables.average_rows(results.averages),
            note=results.averaging + (f"\nmissing: {missing}" if missing else ""),
        )


def _unconfirmed(any_published: bool) -> str:
    return "\npublished scores with `?` were not seen in the paper itself" * any_published


def _show_conditions(results: Results, as_json: bool) -> None:
    """What the numbers belong to, and what was not scored."""
    if as_json:
        return
    click.echo()
    facts = [
        f"{word} {str(results.model[key])[: 16 if len(str(results.model[key])) == 64 else None]}"
        for key, word in SHOWN_IDENTITY.items()
        if results.model.get(key) is not None
    ]
    conditions = {name: getattr(results, name) for name in SHOWN_CONDITIONS}
    facts += [f"{name} {value}" for name, value in conditions.items() if value is not None]
    versions = results.model.get("versions", {})
    facts.append("with " + ", ".join(f"{name} {number}" for name, number in versions.items()))
    click.echo(printable(", ".join(facts)))
    for score in results.scores:
        if score.skipped:
            where = f"{score.task} at {score.setting} shots"
            click.echo(
                printable(f"{where}: {len(score.skipped)} items skipped: {score.skipped[0]}")
            )
    for failure in results.failures:
        click.echo(printable(f"{failure.task} was not scored: {failure.error.what}"))


def _show_comparison(told: Comparison, places: list[Path], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"event": "comparison", **asdict(told)}))
        return
    from glamcli.evals.results.tables import shown

    rows = []
    for each in told.paired:
        difference = shown(each.metric, abs(each.second - each.first))
        rows.append(
            [
                each.task,
                each.setting,
                each.metric,
                shown(each.metric, each.first),
                shown(each.metric, each.second),
                ("-" if each.second < each.first else "+") + difference,
                "" if each.error is None else f"± {100 * each.error:.1f}",
                str(each.second_wins),
                str(each.first_wins),
                str(each.ties),
                f"{each.p_value:.3g}",
            ]
        )
    columns = ("task", ">shots", "metric", ">A", ">B", ">B - A", ">error",
               ">B wins", ">A wins", ">ties", ">p")  # fmt: skip
    notes = [*told.notes, "p: two-sided sign test over the items that one of them does better"]
    render.table(
        columns,
        rows,
        title=f"A {places[0]}\nB {places[1]}",
        note=printable("\n".join(notes)),
    )
