"""`glam eval show`: stored results as a table, or two of them item by item."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from glamcli.cli import render
from glamcli.cli.options import RunFolder, json_option
from glamcli.errors import RecipeError, printable
from glamcli.stored_runs import local

if TYPE_CHECKING:
    from glamcli.evals.results.compare import Comparison
    from glamcli.evals.results.scores import Average, Measured, Reported, Results, Score

_BASELINES = ("random", "position", "majority")
_LARGE_PERPLEXITY = 1e6
# Keys of the model's description, some of which are shown by other words.
_SHOWN_IDENTITY = ("run", "step", "params_digest", "recipe_hash", "tokenizer", "dtype", "dispatch",
                   "window")  # fmt: skip
_WORDS = {"params_digest": "weights", "recipe_hash": "recipe"}


@click.command()
@click.argument("first", metavar="A", type=RunFolder())
@click.argument("second", metavar="[B]", type=RunFolder(), required=False)
@click.option("--suite", help="Of a run folder: the results of this suite.")
@json_option
def show(first: Path, second: Path | None, suite: str | None, as_json: bool) -> int:
    """Show results A as a table, or compare B with A item by item.

    A and B are files RUN/eval/NAME.json, or run folders. Only tasks scored under the same
    conventions are compared; what differs is named, and the exit code is 2.
    """
    from glamcli.evals.results.store import find_results, load_results

    places = [find_results(_here(each), suite) for each in (first, second) if each is not None]
    found = [load_results(place, with_items=second is not None) for place in places]
    if len(found) == 1:
        show_results(found[0], as_json)
        if not as_json:
            _show_conditions(found[0])
        return 0

    from glamcli.evals.results.compare import compare

    compared = compare(*found)
    progress = render.make_progress(as_json)
    for each in compared.refused:
        progress.warn(f"task `{each.task}` at {each.setting} shots is not compared: {each.reason}")
    if not compared.paired:
        raise RecipeError(
            f"{places[0]} and {places[1]} cannot be compared: "
            + (compared.refused[0].reason if compared.refused else "no task was scored in both"),
            hint="score both by the same conventions, on the same items",
        )
    if as_json:
        render.emit("comparison", **asdict(compared))
    else:
        _show_comparison(compared, places)
    return RecipeError.exit_code if compared.refused else 0


def _here(path: Path) -> Path:
    """What a run at a URL has, on this machine; everything else as it is."""
    return path if path.suffix == ".json" else local(path, metrics=False, results=True)


def show_results(results: Results, as_json: bool) -> None:
    """Scores and averages on stdout."""
    if as_json:
        render.emit("eval", **results.to_json())
        return
    if not results.scores:
        return
    _show_scores(results)
    _show_subsets(results.scores)
    if results.averages:
        others = _models(each.published for each in results.averages)
        missing = _missing_text(results.averages)
        click.echo()
        render.print_table(
            ("average", ">shots", ">score", ">entries", *(f">{model}" for model in others)),
            [
                [
                    each.name,
                    each.setting,
                    score_text("", each.value),
                    f"{each.num_entries - len(each.missing)} of {each.num_entries}",
                    *_published_cells(others, each.published),
                ]
                for each in results.averages
            ],
            note=results.averaging + (f"\nmissing: {missing}" if missing else ""),
        )


def _show_scores(results: Results) -> None:
    """One row per score and metric, in percent."""
    scores = results.scores
    others = _models(each.published for score in scores for each in score.measured)
    is_cut = any(score.num_cut for score in scores)
    rows = [
        [
            score.task,
            str(score.shots),
            each.metric,
            *_value_cells(each),
            *(score_text(each.metric, each.baselines.get(name)) for name in _BASELINES),
            str(score.num_items),
            f"{score.shots_fitted:.1f}",
            *([str(score.num_cut)] if is_cut else []),
            *_published_cells(others, each.published),
        ]
        for score in scores
        for each in score.measured
    ]
    notes = [f"{', '.join(_BASELINES)}: what guessing would score; fitted: demonstrations within "
             "the window" + "; cut: items whose question lost its beginning" * is_cut]  # fmt: skip
    for score in scores:
        where = f"{score.task} at {score.setting} shots"
        if score.num_tied:
            notes.append(f"{where}: options tie exactly in {score.num_tied} items: 1/k for each")
        if score.num_equal:
            notes.append(f"{where}: {score.num_equal} items have two equal options")
    if any(not each.confirmed for s in scores for m in s.measured for each in m.published):
        notes.append("published scores with `?` were not seen in the paper itself")
    columns = ("task", ">shots", "metric", ">score", ">error", *(f">{name}" for name in _BASELINES),
               ">items", ">fitted", *([">cut"] if is_cut else []))  # fmt: skip
    render.print_table(
        (*columns, *(f">{model}" for model in others)),
        rows,
        title=f"suite {results.suite}, step {results.model.get('step')}, percent",
        note="\n".join(notes),
    )


def _show_subsets(scores: Sequence[Score]) -> None:
    """One row per value of a field that the task divides its score by, and metric."""
    rows = [
        [
            score.task,
            str(score.shots),
            subset.field,
            subset.value,
            each.metric,
            *_value_cells(each),
            score_text(each.metric, each.baselines.get("random")),
            str(subset.num_items),
        ]
        for score in scores
        for subset in score.subsets
        for each in subset.measured
    ]
    if rows:
        columns = ("task", ">shots", "by", "value", "metric", ">score", ">error", ">random",
                   ">items")  # fmt: skip
        click.echo()
        render.print_table(columns, rows)


def score_text(metric: str, value: float | None) -> str:
    """A score in percent, a perplexity as it is; `-` for none."""
    if value is None:
        return "-"
    if metric != "perplexity":
        return f"{100 * value:.1f}"
    return f"{value:.2f}" if value < _LARGE_PERPLEXITY else f"{value:.2e}"


def _value_cells(measured: Measured) -> list[str]:
    """The score and its error."""
    error = measured.stderr
    found = "" if error is None else "± " + score_text(measured.metric, error)
    return [score_text(measured.metric, measured.value), found]


def _models(entries: Iterable[Sequence[Reported]]) -> list[str]:
    """Models that anything is published of, in order of appearance."""
    return list(dict.fromkeys(each.model for entry in entries for each in entry))


def _published_cells(others: Sequence[str], published: Sequence[Reported]) -> list[str]:
    """One cell per model; `?` behind what was not seen in the paper itself."""
    by_model = {each.model: f"{each.value:g}{'' if each.confirmed else '?'}" for each in published}
    return [by_model.get(model, "-") for model in others]


def _missing_text(averages: Sequence[Average]) -> str | None:
    """Entries that averages lack, by number of shots; None when they are complete."""
    lacking: dict[str, dict[str, None]] = {}
    for each in averages:
        lacking.setdefault(each.setting, {}).update(dict.fromkeys(each.missing))
    parts = (
        f"at {setting} shots {', '.join(names)}" for setting, names in lacking.items() if names
    )
    return "; ".join(parts) or None


def _show_conditions(results: Results) -> None:
    """What the numbers belong to, and what was not scored."""
    click.echo()
    known = {_WORDS.get(key, key): results.model.get(key) for key in _SHOWN_IDENTITY}
    known |= {name: getattr(results, name) for name in ("preset", "limit", "seed")}
    facts = [
        f"{word} {str(value)[: 16 if len(str(value)) == 64 else None]}"  # of a SHA-256
        for word, value in known.items()
        if value is not None
    ]
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


def _show_comparison(compared: Comparison, places: list[Path]) -> None:
    rows = [
        [
            each.task,
            each.setting,
            each.metric,
            score_text(each.metric, each.first),
            score_text(each.metric, each.second),
            "+-"[each.second < each.first] + score_text(each.metric, abs(each.second - each.first)),
            "" if each.error is None else f"± {100 * each.error:.1f}",
            *map(str, (each.second_wins, each.first_wins, each.ties)),
            f"{each.p_value:.3g}",
        ]
        for each in compared.paired
    ]
    columns = ("task", ">shots", "metric", ">A", ">B", ">B - A", ">error",
               ">B wins", ">A wins", ">ties", ">p")  # fmt: skip
    notes = [*compared.notes, "p: two-sided sign test over the items that one of them does better"]
    render.print_table(
        columns,
        rows,
        title=f"A {places[0]}\nB {places[1]}",
        note=printable("\n".join(notes)),
    )
