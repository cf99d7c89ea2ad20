"""The report as one HTML file: everything in it, nothing fetched, and no script but its own.

The policy in its head makes a browser refuse every other script and every request, so that a name
in a run's files could do nothing even if it were not escaped.
"""

import base64
import hashlib
import json
import re
import time
from collections.abc import Sequence
from importlib.resources import files

from glamcli.report.charts import AnyChart, run_json
from glamcli.report.curves import MAX_POINTS
from glamcli.report.events import EVENT_KINDS, clock_text
from glamcli.report.parts import Section
from glamcli.report.run import ReportRun
from glamcli.report.sections import sections
from glamcli.webpage import document, text

AXES = {"tokens": "tokens", "steps": "steps", "flops": "FLOPs"}


def report_page(runs: Sequence[ReportRun]) -> str:
    """The whole page of one run or several."""
    charts: list[AnyChart] = []
    made = sections(runs)
    body = "".join(_section(each, charts) for each in made)
    title = " · ".join(run.name for run in runs)
    data = {"runs": [run_json(run) for run in runs], "charts": [each.to_json() for each in charts]}
    script = f"/*\n{_file('uPlot.LICENSE')}*/\n{_file('uPlot.js')}\n{_file('report.js')}"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    links = "".join(f'<a href="#{_anchor(each)}">{each.title}</a>' for each in made)
    return document(
        title,
        f"<h1>{text(title)}</h1><p class=soft>made {clock_text(time.time())}</p>"
        f"<nav>{links}</nav>{_controls(runs)}<main>{body}{_about(runs)}</main>"
        f'<script type="application/json" id=data>{_embedded(data)}</script>'
        f"<script>{script}</script>",
        style=_file("uPlot.css") + _file("report.css"),
        head=f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
    )


def _file(name: str) -> str:
    return (files("glamcli.report") / name).read_text(encoding="utf-8")


def _embedded(data: object) -> str:
    """JSON inside a script element: nothing in it ends the element, and no number is not finite."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _anchor(section: Section) -> str:
    return section.title.lower().replace(" ", "-")


def _section(section: Section, charts: list[AnyChart]) -> str:
    """A section as HTML; its charts are added to those of the page."""
    parts, in_row = [], False
    for part in section.parts:
        is_chart = not isinstance(part, str)
        if is_chart != in_row:
            parts.append("<div class=charts>" if is_chart else "</div>")
            in_row = is_chart
        parts.append(_figure(part, charts) if is_chart else part)
    parts += ["</div>"] * in_row
    body = "".join(parts) if section.parts else f"<p class=soft>{section.missing}</p>"
    return f"<section id={_anchor(section)}><h2>{section.title}</h2>{body}</section>"


def _figure(chart: AnyChart, charts: list[AnyChart]) -> str:
    charts.append(chart)
    unit = f" <span class=soft>{text(chart.unit)}</span>" if chart.unit else ""
    return (
        f"<figure data-chart={len(charts) - 1}><figcaption>{text(chart.title)}{unit}</figcaption>"
        f'<div class=plot role=img aria-label="{text(chart.words)}"></div>'
        "<output></output></figure>"
    )


def _controls(runs: Sequence[ReportRun]) -> str:
    """What a reader may choose; the script draws anew."""
    kinds = {each.kind for run in runs for each in run.events}
    over = "tokens" if all(run.tokens_per_step for run in runs) else "steps"

    def choice(kind: str, name: str, value: str, label: str, is_on: bool) -> str:
        on = " checked" * is_on
        return f"<label><input type={kind} name={name} value={value}{on}>{label}</label>"

    axis = "".join(choice("radio", "x", v, label, v == over) for v, label in AXES.items())
    marks = "".join(
        choice("checkbox", "mark", kind, f"<b>{sign}</b> {name}", True)
        for kind, (sign, name) in EVENT_KINDS.items()
        if kind in kinds
    )
    marks = f"<fieldset><legend>marks</legend>{marks}</fieldset>" if marks else ""
    other = choice("checkbox", "y", "log", "swap linear and log", False)
    return (
        f"<form id=controls autocomplete=off><fieldset><legend>over</legend>{axis}</fieldset>"
        f"{marks}<fieldset><legend>heights</legend>{other}</fieldset></form>"
        "<noscript><p>Curves need JavaScript; tables do not.</p></noscript>"
    )


def _about(runs: Sequence[ReportRun]) -> str:
    widths = sorted({run.curves.width for run in runs})
    if widths == [1]:
        drawn = "Every number of the metrics is drawn."
    else:
        sizes = ", ".join(f"{width:,}" for width in widths)
        drawn = (
            f"A curve has {MAX_POINTS:,} points at most: each is the mean of the numbers logged in "
            f"up to {sizes} steps, and the band around the curve goes from the least to the "
            "greatest of them, so that no spike is lost. Scores and held-out losses stand at the "
            "steps at which they were measured."
        )
    return (
        "<section id=reading><h2>How to read this</h2><p class=soft>"
        f"{drawn} Drag across a chart to look closer, double-click to go back; click a name below "
        "a chart to hide its curve. FLOPs are those that the model needs for its tokens, padding "
        "included, not those that the hardware executes (<code>glam recipe show</code>). In heat "
        "maps a column is the mean of what was logged in its steps. The file needs no "
        "network and sends nothing."
        "</p></section>"
    )
