"""`glam watch`: a run at a glance, in a terminal, again and again."""

from __future__ import annotations

import shlex
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from glamcli.cli import render
from glamcli.cli.options import run_argument
from glamcli.cli.render import in_one_line
from glamcli.cli.screen import Screen, is_drawable
from glamcli.config.files import is_path
from glamcli.config.sizes import bytes_text
from glamcli.errors import CheckpointError, first_of
from glamcli.progress import duration
from glamcli.storage import is_url
from glamcli.train.metrics import FAILED_TASKS, STDERR
from glamcli.train.watching import Numbers, WatchedRun

SECONDS = 2.0
SECONDS_AT_URL = 10.0
"""of two requests, one for the list of what is there; every request is paid for."""
SHOWN_NAMES = 6
SHOWN_EVENTS = 3
_LABEL = 10
_BLOCKS = "▁▂▃▄▅▆▇█"

_Rows = Iterator[tuple[str, list[str] | str]]


@click.command()
@run_argument
@click.option("--once", is_flag=True, help="Show it once, as where the output is no terminal.")
def command(run: Path, once: bool) -> None:
    """Show how RUN is doing, every two seconds until Ctrl-C, at a URL every ten.

    Progress, losses, routers, speed, the newest save, scores and alarms of a run that trains, is
    finished or has died, read from its folder. `glam report` draws all of it.
    """
    watched = WatchedRun(run)
    watched.refresh()
    if watched.unread is not None:
        raise watched.unread
    if watched.state in ("absent", "empty"):
        raise CheckpointError(
            f"{run} {_STATES[watched.state](watched)}",
            hint="give the folder of a run, such as runs/quickstart",
        )
    if once or not is_drawable():
        for line in run_page(watched, render.width(), time.time()):
            click.echo(line)
        return
    with suppress(KeyboardInterrupt), Screen() as screen:
        while True:
            screen.draw(run_page(watched, screen.width, time.time()))
            time.sleep(SECONDS_AT_URL if is_url(run) else SECONDS)
            watched.refresh()


def run_page(run: WatchedRun, width: int, now: float) -> list[str]:
    """What is known of a run, in lines of at most `width` columns, but for the command to paste;
    `now` in seconds since 1970."""
    lines = list(_wrapped("", [in_one_line(str(run.run)), _STATES[run.state](run)], width))
    if run.state == "stopped":
        lines.append("to go on".ljust(_LABEL) + _command(run.run))
    for label, parts in _rows(run, width, now):
        if isinstance(parts, str):
            lines += _wrapped(label, parts.split(), width, " ")
        elif parts:
            lines += _wrapped(label, parts, width)
    return lines


_STATES: dict[str, Callable[[WatchedRun], str]] = {
    "absent": lambda run: "is no folder",
    "empty": lambda run: "has no sign of a run",
    "starting": lambda run: f"starting, {run.holder}",
    "training": lambda run: f"training, {run.holder}",
    "finished": lambda run: "finished",
    "failed": lambda run: "failed",
    "stopped": lambda run: "stopped",
}


def _rows(run: WatchedRun, width: int, now: float) -> _Rows:
    """A label and short texts, each of which stays on one line, or one long text."""
    numbers = run.numbers
    if run.unread is not None:
        age = _age(run.read_at, now)
        yield "no answer", f"{in_one_line(run.unread.what)}; shown is what was there {age} ago"
    if run.failure is not None and run.state == "failed":
        yield "failure", in_one_line(run.failure[1])
    yield "steps", list(_progress(run, width, now))
    yield "loss", list(_loss(numbers, width))
    for step, text in list(numbers.events)[-SHOWN_EVENTS:]:
        yield "event", f"step {step:,}: {in_one_line(text)}"
    yield "held-out", _newest(numbers, "heldout/", "{:.4g}", width - _LABEL)
    yield "optimizer", list(_shown(numbers, _OPTIMIZER))
    yield "routers", list(_shown(numbers, _ROUTERS))
    yield "speed", list(_shown(numbers, _SPEED))
    yield "memory", list(_shown(numbers, _MEMORY, bytes_text))
    if run.saved is not None:
        yield "saved", [f"step {run.saved[0]:,}", f"{_age(run.saved[1], now)} ago"]
    yield "scores", _newest(numbers, "eval/", "{:.3g}", width - _LABEL)


def _command(folder: Path) -> str:
    """What trains the run on; a name without a slash would be that of a shipped recipe."""
    path = str(folder) if is_path(str(folder)) else f"./{folder}"
    return f"glam train {in_one_line(shlex.quote(path))}"


_OPTIMIZER = {
    "learning_rate": "rate {:.3g}",
    "grad_norm": "gradient norm {:.3g}",
    "bad_steps_total": "skipped {:,.0f}",
}
_ROUTERS = {
    "max_first_frac": "top expert {:.1%}",
    "router_entropy_nats": "entropy {:.2f} nats",
    "balance": "balance {:.2f}",
    "dropped_first_frac": "first drops {:.1%}",
    "dropped_second_frac": "second drops {:.1%}",
    "capacity_factor": "capacity {:g}",
    "dead_experts": "dead experts {:.0f}",
    "router_alarms": "alarms {:.0f}",
}
_SPEED = {
    "tokens_per_second": "{:,.0f} tokens/s",
    "seconds_per_step": "{:.3g} s/step",
    "mfu": "MFU {:.1%}",
    "goodput": "goodput {:.1%}",
}
_MEMORY = {
    "memory/device_bytes": "device {}",
    "memory/device_peak_bytes": "most {}",
    "memory/process_bytes": "process {}",
}


def _shown(
    numbers: Numbers, formats: dict[str, str], shown: Callable[[float], Any] = float
) -> Iterator[str]:
    for name, text in formats.items():
        if name in numbers.latest:
            yield text.format(shown(numbers.latest[name][1]))


def _progress(run: WatchedRun, width: int, now: float) -> Iterator[str]:
    numbers, total = run.numbers, run.recipe.train.steps if run.recipe else None
    if total is not None:
        done = min(numbers.step / total, 1.0)
        cells = _cells(width)
        filled = int(done * cells)
        yield "█" * filled + "░" * (cells - filled)
        yield f"{numbers.step:,}/{total:,}"
        yield f"{done:.1%}"
    elif numbers.step:
        yield f"{numbers.step:,}"
    left = numbers.value("seconds_left")
    if run.state == "training" and left is not None:
        yield f"{duration(max(0.0, left - max(0.0, now - numbers.unix_seconds)))} left"
    if (tokens := numbers.value("tokens_seen")) is not None:
        yield f"{tokens:,.0f} tokens"
    if numbers.unix_seconds and run.state != "finished":
        yield f"newest line {_age(numbers.unix_seconds, now)} ago"


def _loss(numbers: Numbers, width: int) -> Iterator[str]:
    if numbers.losses:
        yield sparkline([loss for _, loss in numbers.losses], _cells(width))
    if "loss" in numbers.latest:
        loss = numbers.value("loss")
        yield "not finite" if loss is None else f"{loss:.4f}"
    yield from _shown(numbers, {"perplexity": "perplexity {:.4g}"})


def _newest(numbers: Numbers, prefix: str, form: str, columns: int) -> list[str]:
    """The numbers with this prefix of the newest step that has any; of a name that is too long for
    its number to stand beside it, the two ends."""
    found = {name: each for name, each in numbers.latest.items() if name.startswith(prefix)}
    newest = max((step for step, _ in found.values()), default=0)
    shown = []
    for name, (step, value) in found.items():
        if step != newest or name.endswith(STDERR) or (name == FAILED_TASKS and not value):
            continue
        number, error = f" {form.format(value)}", found.get(name + STDERR)
        name = in_one_line(name.removeprefix(prefix))
        shown.append(_ends(name, columns - len(number)) + number)
        if error and _columns(more := f"{shown[-1]} ± {error[1]:.2g}") <= columns:
            shown[-1] = more
    return [*first_of(shown, SHOWN_NAMES), f"(step {newest:,})"] if shown else []


def sparkline(values: Sequence[float], cells: int) -> str:
    """The values as bars from the lowest to the highest, each the mean of its part of them."""
    cells = min(cells, len(values))
    bounds = [len(values) * cell // cells for cell in range(cells + 1)]
    parts = [values[a:b] for a, b in pairwise(bounds)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((mean - low) * scale)] for mean in means)


def _cells(width: int) -> int:
    return max(8, min(40, width - 50))


def _age(unix_seconds: float, now: float) -> str:
    return duration(max(0.0, now - unix_seconds))


def _wrapped(label: str, parts: Iterable[str], width: int, gap: str = "  ") -> Iterator[str]:
    """Lines of texts beside a label; a text that is too long for a line is cut."""
    indent = " " * (_LABEL if label else 2)
    line, texts = label.ljust(_LABEL if label else 0), 0
    for part in parts:
        part = _cut(part, width - len(indent))
        if texts and _columns(line + gap + part) > width:
            yield line
            line, texts = indent, 0
        line, texts = line + gap * (texts > 0) + part, texts + 1
    yield line


def _cut(text: str, columns: int) -> str:
    columns = max(columns, 1)
    if _columns(text) <= columns:
        return text
    while _columns(text) > columns - 1:
        text = text[:-1]
    return text + "…"


def _ends(text: str, columns: int) -> str:
    """The text without its middle, where it is too long."""
    if _columns(text) <= columns:
        return text
    first, last = text[: len(text) // 2], text[len(text) // 2 :]
    while first and _columns(f"{first}…{last}") > columns:
        first, last = (first[:-1], last) if len(first) > len(last) else (first, last[1:])
    return f"{first}…{last}"


def _columns(text: str) -> int:
    return sum(1 + (unicodedata.east_asian_width(char) in "WF") for char in text)
