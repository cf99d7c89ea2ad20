"""`glam plan`: whether a recipe fits devices that are not here, how fast it is, what it costs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from glamcli import libtpu
from glamcli.cli.options import json_option, set_option
from glamcli.config.chips import CHIPS_FILE, load_chips
from glamcli.config.load import Loaded, load_recipe
from glamcli.errors import PlanError, RecipeError

if TYPE_CHECKING:
    from glamcli.config.chips import Chip
    from glamcli.plan.planner import Plan, Prices
    from glamcli.plan.search import SearchResult
    from glamcli.plan.topology import Target

_T = TypeVar("_T")
BAR_WIDTH = 52
MAX_ROWS = 8
MARKS = "█▓▒░▞▚·"


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
    "--compile",
    "num_compiled",
    type=click.IntRange(1, 100),
    default=4,
    show_default=True,
    help="Layouts that a search compiles.",
)
@click.option("--price", type=click.FloatRange(0), help="US dollars per chip and hour.")
@click.option(
    "--watts", type=click.FloatRange(0), default=326, show_default=True, help="Power per chip."
)
@click.option(
    "--pue", type=click.FloatRange(1), default=1.11, show_default=True, help="What cooling adds."
)
@click.option(
    "--chips",
    "chips_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Another table of chips and prices.",
)
@click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False), help="Also write the plan as a page."
)
@set_option
@json_option
def command(
    recipe: str,
    target: str | None,
    searching: bool,
    all_targets: bool,
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
    target. Times, prices and energy are estimates. Ends with 5 when the step does not fit.
    """
    loaded = load_recipe(recipe, sets)
    if searching and all_targets:
        raise RecipeError("`--search` and `--all-targets` ask for different things", "use one")
    if html is not None and (searching or all_targets):
        raise RecipeError("`--html` shows one plan", "leave out `--search` or `--all-targets`")
    name = target or loaded.recipe.plan.target or ("" if all_targets else "local")
    _prepare(name)

    from glamcli.plan import topology
    from glamcli.plan.planner import Prices

    chips = load_chips(chips_path or CHIPS_FILE)
    prices = Prices(price, watts, pue)
    if all_targets:
        _tell_all(
            loaded, topology.chips_of_kind(target, chips) if target else chips, prices, as_json
        )
        return
    devices = topology.parse_target(name, chips)
    if searching:
        _tell_search(loaded, devices, prices, num_compiled, as_json)
        return
    plan = _plan(loaded, devices, prices, as_json)
    if html is not None:
        _write_page(loaded, plan, html)
    if as_json:
        click.echo(json.dumps({"event": "plan", "recipe": loaded.name, **plan.to_json()}))
        return
    _show(loaded, plan)
    if html is not None:
        click.echo(f"\nwrote {html}")


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


def _plan(loaded: Loaded, target: Target, prices: Prices, as_json: bool) -> Plan:
    from glamcli.cli import render
    from glamcli.plan.planner import make_plan

    telling = render.make_progress(as_json).phase(f"planning {loaded.name} for {target.words}")
    with loaded.placing(), telling:
        return _interruptible(lambda: make_plan(loaded.recipe, target, prices))


def _interruptible(run: Callable[[], _T]) -> _T:
    """`run()` in another thread: a compiler does not hear Ctrl-C for minutes, this thread does.
    `main.run` then ends the process without waiting for the other one."""
    future = ThreadPoolExecutor(1).submit(run)
    while not future.done():
        wait([future], timeout=0.2)
    return future.result()


def _show(loaded: Loaded, plan: Plan) -> None:
    """The plan on a terminal."""
    from glamcli.cli import render
    from glamcli.plan import words

    click.echo(f"{loaded.name} on {plan.target.words}: fits")
    lines = (*words.method_words(plan).split("; "), "", *bar(plan), "", *mesh_lines(plan), "")
    click.echo("\n".join(lines))
    memory = f"memory of one {words.device(plan)}"
    render.print_table((memory, ">size"), list(words.memory_rows(plan)))
    sections: list[tuple[tuple[str, ...], list[tuple[str, ...]]]] = [
        (
            ("array", "dimensions / mesh axes", f">each on a {words.device(plan)}"),
            list(words.array_rows(plan)),
        ),
        (("operations", ">per token"), list(words.flops_rows(plan))),
    ]
    if plan.collectives:
        columns = ("collective", "over", ">times a step", ">bytes a step")
        sections.append((columns, list(words.collective_rows(plan))))
    if plan.time is not None:
        sections.append((("time of a step, estimate", ">time"), list(words.time_rows(plan))))
    if plan.cost is not None:
        sections.append((("the whole run, estimate", ""), list(words.cost_rows(plan))))
    for columns, lines in sections:
        click.echo()
        render.print_table(columns, lines)


def bar(plan: Plan) -> list[str]:
    """A bar of a device's memory, a mark per group, and what the marks mean."""
    chip = plan.target.chip
    whole = max(plan.total_bytes, chip.hbm_bytes if chip else 0)
    marks, legend = "", []
    for mark, (name, size) in zip(MARKS, plan.bytes.items(), strict=False):
        width = round(BAR_WIDTH * size / whole) or int(200 * size >= whole)
        marks += mark * width
        if width:
            legend.append(f"{mark} {name}")
    left = plan.headroom_frac
    room = "" if left is None else f" {100 * left:.0f} % of {whole / 2**30:.1f} GiB free"
    key = "  ".join(legend) or "everything together takes less than a mark"
    return [f"[{marks[:BAR_WIDTH].ljust(BAR_WIDTH)}]{room}", f" {key}"]


def mesh_lines(plan: Plan) -> list[str]:
    """The mesh, and its devices as blocks of squares."""
    from glamcli.plan import words

    mesh = words.MeshPicture.of(plan)
    rows, columns = min(mesh.rows, MAX_ROWS), min(mesh.columns, BAR_WIDTH // 2)
    shown = min(mesh.num_blocks, max(1, BAR_WIDTH // (columns + 1)))
    cut = (" ..." if shown < mesh.num_blocks else "", " ..." if columns < mesh.columns else "")
    line = " ".join(["▪" * columns] * shown) + "".join(cut)
    lines = [f"mesh: {words.mesh_words(plan)}", *[f" {line}"] * rows]
    if rows < mesh.rows:
        lines.append(f" ... {mesh.rows} rows")
    return [*lines, *(f" {sentence}" for sentence in mesh.caption(shown))]


def _write_page(loaded: Loaded, plan: Plan, path: Path) -> None:
    from glamcli.plan.page import page

    try:
        path.write_text(page(loaded.name, plan), encoding="utf-8")
    except OSError as error:
        raise PlanError(f"cannot write {path}: {error.strerror or error}") from error


def _tell_search(
    loaded: Loaded, target: Target, prices: Prices, num_compiled: int, as_json: bool
) -> None:
    from glamcli.cli import render
    from glamcli.plan.search import search

    progress = render.make_progress(as_json)
    with progress.phase(f"searching layouts of {loaded.name} for {target.words}"):
        found = _interruptible(
            lambda: search(
                loaded.recipe, target, prices, num_compiled=num_compiled, tell=progress.say
            )
        )
    if as_json:
        _emit_search(loaded, found)
    else:
        _show_search(loaded, target, found)
    if not found.plans:
        _, why = found.refused[0]
        raise PlanError(f"none of {found.num_compiled} compiled layouts fits; the first: {why}")


def _show_search(loaded: Loaded, target: Target, found: SearchResult) -> None:
    from glamcli.cli import render
    from glamcli.plan import words

    rows: list[Sequence[str]] = []
    for candidate, plan in found.plans:
        assert plan.time is not None
        assert plan.cost is not None
        rows.append(
            (
                " ".join(candidate.settings) or "as in the recipe",
                "same" if candidate.same_run else "changed",
                words.seconds_words(plan.time.total),
                f"{plan.cost.tokens_per_second:,.0f}",
                f"{100 * plan.cost.utilization_frac:.1f} %",
                words.size(plan.total_bytes),
            )
        )
    columns = ("layout", "run", ">step", ">tokens/s", ">utilization", ">per device")
    if rows:
        render.print_table(columns, rows, title=f"{loaded.name} on {target.words} (estimates)")
    for candidate, why in found.refused:
        click.echo(f"refused: {' '.join(candidate.settings)}: {why}")
    dropped = "; ".join(f"{number:,} {why}" for why, number in found.dropped.most_common())
    click.echo(f"\ncompiled {found.num_compiled}; dropped before: {dropped or 'none'}")
    if found.best is not None:
        chosen = " ".join(f"--set {each}" for each in found.best[0].settings)
        click.echo(f"best that trains the same: {chosen or 'the recipe as it is'}")
    if found.plans and not found.plans[0][0].same_run:
        chosen = " ".join(f"--set {each}" for each in found.plans[0][0].settings)
        click.echo(f"faster per token, but another run: {chosen}")


def _emit_search(loaded: Loaded, found: SearchResult) -> None:
    for candidate, plan in found.plans:
        about = {"settings": candidate.settings, "same_run": candidate.same_run}
        row = {"event": "plan", "recipe": loaded.name, **about, **plan.to_json()}
        click.echo(json.dumps(row))
    for candidate, why in found.refused:
        row = {"event": "refused", "settings": candidate.settings, "why": why}
        click.echo(json.dumps(row))
    best = found.best and found.best[0].settings
    row = {"compiled": found.num_compiled, "dropped": dict(found.dropped), "best": best}
    click.echo(json.dumps({"event": "search", **row}))


def _tell_all(loaded: Loaded, chips: dict[str, Chip], prices: Prices, as_json: bool) -> None:
    from glamcli.cli import render
    from glamcli.plan import words
    from glamcli.plan.search import all_targets

    progress, found = render.make_progress(as_json), []
    slices = all_targets(loaded.recipe, chips, prices, progress.say)
    with progress.phase(f"looking for slices that fit {loaded.name}"):
        while (each := _interruptible(lambda: next(slices, None))) is not None:
            found.append(each)
            if as_json:
                _emit_slice(loaded, *each)
    if as_json:
        return
    rows: list[Sequence[str]] = []
    for chip, plan, why in found:
        if plan is None or plan.cost is None:
            rows.append((chip.name, "-", "", "", "", "", why))
            continue
        layout = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1)
        settings = f"{layout} remat={plan.recipe.train.remat}".strip()
        dollars = "-" if plan.cost.dollars is None else words.dollars(plan.cost.dollars)
        size = words.size(plan.total_bytes)
        days = words.figure(plan.cost.days)
        step = words.seconds_words(plan.cost.step_seconds)
        rows.append((chip.name, plan.target.name, size, step, days, dollars, settings))
    columns = (
        "chip",
        "smallest slice",
        ">each device",
        ">step",
        ">days",
        ">price",
        "layout, or why none",
    )
    render.print_table(columns, rows, title=f"{loaded.name}: smallest slices (estimates)")


def _emit_slice(loaded: Loaded, chip: Chip, plan: Plan | None, why: str) -> None:
    about = {"event": "plan", **plan.to_json()} if plan else {"event": "refused", "why": why}
    click.echo(json.dumps({"recipe": loaded.name, "chip": chip.name, **about}))
