"""A plan in words and rows of text, the same for the terminal and for the page."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, zip_longest

from glamcli.config.sizes import bytes_text, count, flops_per_token, short, tokens_total
from glamcli.plan.cost import PAPER
from glamcli.plan.memory import ArrayLayout, passing
from glamcli.plan.planner import Plan
from glamcli.plan.schedule import Time
from glamcli.plan.topology import Target

BAR_WIDTH = 52
MAX_ROWS = 8
MARKS = "█▓▒░▞▚·"

_TextRows = Iterator[tuple[str, ...]]


def method_words(plan: Plan) -> str:
    """How the numbers were obtained."""
    if plan.method == "formula":
        return "by formula, coarse: nothing was compiled for this target (docs/planning.md)"
    took = f"{plan.compile_seconds:.0f} s" if plan.compile_seconds else "no time"
    if plan.time is None:
        return f"compiled in {took}; this compiler gives no estimate of time"
    # The compiler counts HBM only.
    on_chip = "; part of the gradients and activations stays in on-chip memory"
    text = (
        f"compiled in {took}; bytes and collectives are the compiler's; times are estimates from "
        "its schedule (docs/planning.md)" + on_chip * ("gradients" not in plan.bytes)
    )
    return "; ".join((text, *kernel_words(plan.time, plan.target), *waiting_words(plan.time)))


def kernel_words(time: Time, target: Target) -> Iterator[str]:
    """How kernels were priced, and which were not."""
    chip = target.chip
    assert chip is not None
    shares = (
        f"{name} {100 * chip.kernel_efficiency(name):.0f} %"
        + " (a guess)" * (name not in chip.kernels)
        for name, _ in _longest(time.kernels)
    )
    if time.kernels:
        yield (
            f"{seconds_words(sum(time.kernels.values()))} are kernels, estimated from their own "
            f"FLOPs and bytes at a share of the peak: {', '.join(shares)}"
        )
    if time.unpriced:
        runs = (f"{name} ({times:,.0f} a step)" for name, times in _longest(time.unpriced))
        yield f"not priced, because they do not state their cost: {', '.join(runs)}"


def waiting_words(time: Time) -> Iterator[str]:
    """What options of the compiler may save, where that is at least a hundredth of a step."""
    if time.waiting >= 0.01 * time.total:
        saved = f"up to {seconds_words(time.waiting)} of {seconds_words(time.total)}"
        yield f"options of the compiler may hide waiting, {saved}: `--tune` tries them"


def mesh_words(plan: Plan) -> str:
    """The mesh, without axes of one device."""
    axes = [f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1]
    return " x ".join(axes) or "one device"


def block_axes(mesh: dict[str, int]) -> tuple[str, str]:
    """(axis of the blocks, axis of the rows in one) of a picture, the columns being `model`.

    A block is a shard of experts, or of `data` without experts on several devices. All of it is
    there once per slice and stage.
    """
    return ("expert", "data") if mesh["expert"] > 1 else ("data", "expert")


def mesh_caption(mesh: dict[str, int], device_name: str, shown: int) -> list[str]:
    """What the picture shows, in parts of a sentence; `shown` blocks were drawn."""
    blocks, rows = block_axes(mesh)
    shards = f"one of {mesh[blocks]:,} shards of `{blocks}`"
    inside = ((rows, f"`{rows}` goes down"), ("model", "`model` across"))
    directions = " and ".join(what for axis, what in inside if mesh[axis] > 1)
    found = [f"a square is a {device_name}, {'a block ' if directions else ''}{shards}"]
    found += [f"{directions} a block"] if directions else []
    found += [f"the first {shown} are shown"] if shown < mesh[blocks] else []
    outer = (axis for axis in ("slice", "stage") if mesh[axis] > 1)
    return found + [f"there are {mesh[axis]} of this, one per `{axis}`" for axis in outer]


def bar(plan: Plan) -> list[str]:
    """A bar of a device's memory, a mark per group, and what the marks mean."""
    whole = plan.whole_bytes
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
    mesh = plan.mesh
    num_blocks, num_rows = (mesh[axis] for axis in block_axes(mesh))
    columns = min(mesh["model"], BAR_WIDTH // 2)
    shown = min(num_blocks, max(1, BAR_WIDTH // (columns + 1)))
    cut = (" ..." if shown < num_blocks else "", " ..." if columns < mesh["model"] else "")
    line = " ".join(["▪" * columns] * shown) + "".join(cut)
    lines = [f"mesh: {mesh_words(plan)}", *[f" {line}"] * min(num_rows, MAX_ROWS)]
    if num_rows > MAX_ROWS:
        lines.append(f" ... {num_rows} rows")
    return [*lines, *(f" {each}" for each in mesh_caption(mesh, device(plan), shown))]


def flops_rows(plan: Plan) -> _TextRows:
    """Parameters, and operations per token of a training step."""
    sizes, flops = count(plan.recipe), flops_per_token(plan.recipe)
    yield "parameters", short(sizes.total)
    yield "active per token", short(sizes.active)
    yield "FLOPs, useful", short(flops.training)
    if plan.recipe.moe is not None:
        largest = ""
        if plan.recipe.moe.adaptive_capacity is not None:
            largest = f", capacity factor {plan.recipe.moe.capacity_factor:g} (the largest)"
        yield "FLOPs, with every expert slot" + largest, short(flops.training_padded)
    yield "FLOPs, executed by the hardware", short(plan.hardware_flops_per_token)


def collective_rows(plan: Plan) -> _TextRows:
    """Kind, mesh axes, executions and bytes per step, as one device sees them."""
    for kind, axes, times, sent in plan.collectives:
        if axes:
            yield kind, " x ".join(axes), f"{times:,}", bytes_text(sent)


def time_parts(plan: Plan) -> Iterator[tuple[str, float]]:
    """What a step's seconds are spent on, down to a thousandth of it."""
    time = plan.time
    assert time is not None
    least = time.total / 1000
    parts = {f"computing: {scope}": seconds for scope, seconds in _longest(time.scopes)}
    parts = parts or {"computing": time.compute}
    parts |= {f"waiting: {axes}": seconds for axes, seconds in _longest(time.exposed)}
    yield from ((name, seconds) for name, seconds in parts.items() if seconds >= least)


def _longest(times: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(times.items(), key=lambda item: -item[1])


def cost_rows(plan: Plan) -> _TextRows:
    """The whole run, and the paper's figures beside it."""
    cost = plan.cost
    assert cost is not None
    tokens = tokens_total(plan.recipe)
    yield "tokens per second", f"{cost.tokens_per_second:,.0f}"
    yield "utilization", f"{100 * cost.utilization_frac:.1f} % of peak, active FLOPs only"
    yield "tokens of the run", short(tokens)
    yield "duration", run_length(cost.days)
    yield "chip-hours", figure(cost.chip_hours)
    if cost.dollars is not None:
        yield "price", dollars(cost.dollars)
    yield "energy", f"{figure(cost.mwh)} MWh"
    yield "the paper", PAPER


def array_rows(plan: Plan) -> Iterator[tuple[ArrayLayout, str, str, str]]:
    """Every array, its name, its dimensions over the mesh axes that split them, its bytes. Weights
    that are laid out alike share a row."""
    alike: dict[ArrayLayout, list[str]] = {}
    for array in plan.arrays:
        alike.setdefault(replace(array, name=""), []).append(array.name)
    named = [replace(array, name=join_names(names)) for array, names in alike.items()]
    for array in (*named, *passing(plan.recipe, plan.mesh)):
        yield array, array.name, dims(array), bytes_text(array.bytes)


def join_names(names: list[str]) -> str:
    """Dotted names that differ in few parts, as one: `attention.{query,key}`; layers are named
    where not all of them have it."""
    columns = [list(dict.fromkeys(each)) for each in zip_longest(*(n.split(".") for n in names))]
    if None in chain(*columns) or math.prod(map(len, columns)) != len(names):
        return ", ".join(names)
    if columns[0] == ["blocks"]:
        columns = columns[1:] if len(columns[1]) == 1 else columns[2:]
    return ".".join(each[0] if len(each) == 1 else f"{{{','.join(each)}}}" for each in columns)


def dims(array: ArrayLayout) -> str:
    """An array's dimensions, each over the mesh axes that it is split over: `[64/expert, 512]`."""
    each = ("/".join((f"{n}", *axes)) for n, axes in zip(array.shape, array.split, strict=True))
    return f"[{', '.join(each)}]"


def memory_rows(plan: Plan) -> _TextRows:
    """Groups of a device's memory, their sum, and what the device has."""
    for name, held in plan.bytes.items():
        yield name, bytes_text(held)
    yield "total", bytes_text(plan.total_bytes)
    if plan.target.chip is not None:
        yield f"a {device(plan)} has", bytes_text(plan.target.chip.hbm_bytes)


def tables(plan: Plan) -> Iterator[tuple[tuple[str, ...], _TextRows]]:
    """(columns, rows) of the tables that are the same on a page and on a terminal."""
    yield ("operations of a training step", ">per token"), flops_rows(plan)
    if plan.collectives:
        columns = ("collective", "over", ">times a step", ">bytes a step")
        yield columns, collective_rows(plan)
    if plan.cost is not None:
        yield ("the whole run (estimate)", ""), cost_rows(plan)


def device(plan: Plan) -> str:
    """What a device of the target is called."""
    return "device" if plan.target.chip is None else plan.target.chip.device_name


def figure(value: float) -> str:
    """A number with at least two significant digits, down to a hundredth."""
    if value < 0.01:
        return "below 0.01"
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.1f}" if value >= 1 else f"{value:.2g}"


def run_length(days: float) -> str:
    """Days as `47.6 days`, `3.2 hours` or `0.23 seconds`."""
    for unit, of in (("days", 1), ("hours", 24), ("minutes", 1440)):
        if days * of >= 1:
            return f"{figure(days * of)} {unit}"
    return f"{days * 86400:.2g} seconds"


def dollars(value: float) -> str:
    """US dollars."""
    if 0 < value < 0.01:
        return "below $0.01"
    return f"${value:,.0f}" if value >= 100 else f"${value:.2f}"


def seconds_words(seconds: float) -> str:
    """Seconds as `1.204 s` or `3.2 ms`."""
    return f"{seconds:,.3f} s" if seconds >= 0.1 else f"{1000 * seconds:,.3g} ms"
