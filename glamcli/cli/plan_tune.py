"""`glam plan --tune`: flags of the TPU compiler, ranked, and those to paste into the recipe."""

from __future__ import annotations

import datetime
from importlib.metadata import version
from typing import TYPE_CHECKING

import click

from glamcli.cli import render
from glamcli.cli.interrupt import interruptible
from glamcli.config.load import Loaded
from glamcli.config.sizes import bytes_text
from glamcli.errors import printable

if TYPE_CHECKING:
    from glamcli.plan.cost import Prices
    from glamcli.plan.topology import Target
    from glamcli.plan.tune import Trial


def tune_flags(loaded: Loaded, target: Target, prices: Prices, as_json: bool) -> None:
    """Tries them and shows what they are worth; interrupted, what is known by then."""
    from glamcli.plan.tune import ranked, tune

    progress = render.make_progress(as_json)
    trials: list[Trial] = []
    found = tune(loaded.recipe, target, prices, progress.say)
    try:
        with loaded.placing(), progress.phase(f"tuning {loaded.name} for {target.words}"):
            while (trial := interruptible(lambda: next(found, None))) is not None:
                trials.append(trial)
                if as_json:
                    values = {"why": trial.why} if trial.plan is None else trial.plan.to_json()
                    flags = {"xla_flags": trial.settings}
                    render.emit("tried", recipe=loaded.name, **flags, **values)
    finally:
        if trials and as_json:
            render.emit("tune", recipe=loaded.name, best=ranked(trials)[0].settings)
        elif trials:
            _show(loaded, target, trials)


def _show(loaded: Loaded, target: Target, trials: list[Trial]) -> None:
    from glamcli.plan.tune import ranked, recipe_lines
    from glamcli.plan.words import seconds_words

    first, best = trials[0], ranked(trials)[0]
    assert first.plan is not None
    assert first.plan.time is not None
    waited = first.plan.time.waiting
    rows = [
        (
            trial.words,
            seconds_words(trial.seconds),
            seconds_words(plan.time.waiting),
            f"{100 * (1 - plan.time.waiting / waited):.0f} %" if waited else "-",
            f"{100 * plan.cost.utilization_frac:.1f} %",
            bytes_text(plan.total_bytes),
        )
        for trial in ranked(trials)
        if (plan := trial.plan) and plan.time and plan.cost
    ]
    columns = ("flags", ">step", ">waiting", ">waiting removed", ">utilization", ">per device")
    title = f"{loaded.name} on {target.words} (estimates; nobody has run these flags)"
    render.print_table(columns, rows, title=title)
    for trial in trials:
        if trial.plan is None:
            click.echo(printable(f"left out: {trial.words}: {trial.why}"))
    if not best.flags:
        click.echo("\nno flag makes the step faster by estimate")
        return
    today, libtpu = datetime.date.today(), version("libtpu")
    chosen_by = f"glam plan --tune for {target.name}, {today}, libtpu {libtpu}; not run on a device"
    click.echo("\nfor the recipe:\n")
    click.echo("\n".join(recipe_lines(best, chosen_by)))
