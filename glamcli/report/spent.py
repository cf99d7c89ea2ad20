"""What a run took: its time by kind, memory, money and energy."""

import math
from itertools import cycle
from typing import Any

from glamcli.config.chips import PUE, WATTS_PER_CHIP, Chip, chip_of
from glamcli.progress import duration
from glamcli.report.charts import curve_charts
from glamcli.report.parts import Part, Runs, Section, head_of, name_of, soft
from glamcli.report.run import MAX_SECONDS, ReportRun
from glamcli.train.memory_use import MEMORY_KEYS
from glamcli.train.metric_files import as_number
from glamcli.train.times import TIME_KINDS
from glamcli.webpage import colour_key, escaped_rows, html_table, share_bar, text

NUM_COLOURS = 8
_GIB = 2**30


def speed_section(runs: Runs) -> Section:
    """Speed, utilization and goodput, and where a run's time went."""
    rate = {"tokens per second": "tokens_per_second"}
    utilization = {"utilization": "mfu"}
    parts: list[Part] = [
        *curve_charts(runs, "Speed", "tokens per second", rate, from_zero=True),
        *curve_charts(runs, "Model FLOPs utilization", "%", utilization, scale=100, from_zero=True),
        *curve_charts(
            runs, "Time of a step", "seconds", {"seconds": "seconds_per_step"}, from_zero=True
        ),
        *curve_charts(
            runs, "Goodput", "% of the run's time so far", {"goodput": "goodput"}, scale=100
        ),
    ]
    for run in runs:
        if (total := sum(run.seconds.values())) > 0:
            parts += [_time_bar(run, total, len(runs) > 1)]
    return Section("Speed and time", parts, "The metrics have no times.")


def _time_bar(run: ReportRun, total: float, is_named: bool) -> str:
    """Where the time of a run went."""
    colours = cycle(f"var(--c{n})" for n in range(NUM_COLOURS))
    keyed = [(next(colours), kind, spent) for kind, spent in run.seconds.items()]
    rows = [
        (colour_key(colour) + TIME_KINDS[kind], duration(spent), f"{100 * spent / total:.1f} %")
        for colour, kind, spent in keyed
    ]
    rows.append(("all of the run's time", duration(total), "100 %"))
    title = f"<h3>Where the time of {text(run.name)} went</h3>" if is_named else ""
    bar = share_bar(((colour, spent) for colour, _, spent in keyed), total)
    return title + bar + html_table(("", ">time", ">share"), rows, sums=1) + _apart(run, total)


def _apart(run: ReportRun, total: float) -> str:
    """What passed beside the run's time, where that is more than a hundredth of it."""
    if run.passed is None or not total * 1.01 < run.passed < MAX_SECONDS:
        return ""
    return soft(
        f"{duration(run.passed)} have passed from its start to its newest line. For "
        f"{duration(run.passed - total)} of them no process trained it, or one that was killed "
        "had not written down yet what it did."
    )


def memory_section(runs: Runs) -> Section:
    """Memory of processes and devices, and whatever else the metrics say of memory."""
    process, held, peak = MEMORY_KEYS
    devices = {"in use": held, "most so far": peak}
    chips = {chip.name: chip.usable_bytes / _GIB for run in runs if (chip := _chips(run)[0])}
    others = dict.fromkeys(n for run in runs for n in run.curves.names("") if "memory" in n)
    gib: dict[str, Any] = {"scale": 1 / _GIB, "from_zero": True}
    parts: list[Part] = [
        *curve_charts(runs, "Memory of the fullest device", "GiB", devices, **gib,
                      levels=[(f"a {name} has", size) for name, size in chips.items()]),
        *curve_charts(runs, "Memory of the largest process", "GiB", {"resident": process}, **gib),
        *(chart for name in others if name not in MEMORY_KEYS
          for chart in curve_charts(runs, name, "", {name: name}, from_zero=True)),
    ]  # fmt: skip
    if not parts:
        hint = "<code>glam plan RUN --target local</code> says what a step takes."
        return Section("Memory", missing=f"No memory in the metrics; {hint}")
    if not any(run.curves.names("memory/device") for run in runs):
        parts += [soft("These devices do not tell how much memory they hold.")]
    return Section("Memory", parts)


def cost_section(runs: Runs) -> Section:
    """Chip-hours, money and energy so far and to the end, where the chip is known."""
    rows = []
    for run in runs:
        chip, num_chips = _chips(run)
        if chip is None or not run.seconds:
            continue
        so_far = num_chips * sum(run.seconds.values()) / 3600
        to_end = so_far + num_chips * _seconds_to_the_end(run) / 3600
        price = "without a price" if chip.price is None else f"${chip.price:g} per hour"
        head = [*name_of(runs, run), f"{num_chips:g} x {chip.name}, {price}"]
        for until, hours in (("so far", so_far), ("to the end", to_end)):
            money = "-" if chip.price is None else f"${hours * chip.price:,.2f}"
            energy = _energy(hours * WATTS_PER_CHIP * PUE)
            rows.append([*head, until, f"{hours:,.1f}", money, energy])
    if not rows:
        return Section("Cost", missing="The table of chips does not have these devices.")
    columns = (*head_of(runs), "chips", "", ">chip-hours", ">price", ">energy")
    note = f"Price and energy of all of the run's time, at {WATTS_PER_CHIP:g} W per chip and a PUE "
    note += f"of {PUE:g}, as <code>glam plan</code> counts them; to the end at the newest "
    note += "speed, with as much evaluation and saving as so far."
    return Section("Cost", [html_table(columns, escaped_rows(rows)), soft(note)])


def _seconds_to_the_end(run: ReportRun) -> float:
    """What is left of steps, and with it the time beside steps that went with so many so far."""
    steps = sum(run.seconds.get(kind, 0.0) for kind in ("step", "data_wait"))
    beside = sum(run.seconds.get(kind, 0.0) for kind in ("eval", "save"))
    return run.curves.latest.get("seconds_left", 0.0) * (1 + beside / steps if steps > 0 else 1)


def _energy(watt_hours: float) -> str:
    unit, of = ("MWh", 1e6) if watt_hours >= 1e6 else ("kWh", 1e3)
    return f"{watt_hours / of:,.4g} {unit}"


def _chips(run: ReportRun) -> tuple[Chip | None, float]:
    """The chip that a run was last started on, where it is known, and how many."""
    topology = run.about.get("topology")
    kind = topology.get("device_kind") if isinstance(topology, dict) else None
    chip = chip_of(kind) if isinstance(kind, str) else None
    sizes = topology.get("mesh") if isinstance(topology, dict) else None
    if chip is None or not isinstance(sizes, dict):
        return None, 0.0
    axes = [as_number(size) or 0.0 for size in sizes.values()]
    return chip, math.prod(axes) / chip.devices
