"""How progress and results look: a live terminal, plain lines, or one JSON object per line.

Nothing else but `screen.py` uses rich. Commands choose an implementation of
`glamcli.progress.Progress` with `make_progress`, hand it to a program, and print the program's
results with `print_table`. Progress and warnings go to stderr; results, and with `--json`
everything, to stdout. A closed output pipe (`glam train ... --json | head -1`) never ends the run.
"""

import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO, cast

import click
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.table import Column, Table
from rich.text import Text

from glamcli.cli.streams import Lossy, write_line
from glamcli.errors import named, printable
from glamcli.progress import Phase, Progress, duration

PLAIN_WIDTH = 160
NARROW_WIDTH = 70
SECONDS_BETWEEN_LINES = 15.0
SECONDS_WORTH_A_LINE = 2.0  # of a phase inside another one


def make_progress(as_json: bool = False) -> Progress:
    """JSON lines on stdout, or bars if stderr is a terminal, or plain lines on stderr."""
    if as_json:
        return JsonLines(sys.stdout)
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return Live(Console(file=cast(TextIO, Lossy(sys.stderr)), highlight=False))
    return Plain(sys.stderr)


def width() -> int:
    """Columns that a result may have: those of the terminal, or many for a log or a program."""
    return Console().width if sys.stdout.isatty() else PLAIN_WIDTH


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    title: str | None = None,
    note: str | None = None,
) -> None:
    """Prints a table on stdout; columns whose name starts with `>` are aligned to the right.

    Control characters are escaped: names and values may come from files of others.
    """
    # Away from a terminal nothing may wrap: the reader is another program, or a log.
    console = Console(highlight=False, width=width())
    grid = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for name in columns:
        right = name.startswith(">")
        # Where a terminal is too narrow, names continue on the next line; numbers stay whole.
        grid.add_column(
            Text(in_one_line(name[right:])),
            justify="right" if right else "left",
            no_wrap=right,
            overflow="fold",
        )
    for row in rows:
        grid.add_row(*(Text(in_one_line(cell)) for cell in row))
    if title:
        console.print(Text(printable(title), style="bold"))
    console.print(grid)
    if note:
        console.print(Text(printable(note), style="dim"))


def in_one_line(text: str) -> str:
    """The text in one line, control characters escaped."""
    return printable(text).replace("\n", "\\n")


def emit(event: str, **values: Any) -> None:
    """Prints a result on stdout as one JSON object; `event` is its kind."""
    click.echo(named(json.dumps({"event": event, **values})))


def sample(prompt: str, text: str) -> None:
    """Prints a prompt and its continuation on stdout, the prompt in bold on a terminal."""
    console = Console(highlight=False, width=width())
    console.print(Text(printable(prompt), style="bold") + Text(printable(text)), soft_wrap=True)


_STEP = {
    "loss": "loss {:.4f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "MFU {:.1%}",
    "seconds_left": "{} left",
    "dropped_frac": "dropped {:.1%}",
    "capacity_factor": "capacity {:g}",
    "balance": "balance {:.2f}x",
    "learning_rate": "lr {:.2g}",
}


def step_text(values: Mapping[str, Any]) -> str:
    """The numbers of a step in one line, leaving out absent ones."""
    shown = {name: values[name] for name in _STEP if values.get(name) is not None}
    if "seconds_left" in shown:
        shown["seconds_left"] = duration(shown["seconds_left"])
    parts = [_STEP[name].format(value) for name, value in shown.items()]
    if (slowest := values.get("slowest_process_seconds")) is not None:
        parts.append(f"processes {values['fastest_process_seconds']:.2g} to {slowest:.2g} s")
    if values.get("bad_steps_total"):
        parts.append(f"skipped {values['bad_steps_total']}")
    return "  ".join(parts)


class Live(Progress):
    """Bars that redraw in place; a finished outer phase leaves one line."""

    def __init__(self, console: Console):
        self._console = console
        self._bars: _Bars | None = None

    @contextmanager
    def phase(self, name: str, total: int | None = None, unit: str = "") -> Iterator[Any]:
        started = time.monotonic()
        outermost = self._bars is None
        if self._bars is None:
            # In a narrow terminal names wrap, and what a bar says without them is left out.
            wide = self._console.width >= NARROW_WIDTH
            bar = BarColumn(20 if wide else 8, table_column=Column(no_wrap=True))
            done = TextColumn("{task.fields[done]}", markup=False)
            self._bars = _Bars(
                *([SpinnerColumn(finished_text=" ")] if wide else []),
                TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=False)),
                *(bar, done),
                *(
                    [TimeElapsedColumn(), TextColumn("{task.fields[note]}", markup=False)]
                    if wide
                    else []
                ),
                console=self._console,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._bars.start()
        bars = self._bars
        task = bars.add_task(printable(name), total=total, done="", note="")
        phase = _LivePhase(bars, task, total, unit)
        phase.advance(0)
        try:
            yield phase
        finally:
            bars.remove_task(task)
            if outermost:
                bars.stop()
                self._bars = None
        if outermost:
            self.say(f"{name}: {duration(time.monotonic() - started)}")

    def step(self, values: Mapping[str, Any]) -> None:
        if self._bars is not None:
            self._bars.line = step_text(values)

    def say(self, text: str) -> None:
        self._console.print(Text(printable(text)))

    def warn(self, text: str) -> None:
        self._console.print(Text("warning: ", style="yellow") + Text(printable(text)))


class _Bars(RichProgress):
    """Bars, and below them one line of numbers: side by side they would not fit."""

    line = ""

    def get_renderable(self) -> RenderableType:
        bars = super().get_renderable()
        return Group(bars, Text("  " + self.line)) if self.line else bars


class _LivePhase(Phase):
    def __init__(self, bars: _Bars, task: Any, total: int | None, unit: str):
        self._bars, self._task, self._total, self._unit = bars, task, total, unit
        self._done = 0

    def advance(self, units: int = 1) -> None:
        self._done += units
        known = self._total is not None or self._done
        done = _done(self._done, self._total, self._unit) if known else ""
        self._bars.update(self._task, advance=units, done=done)

    def note(self, text: str) -> None:
        self._bars.update(self._task, note=printable(text))


def _counted(count: int, unit: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{count:,} {re.sub(r'((?<=[cs]h)e)?s$', '', unit) if count == 1 else unit}"


def _done(done: int, total: int | None, unit: str) -> str:
    """`1/2 runs`, or `1 run` where the total is not known."""
    return _counted(done, unit) if total is None else f"{done:,}/{_counted(total, unit)}"


class Plain(Progress):
    """One line per event, for logs and pipes; long phases report every 15 seconds."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._depth = 0

    @contextmanager
    def phase(self, name: str, total: int | None = None, unit: str = "") -> Iterator[Any]:
        started = time.monotonic()
        size = f" ({_counted(total, unit)})" if total is not None and unit else ""
        if not self._depth:
            self.say(f"{name}{size} ...")
        self._depth += 1
        try:
            yield _PlainPhase(self, name, total, unit)
        finally:
            self._depth -= 1
        seconds = time.monotonic() - started
        if not self._depth or seconds >= SECONDS_WORTH_A_LINE:
            self.say(f"{name}: done in {duration(seconds)}")

    def step(self, values: Mapping[str, Any]) -> None:
        of = f"/{values['steps']}" if "steps" in values else ""
        self.say(f"step {values.get('step')}{of}  {step_text(values)}")

    def say(self, text: str) -> None:
        write_line(self._stream, printable(text))

    def warn(self, text: str) -> None:
        write_line(self._stream, printable(f"warning: {text}"))


class _PlainPhase(Phase):
    def __init__(self, plain: Plain, name: str, total: int | None, unit: str):
        self._plain, self._name, self._total, self._unit = plain, name, total, unit
        self._done, self._note = 0, ""
        self._next = time.monotonic() + SECONDS_BETWEEN_LINES

    def advance(self, units: int = 1) -> None:
        self._done += units
        # Steps are reported through `Progress.step`.
        if self._unit != "steps" and time.monotonic() >= self._next:
            self._next = time.monotonic() + SECONDS_BETWEEN_LINES
            done = _done(self._done, self._total, self._unit)
            self._plain.say(f"{self._name}: {done} {self._note}")

    def note(self, text: str) -> None:
        self._note = text


class JsonLines(Progress):
    """Every event as one JSON object per line; `event` is its kind."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def emit(self, event: str, **values: Any) -> None:
        write_line(self._stream, named(json.dumps({"event": event, **values})))

    @contextmanager
    def phase(self, name: str, total: int | None = None, unit: str = "") -> Iterator[Any]:
        started = time.monotonic()
        self.emit("phase", name=name, state="begin", total=total, unit=unit)
        yield _JsonPhase(self, name)
        self.emit("phase", name=name, state="end", seconds=round(time.monotonic() - started, 3))

    def step(self, values: Mapping[str, Any]) -> None:
        self.emit("step", **values)

    def say(self, text: str) -> None:
        self.emit("say", text=text)

    def warn(self, text: str) -> None:
        self.emit("warn", text=text)


class _JsonPhase(Phase):
    def __init__(self, lines: JsonLines, name: str):
        self._lines, self._name = lines, name

    def note(self, text: str) -> None:
        self._lines.emit("note", name=self._name, text=text)
