"""A plan as one HTML page: no scripts, no other files, readable without a network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from glamcli.plan.planner import Plan
from glamcli.plan.words import (
    collective_rows,
    cost_rows,
    device,
    flops_rows,
    lives,
    memory_rows,
    mesh_words,
    method_words,
    time_rows,
)

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#9498a0", "#97bbf5")

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #1b1e23; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; padding: .2rem .8rem .2rem 0;
  border-bottom: 1px solid #e4e6ea; vertical-align: top } td.n, th.n { text-align: right;
  font-variant-numeric: tabular-nums }
svg { width: 100%; height: auto } .note { color: #5c6370; font-size: .9rem }
@media (prefers-color-scheme: dark) { body { color: #e6e8eb; background: #16181c }
  td, th { border-color: #33373e } .note { color: #9aa1ad } svg text { fill: #e6e8eb } }
"""


def page(name: str, plan: Plan) -> str:
    """The whole page as text."""
    title = f"{escape(name)} on {escape(plan.target.words)}"
    parts = [
        f"<h1>{title}</h1>",
        f"<p class=note>{escape(method_words(plan))}</p>",
        f"<h2>Memory of one {device(plan)}</h2>",
        _bar(plan),
        _table(("", ">size"), memory_rows(plan)),
        "<h2>Mesh</h2>",
        f"<p>{escape(mesh_words(plan))}</p>",
        _grid(plan),
        "<h2>Where arrays live</h2>",
        _table(("weights", "split over", ">each device"), lives(plan)),
        "<h2>Operations per token</h2>",
        _table(("", ">per token"), flops_rows(plan)),
    ]
    if plan.collectives:
        columns = ("collective", "over", ">times a step", ">bytes a step")
        parts += ["<h2>Collectives</h2>", _table(columns, collective_rows(plan))]
    if plan.time is not None:
        parts += ["<h2>Time of a step (estimate)</h2>", _table(("", ">time"), time_rows(plan))]
    if plan.cost is not None:
        parts += ["<h2>The whole run (estimate)</h2>", _table(("", ""), cost_rows(plan))]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _bar(plan: Plan) -> str:
    """A bar of the memory, a piece per group."""
    chip = plan.target.chip
    whole = max(plan.total_bytes, chip.hbm_bytes if chip else 0)
    left, pieces, labels = 0.0, [], []
    for index, (name, size) in enumerate(plan.bytes.items()):
        width = 1000 * max(size, 0) / whole
        colour = COLOURS[index % len(COLOURS)]
        pieces.append(
            f'<rect x="{left:.1f}" y="0" width="{width:.1f}" height="40" fill="{colour}"/>'
        )
        x, y = 250 * (index % 4), 68 + 26 * (index // 4)
        labels.append(
            f'<rect x="{x}" y="{y - 12}" width="14" height="14" fill="{colour}"/>'
            f'<text x="{x + 20}" y="{y}" font-size="14">{escape(name)}</text>'
        )
        left += width
    return (
        '<svg viewBox="0 0 1000 110" role="img" aria-label="memory"><rect x="0" y="0" width="1000" '
        f'height="40" fill="none" stroke="#9498a0"/>{"".join(pieces)}{"".join(labels)}</svg>'
    )


def _grid(plan: Plan) -> str:
    """Devices as a grid: rows are data x expert shards, columns the model axis."""
    rows = plan.mesh["slice"] * plan.mesh["data"] * plan.mesh["expert"]
    columns = plan.mesh["model"]
    shown_rows, shown_columns = min(rows, 16), min(columns, 32)
    cells = [
        f'<rect x="{30 * column + 1}" y="{18 * row + 1}" width="27" height="15" rx="2" '
        f'fill="{COLOURS[row % len(COLOURS)]}" fill-opacity="{1 - 0.6 * column / columns:.2f}"/>'
        for row in range(shown_rows)
        for column in range(shown_columns)
    ]
    width, height = 30 * max(shown_columns, 20), 18 * shown_rows
    cut = f", the first {shown_rows} rows shown" if rows > shown_rows else ""
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="mesh">{"".join(cells)}</svg>'
        f"<p class=note>a row is a shard of the batch ({rows:,} of them{cut}); its "
        f"{columns} device(s) share the width of every layer</p>"
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    right = [name.startswith(">") for name in columns]

    def line(cells: Sequence[str], tag: str) -> str:
        marked = (
            f"<{tag}{' class=n' if number else ''}>{escape(cell)}</{tag}>"
            for cell, number in zip(cells, right, strict=True)
        )
        return f"<tr>{''.join(marked)}</tr>"

    head = line([name.removeprefix(">") for name in columns], "th")
    return f"<table>{head}{''.join(line(row, 'td') for row in rows)}</table>"
