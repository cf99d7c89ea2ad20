"""A plan in words and rows of text, the same for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Iterator

from glamcli.config.sizes import count, flops_per_token, short, tokens_total
from glamcli.plan.cost import PAPER
from glamcli.plan.planner import Plan

Rows = Iterator[tuple[str, ...]]


def method_words(plan: Plan) -> str:
    """How the numbers were obtained."""
    if plan.method == "formula":
        return "by formula, coarse: nothing was compiled for this target (docs/planning.md)"
    took = f"{plan.compile_seconds:.0f} s" if plan.compile_seconds else "no time"
    if plan.time is None:
        return f"compiled in {took}; this compiler tells nothing about time"
    return (
        f"compiled in {took}; bytes and collectives are the compiler's, times are estimates from "
        "its schedule (docs/planning.md)"
    )


def mesh_words(plan: Plan) -> str:
    """The mesh, without axes of one device."""
    axes = [f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1]
    return " x ".join(axes) or "one device"


def flops_rows(plan: Plan) -> Rows:
    """Parameters, and operations per token of a training step."""
    sizes, flops = count(plan.recipe), flops_per_token(plan.recipe)
    yield "parameters", short(sizes.total)
    yield "active per token", short(sizes.active)
    yield "FLOPs, useful", short(flops.training)
    if plan.recipe.moe is not None:
        yield "FLOPs, with every expert slot", short(flops.training_padded)
    yield "FLOPs, asked of the hardware", short(plan.hardware_flops_per_token)


def collective_rows(plan: Plan) -> Rows:
    """Kind, mesh axes, executions and bytes per step, as one device sees them."""
    for kind, axes, times, sent in plan.collectives:
        if axes:
            yield kind, " x ".join(axes), f"{times:,}", size(sent)


def time_rows(plan: Plan) -> Rows:
    """The time of a step by what it is spent on, down to a thousandth."""
    time = plan.time
    assert time is not None
    least = time.total / 1000
    for scope, seconds in sorted(time.scopes.items(), key=lambda item: -item[1]):
        if seconds >= least:
            yield f"computing: {scope}", seconds_words(seconds)
    if not time.scopes:
        yield "computing", seconds_words(time.compute)
    for axes, seconds in sorted(time.exposed.items(), key=lambda item: -item[1]):
        if seconds >= least:
            yield f"waiting: {axes}", seconds_words(seconds)
    yield "in all", seconds_words(time.total)


def cost_rows(plan: Plan) -> Rows:
    """The whole run, and the paper's figures beside it."""
    cost = plan.cost
    assert cost is not None
    tokens = tokens_total(plan.recipe)
    yield "tokens per second", f"{cost.tokens_per_second:,.0f}"
    yield "utilization", f"{100 * cost.utilization_frac:.1f} % of peak, active FLOPs only"
    yield "tokens of the run", short(tokens)
    yield "days", f"{cost.days:,.1f}"
    yield "chip-hours", f"{cost.chip_hours:,.0f}"
    if cost.dollars is not None:
        yield "price", f"${cost.dollars:,.0f}"
    yield "energy", f"{cost.mwh:,.1f} MWh"
    yield (
        "the paper",
        f"{PAPER['mwh']:.0f} MWh for 600B tokens; {PAPER['half_mwh']:.0f} MWh and "
        f"{PAPER['half_hours']:.0f} hours for 280B ({PAPER['run']})",
    )


def lives(plan: Plan) -> Rows:
    """Every array of weights: its name, what its dimensions are split over, bytes on a device."""
    for array in plan.arrays:
        split = [" x ".join(axes) if axes else "-" for axes in array.split]
        whole = all(each == "-" for each in split)
        where = "on every device" if whole else "[" + ", ".join(split) + "]"
        yield array.name, where, size(array.bytes)


def memory_rows(plan: Plan) -> Rows:
    """Groups of a device's memory, their sum, and what the device has."""
    for name, held in plan.bytes.items():
        yield name, size(held)
    yield "in all", size(plan.total_bytes)
    if plan.target.chip is not None:
        yield f"of a {device(plan)}'s", size(plan.target.chip.hbm_bytes)


def device(plan: Plan) -> str:
    """What a device of the target is called."""
    chip = plan.target.chip
    if chip is None:
        return "device"
    return "chip" if chip.devices == 1 else "core"


def size(held: float) -> str:
    """Bytes as `4.29 GiB`."""
    for unit, of in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if held >= 0.9995 * of:
            return f"{held / of:,.2f} {unit}"
    return f"{held:,.0f} B"


def seconds_words(seconds: float) -> str:
    """Seconds as `1.204 s` or `3.2 ms`."""
    return f"{seconds:,.3f} s" if seconds >= 0.1 else f"{1000 * seconds:,.3g} ms"
