"""A plan as one HTML page: no scripts, no other files, readable without a network."""

import math
import re
from html import escape
from itertools import chain, cycle, repeat
from pathlib import Path

from glamcli.config.sizes import bytes_text, short
from glamcli.plan import words
from glamcli.plan.memory import ArrayLayout
from glamcli.plan.planner import Plan
from glamcli.webpage import cards, colour_key, document, escaped_rows, html_table, share_bar

MAX_CELLS = 1024
"""Devices that the picture of the mesh shows at most."""
FEW_CELLS, LARGE, SMALL = 128, 28, 14
"""Pixels of a device's square: `LARGE` up to `FEW_CELLS` devices, else `SMALL`."""

PLAN_STYLE = Path(__file__).with_suffix(".css")
# fmt: off
COLOURS = (
    "#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2", "#97bbf5", "#9c6b4e",
    "#ff8ab7", "#9498a0",
)
# fmt: on
WAITING = ("#d1495b", "#e07a5f", "#b5838d", "#e5989b")


def page(name: str, plan: Plan) -> str:
    """The whole page as text."""
    parts = [
        f"<h1>{escape(name)} <b>fits</b> {escape(plan.target.words)}</h1>",
        f"<p class=soft>{escape(words.method_words(plan))}</p>",
        _cards(plan),
        f"<h2>Memory of one {words.device(plan)}</h2>",
        _memory(plan),
        "<h2>Mesh</h2>",
        _mesh(plan),
        "<h2>How arrays are laid out</h2>",
        _arrays(plan),
    ]
    if plan.time is not None:
        parts += ["<h2>Time of a step (estimate)</h2>", _time(plan)]
    for (name, *columns), rows in words.tables(plan):
        parts += [f"<h2>{name.capitalize()}</h2>", html_table(("", *columns), escaped_rows(rows))]
    return document(f"{name} on {plan.target.words}", "".join(parts), PLAN_STYLE.read_text("utf-8"))


def _cards(plan: Plan) -> str:
    """The most important figures, large; their units are in the small print or fit beside them."""
    left = plan.headroom_frac
    room = "" if left is None else f", {100 * left:.0f} % free"
    found = [(bytes_text(plan.total_bytes), f"of a {words.device(plan)}{room}")]
    if (cost := plan.cost) is not None:
        hours = words.figure(cost.chip_hours) if cost.chip_hours < 1000 else short(cost.chip_hours)
        found += [
            (words.seconds_words(cost.step_seconds), "per step"),
            (short(cost.tokens_per_second), "tokens per second"),
            (f"{100 * cost.utilization_frac:.1f} %", "utilization"),
            (words.run_length(cost.days), f"{hours} chip-hours"),
        ]
        energy = f"{words.figure(cost.mwh)} MWh"
        if cost.dollars is None:
            found.append((energy, "energy"))
        else:
            small = words.dollars(cost.dollars)
            found.append((f"${short(cost.dollars)}" if cost.dollars >= 1000 else small, energy))
    return cards(found)


def _memory(plan: Plan) -> str:
    """A bar of a device's memory, a piece per group, and its key with sizes."""
    parts = list(zip(COLOURS, plan.bytes.values(), strict=False))
    rows = escaped_rows(words.memory_rows(plan))
    keys = map(colour_key, chain((colour for colour, _ in parts), repeat("none")))
    keyed = [(key + name, held) for key, (name, held) in zip(keys, rows, strict=False)]
    sums = len(rows) - len(plan.bytes)
    return share_bar(parts, plan.whole_bytes) + html_table(("", ">size"), keyed, sums)


def _time(plan: Plan) -> str:
    """A bar of a step, a piece per part of the model and per network, and its key with seconds."""
    assert plan.time is not None
    parts, rows = [], []
    colours, waiting = cycle(COLOURS), cycle(WAITING)
    for name, seconds in words.time_parts(plan):
        colour = next(waiting if name.startswith("waiting") else colours)
        parts.append((colour, seconds))
        rows.append((colour_key(colour) + escape(name), words.seconds_words(seconds)))
    rows.append(("total", words.seconds_words(plan.time.total)))
    return share_bar(parts, plan.time.total) + html_table(("", ">time"), rows, sums=1)


def _mesh(plan: Plan) -> str:
    """The devices: a block per shard of the outer axis, the inner axes down and across it."""
    mesh = plan.mesh
    blocks, rows = words.block_axes(mesh)
    per_block = mesh[rows] * mesh["model"]
    shown = max(1, min(mesh[blocks], MAX_CELLS // per_block))
    columns = f"repeat({mesh['model']},{LARGE if shown * per_block <= FEW_CELLS else SMALL}px)"
    style = f"grid-template-columns:{columns}"
    block = f'<div class=block style="{style}">{"<i></i>" * per_block}</div>'
    caption = "; ".join(words.mesh_caption(mesh, words.device(plan), shown))
    caption = re.sub(r"`(.*?)`", r"<code>\1</code>", escape(caption))
    return (
        f"<p>{escape(words.mesh_words(plan))}</p><div class=mesh>{block * shown}</div>"
        f"<p class=soft>{caption}</p>"
    )


def _arrays(plan: Plan) -> str:
    rows = [
        (f"<code>{escape(name)}</code>", f"<code>{escape(dims)}</code>", _tile(array, plan), held)
        for array, name, dims, held in words.array_rows(plan)
    ]
    columns = ("array", "dimensions / mesh axes", "share", f">each on a {words.device(plan)}")
    note = f"filled: the part that one {words.device(plan)} holds, not to scale below 3 pixels"
    return f"{html_table(columns, rows)}<p class=soft>{note}</p>"


def _tile(array: ArrayLayout, plan: Plan) -> str:
    """A rectangle for the whole array, and in it the part of one device."""
    parts = [math.prod(plan.mesh[axis] for axis in axes) for axes in array.split]
    cuts = [n for n in parts if n > 1]
    across, down = cuts[-1] if cuts else 1, math.prod(cuts[:-1])
    wide, high = max(72 / across, 3), max(22 / down, 3)
    share = f"1/{across * down:,}" if cuts else "all of it"
    return (
        '<div class=tile><svg viewBox="0 0 72 22" aria-hidden="true">'
        f'<rect width="{wide:.1f}" height="{high:.1f}"/></svg>{share}</div>'
    )
