"""`glam plan`: whether a recipe fits devices that are not here, how fast it is, what it costs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from glamcli import atomic, libtpu
from glamcli.cli import plan_tune, render
from glamcli.cli.interrupt import interruptible
from glamcli.cli.options import FileOrUrl, json_option, set_option
from glamcli.config.chips import CHIPS_FILE, PUE, WATTS_PER_CHIP, Chip, load_chips
from glamcli.config.load import Loaded, load_recipe
from glamcli.config.sizes import bytes_text
from glamcli.errors import PlanError, RecipeError, printable

if TYPE_CHECKING:
    from glamcli.plan.cost import Prices
    from glamcli.plan.planner import Plan
    from glamcli.plan.search import SearchResult
    from glamcli.plan.topology import Target

_FILE = FileOrUrl(dir_okay=False)


@click.command()
@click.argument("recipe")
@click.option(
    "--target",
    metavar="NAME",
    help="v4-2048, v5e-64, 2xv5e-256, 8xh100, cpu:8 or local.  [default: the recipe's plan.target]",
)
@click.option("--search", "searching", is_flag=True, help="Rank layouts, and name the best.")
@click.option(
    "--all-targets",
    is_flag=True,
    help="Find the smallest slice of every TPU that fits; with --target v5e only of that kind.",
)
@click.option(
    "--tune", "tuning", is_flag=True, help="Try flags of the TPU compiler, and rank them."
)
@click.option(
    "--compile",
    "num_compiled",
    type=click.IntRange(1, 100),
    default=4,
    help="Layouts that a search compiles.",
)
@click.option("--price", type=click.FloatRange(0), help="US dollars per chip and hour.")
@click.option("--watts", type=click.FloatRange(0), default=WATTS_PER_CHIP, help="Power per chip.")
@click.option(
    "--pue",
    type=click.FloatRange(1),
    default=PUE,
    help="Power usage effectiveness of the data centre.",
)
@click.option("--chips", "chips_path", type=_FILE, help="Another table of chips and prices.")
@click.option("--html", type=_FILE, help="Also write the plan as a page.")
@set_option
@json_option
def command(
    recipe: str,
    target: str | None,
    searching: bool,
    all_targets: bool,
    tuning: bool,
    num_compiled: int,
    price: float | None,
    watts: float,
    pue: float,
    chips_path: Path | None,
    html: Path | None,
    sets: tuple[str, ...],
    as_json: bool,
) -> None:
    """Say whether RECIPE fits a target, how long it takes and what it costs.

    Compiles the step that `glam train` would run, with the target's own compiler and without the
    target. Times, prices and energy are estimates. Exits with 5 when the step does not fit.
    """
    loaded = load_recipe(recipe, sets)
    several = {"--search": searching, "--all-targets": all_targets, "--tune": tuning}
    asked = [option for option, given in several.items() if given]
    if len(asked) > 1:
        named = " and ".join(f"`{option}`" for option in asked)
        raise RecipeError(f"{named} exclude each other", "use one")
    if html is not None and asked:
        raise RecipeError("`--html` shows one plan", f"leave out `{asked[0]}`")
    name = target or loaded.recipe.plan.target or ("" if all_targets else "local")
    _prepare(name)

    from glamcli.plan import topology
    from glamcli.plan.cost import Prices
    from glamcli.plan.planner import make_plan

    chips = load_chips(chips_path or CHIPS_FILE)
    prices = Prices(price, watts, pue)
    if all_targets:
        chips = topology.chips_of_kind(target, chips) if target else chips
        _show_all(loaded, chips, prices, as_json)
        return
    devices = topology.parse_target(name, chips)
    if searching:
        _search(loaded, devices, prices, num_compiled, as_json)
        return
    if tuning:
        plan_tune.tune_flags(loaded, devices, prices, as_json)
        return
    phase = render.make_progress(as_json).phase(f"planning {loaded.name} for {devices.words}")
    with loaded.placing(), phase:
        plan = interruptible(lambda: make_plan(loaded.recipe, devices, prices))
    if html is not None:
        _write_page(loaded, plan, html)
    if as_json:
        render.emit("plan", recipe=loaded.name, **plan.to_json())
        return
    _show(loaded, plan)
    if html is not None:
        click.echo(printable(f"wrote {html}"))


def _prepare(target: str) -> None:
    """What must be set before jax starts: simulated devices, and a quiet TPU compiler."""
    if "jax" not in sys.modules:
        number = target.lower().removeprefix("cpu:")
        if target.lower().startswith("cpu:") and number.isdigit() and int(number) <= 4096:
            flags = os.environ.get("XLA_FLAGS", "")
            flags += f" --xla_force_host_platform_device_count={number}"
            os.environ["XLA_FLAGS"] = flags.strip()
        if target.lower() != "local":
            os.environ["JAX_PLATFORMS"] = "cpu"  # described devices need none that are here
    if target.lower() != "local":
        libtpu.quiet()
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # nor the compiler's own warnings


def _show(loaded: Loaded, plan: Plan) -> None:
    """The plan on a terminal."""
    from glamcli.plan import words

    click.echo(printable(f"{loaded.name} on {plan.target.words}: fits"))
    lines = (*words.method_words(plan).split("; "), "", *words.bar(plan), "")
    click.echo("\n".join((*lines, *words.mesh_lines(plan), "")))
    name = words.device(plan)
    tables = [
        ((f"memory of one {name}", ">size"), words.memory_rows(plan)),
        (
            ("array", "dimensions / mesh axes", f">each on a {name}"),
            (row for _, *row in words.array_rows(plan)),
        ),
        *words.tables(plan),
    ]
    if plan.time is not None:
        times = (*words.time_parts(plan), ("total", plan.time.total))
        rows = ((part, words.seconds_words(seconds)) for part, seconds in times)
        tables.insert(-1, (("time of a step (estimate)", ">time"), rows))
    for columns, rows in tables:
        render.print_table(columns, list(rows))
        click.echo()


def _write_page(loaded: Loaded, plan: Plan, path: Path) -> None:
    from glamcli.plan.page import page

    try:
        atomic.write(path, page(loaded.name, plan))
    except OSError as error:
        raise PlanError(f"cannot write {path}: {error.strerror or error}") from error


def _search(
    loaded: Loaded, target: Target, prices: Prices, num_compiled: int, as_json: bool
) -> None:
    from glamcli.plan.search import search

    progress = render.make_progress(as_json)
    with progress.phase(f"searching layouts of {loaded.name} for {target.words}"):
        options = {"num_compiled": num_compiled, "tell": progress.say}
        found = interruptible(lambda: search(loaded.recipe, target, prices, **options))
    if as_json:
        _emit_search(loaded, found)
    else:
        _show_search(loaded, target, found)
    if not found.plans:
        _, why = found.refused[0]
        raise PlanError(f"none of {found.num_compiled} compiled layouts fits; the first: {why}")


def _show_search(loaded: Loaded, target: Target, found: SearchResult) -> None:
    from glamcli.plan import words

    rows = [
        (
            candidate.words,
            "same" if candidate.same_run else "changed",
            words.seconds_words(plan.cost.step_seconds),
            f"{plan.cost.tokens_per_second:,.0f}",
            f"{100 * plan.cost.utilization_frac:.1f} %",
            bytes_text(plan.total_bytes),
        )
        for candidate, plan in found.plans
        if plan.cost is not None
    ]
    columns = ("layout", "run", ">step", ">tokens/s", ">utilization", ">per device")
    if rows:
        render.print_table(columns, rows, title=f"{loaded.name} on {target.words} (estimates)")
    for candidate, why in found.refused:
        click.echo(f"refused: {' '.join(candidate.settings)}: {why}")
    dropped = "; ".join(f"{number:,} {why}" for why, number in found.dropped.most_common())
    click.echo(f"\ncompiled {found.num_compiled}; dropped before: {dropped or 'none'}")
    if found.best is not None:
        chosen = found.best[0].options or "the recipe as it is"
        click.echo(f"best that trains the same: {chosen}")
    if found.plans and not found.plans[0][0].same_run:
        click.echo(f"faster per token, but another run: {found.plans[0][0].options}")


def _emit_search(loaded: Loaded, found: SearchResult) -> None:
    for candidate, plan in found.plans:
        about = {"settings": candidate.settings, "same_run": candidate.same_run}
        render.emit("plan", recipe=loaded.name, **about, **plan.to_json())
    for candidate, why in found.refused:
        render.emit("refused", settings=candidate.settings, why=why)
    best = found.best and found.best[0].settings
    render.emit("search", compiled=found.num_compiled, dropped=dict(found.dropped), best=best)


def _show_all(loaded: Loaded, chips: dict[str, Chip], prices: Prices, as_json: bool) -> None:
    from glamcli.plan.search import all_targets

    progress = render.make_progress(as_json)
    slices = all_targets(loaded.recipe, chips, prices, progress.say)
    rows = []
    with progress.phase(f"looking for slices that fit {loaded.name}"):
        for chip, plan, why in iter(lambda: interruptible(lambda: next(slices, None)), None):
            rows.append(_slice_row(chip, plan, why))
            if as_json:
                values = {"why": why} if plan is None else plan.to_json()
                event = "refused" if plan is None else "plan"
                render.emit(event, recipe=loaded.name, chip=chip.name, **values)
    columns = ("chip", "smallest slice", ">each device", ">step", ">days", ">price")
    if not as_json:
        title = f"{loaded.name}: smallest slices (estimates)"
        render.print_table((*columns, "layout, or why none"), rows, title=title)


def _slice_row(chip: Chip, plan: Plan | None, why: str) -> Sequence[str]:
    from glamcli.plan import words

    if plan is None or plan.cost is None:
        return (chip.name, "-", "", "", "", "", why)
    layout = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1)
    return (
        chip.name,
        plan.target.name,
        bytes_text(plan.total_bytes),
        words.seconds_words(plan.cost.step_seconds),
        words.figure(plan.cost.days),
        "-" if plan.cost.dollars is None else words.dollars(plan.cost.dollars),
        f"{layout} remat={plan.recipe.train.remat}".strip(),
    )
