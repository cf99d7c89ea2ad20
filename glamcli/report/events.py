"""What happened in a run and when: restarts, saves, other weights of the mixture, other capacity
factors, skipped updates, alarms, rewinds, failures."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from glamcli.errors import GlamError
from glamcli.saved_steps import saved_steps
from glamcli.train.failures import FAILURES, noted_failures
from glamcli.train.metric_files import as_number
from glamcli.train.rewind import Rewind

EVENT_KINDS = {
    "restart": ("R", "restart"),
    "save": ("|", "saved step"),
    "mixture": ("M", "weights of the mixture"),
    "capacity": ("C", "capacity factor"),
    "alarm": ("A", "alarm"),
    "skipped": ("K", "skipped updates"),
    "rewind": ("W", "rewind"),
    "failure": ("F", "failure"),
}
"""Kinds of events: their mark on the curves, and what they are called."""
MAX_EVENTS = 300
"""of a kind; of more, the newest are kept."""
_START = "seconds/start"
_RESTARTED_SECONDS = 0.25
"""No start of the program is shorter. A run that goes back by itself starts again as well, without
the program."""


@dataclass(frozen=True)
class Event:
    """Something that happened at a step; `step` is the last of several."""

    step: int
    kind: str
    text: str


class Noticed:
    """The events that the lines of the metrics tell of."""

    def __init__(self, rewinds: Sequence[Rewind]) -> None:
        self.events: list[Event] = []
        self.num_left_out = 0
        """older ones, of which there are too many."""
        self._went_back = [each.unix_seconds for each in rewinds if each.automatic]
        self._started: float | None = None
        self._heard = 0.0
        self._skipped: tuple[int, int] | None = None

    def line(self, step: int, values: Mapping[str, Any]) -> None:
        """Takes a line; they come in order."""
        started = as_number(values.get(_START))
        if started is not None:
            heard = as_number(values.get("unix_seconds")) or 0.0
            is_longer = self._started is not None and started - self._started > _RESTARTED_SECONDS
            if is_longer and not any(self._heard <= at <= heard for at in self._went_back):
                when = clock_text(values.get("unix_seconds"))
                self._add(Event(step, "restart", f"started again; first line {when}"))
            self._started, self._heard = started, heard
        if as_number(values.get("bad_steps")):
            self._skip(step, "a spike" if values.get("spike") == 1 else "not finite")
        if isinstance(switch := values.get("capacity_switch"), dict):
            from_step, factor = (as_number(switch.get(key)) for key in ("from_step", "factor"))
            if from_step is not None and factor is not None:
                self._add(Event(step, "capacity", f"{factor:g} from step {from_step:,.0f} on"))
        alarms = values.get("alarms")
        for text in alarms if isinstance(alarms, list) else ():
            self._add(Event(step, "alarm", str(text)[:500]))

    def _skip(self, step: int, why: str) -> None:
        """Adds a skipped step to those directly before it."""
        text, last = f"update skipped: {why}", self.events[-1] if self.events else None
        if last and last.kind == "skipped" and self._skipped and step == self._skipped[1] + 1:
            self._skipped = self._skipped[0], step
            first = f"from step {self._skipped[0]:,} on"
            self.events[-1] = replace(last, step=step, text=f"{first}, {text}")
        else:
            self._skipped = step, step
            self._add(Event(step, "skipped", text))

    def _add(self, event: Event) -> None:
        self.events.append(event)
        if len(self.events) > 2 * MAX_EVENTS * len(EVENT_KINDS):
            self.events, left_out = newest_events(self.events)
            self.num_left_out += left_out


def newest_events(events: Iterable[Event]) -> tuple[list[Event], int]:
    """In order of steps, at most `MAX_EVENTS` of each kind; and how many were left out."""
    ordered = sorted(events, key=lambda each: each.step)
    kept = [e for kind in EVENT_KINDS for e in [x for x in ordered if x.kind == kind][-MAX_EVENTS:]]
    return sorted(kept, key=lambda each: each.step), len(ordered) - len(kept)


def saves(run_dir: Path) -> list[Event]:
    """The saved steps that are there.

    Raises: GlamError where there are none.
    """
    return [
        Event(
            each.step,
            "save",
            f"saved, {each.status}" + (f" ({each.reason})" if each.reason else ""),
        )
        for each in saved_steps(run_dir)
    ]


def went_back(rewinds: Iterable[Rewind]) -> list[Event]:
    """The rewinds of a run."""
    found = []
    for each in rewinds:
        by = "the run itself" if each.automatic else "hand"
        skip = f", left out {each.skip_batches:,} batches" if each.skip_batches else ""
        why = f": {each.reason}" if each.reason else ""
        when = clock_text(each.unix_seconds)
        newest = f"back to step {each.to_step:,} (newest save: {each.from_step:,})"
        text = f"{newest} by {by}{skip}{why} ({when})"
        found.append(Event(each.to_step, "rewind", text))
    return found


def failed(run_dir: Path) -> list[Event]:
    """The failures in a row that the newest starts ended with.

    Raises: OSError or GlamError when their file cannot be read.
    """
    path = run_dir / FAILURES
    try:
        of, when, found = noted_failures(path)
        by = f"by {clock_text(when)}"
        step = int(of["step"])
        return [Event(step, "failure", f"{what[:500]} (exit {code}; {by})") for what, code in found]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise GlamError(f"{path.name} cannot be read: {error}") from None


def stages(starts: Sequence[tuple[int, Mapping[str, float]]]) -> list[Event]:
    """The steps from which on other weights hold: (first step, share of every source)."""
    return [
        Event(step, "mixture", "from here " + ", ".join(f"{n} {s:.1%}" for n, s in shares.items()))
        for step, shares in starts
        if step > 0
    ]


def clock_text(unix_seconds: Any) -> str:
    """A time as text in UTC; `?` for what is none."""
    number = as_number(unix_seconds)
    if number is None:
        return "?"
    try:
        return f"{datetime.fromtimestamp(number, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (OverflowError, ValueError, OSError):
        return "?"
