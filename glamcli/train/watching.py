"""A run as it looks from outside, while it trains and afterwards.

Read again and again, at a cost that depends neither on how long the run is nor on how large its
model is; needs neither jax nor orbax. What is missing or damaged is unknown, and no error.
"""

import math
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from glamcli.config.load import load_recipe
from glamcli.config.schema import Recipe
from glamcli.errors import CheckpointError, GlamError
from glamcli.hosts.lease import RENEW_SECONDS, STALE_SECONDS, described_owner
from glamcli.hosts.lock import NAME, holder
from glamcli.step_folders import examined, step_names
from glamcli.storage import Remote
from glamcli.stored_runs import OWNER, Copy
from glamcli.train.failures import FAILURES, noted_failures
from glamcli.train.metric_files import MetricsTail, as_number
from glamcli.untrusted import read_file

_KEPT_POINTS, _KEPT_EVENTS = 2000, 20
_MAX_CHARS = 500
_MAX_STEP = 10**15
_MAX_OWNER_BYTES = 10_000


class Numbers:
    """The newest numbers of a run, of the lines that were taken so far."""

    def __init__(self) -> None:
        self.step, self.unix_seconds = 0, 0.0
        """of the newest line."""
        self.latest: dict[str, tuple[int, float]] = {}
        """every number's newest value, with its step; NaN where that line has `null`."""
        self.losses: deque[tuple[int, float]] = deque(maxlen=_KEPT_POINTS)
        self.events: deque[tuple[int, str]] = deque(maxlen=_KEPT_EVENTS)
        """skipped updates and alarms."""

    def value(self, name: str) -> float | None:
        """The newest value of a number; None where it is not known or not finite."""
        return as_number(self.latest[name][1]) if name in self.latest else None

    def take(self, line: Mapping[str, Any]) -> None:
        """Adds a line of the metrics."""
        step = line["step"]
        if not 0 <= step <= _MAX_STEP:
            return
        if step < self.step:  # the run went back
            self.latest = {name: each for name, each in self.latest.items() if each[0] < step}
            for kept in (self.losses, self.events):
                while kept and kept[-1][0] >= step:
                    kept.pop()
        self.step = step
        found = {
            name: number for name, each in line.items() if (number := as_number(each)) is not None
        }
        nulls = {name: math.nan for name, each in line.items() if each is None}
        self.latest |= {name: (step, number) for name, number in (found | nulls).items()}
        self.unix_seconds = found.get("unix_seconds", self.unix_seconds)
        if "loss" in found:
            self.losses.append((step, found["loss"]))
        if found.get("bad_steps"):
            why = "a spike" if found.get("spike") else "not finite"
            self.events.append((step, f"update skipped: {why}"))
        alarms = line.get("alarms")
        texts = alarms if isinstance(alarms, list) else []
        self.events += [(step, str(text)[:_MAX_CHARS]) for text in texts]


class _Owner:
    """Who trains the run whose files are in `folder`, and since when."""

    def __init__(self, folder: Path, copy: Copy | None):
        self._folder, self._is_copy = folder, copy is not None
        self._renewed, self._seen = 0.0, 0.0

    def look(self) -> tuple[str | None, float]:
        """The process, and since when by the clock of its disk or bucket."""
        path = self._folder / (OWNER if self._is_copy else NAME)
        changed = _changed(path)
        if not self._is_copy:
            return holder(self._folder), changed
        if changed != self._renewed:
            # By this machine's clock at the first look only: then it is seen to be renewed, or not.
            age = 0.0 if self._renewed else max(0.0, time.time() - changed)
            self._renewed, self._seen = changed, time.monotonic() - age
        with suppress(OSError):
            process, renewals = described_owner(read_file(path, _MAX_OWNER_BYTES))
            if time.monotonic() - self._seen < STALE_SECONDS:
                return process, changed - renewals * RENEW_SECONDS
        return None, changed


class WatchedRun:
    """What is known of a run, in a folder or at a URL, since the newest `refresh`."""

    def __init__(self, run: Path):
        self.run = run
        self._copy = Copy(run) if isinstance(run, Remote) else None
        folder = run if self._copy is None else self._copy.folder
        self.folder = folder
        """where its files are on this machine."""
        self.unread: CheckpointError | None = None
        """why the newest `refresh` could not look at a URL."""
        self.read_at = 0.0
        """when it could last, in seconds since 1970."""
        self._owner = _Owner(folder, self._copy)
        self.numbers = Numbers()
        self.holder: str | None = None
        """the process that trains it."""
        self.recipe: Recipe | None = None
        self.saved: tuple[int, float] | None = None
        """the newest complete step, and when it was saved, in seconds since 1970."""
        self.failure: tuple[float, str] | None = None
        """the newest, and when it was."""
        self.state = "absent"
        """`starting`, `training`, `finished`, `failed` or `stopped`; `absent` where nothing is, and
        `empty` where no sign of a run is."""
        self._tail = MetricsTail(folder / "metrics.jsonl")
        self._recipe_at = self._held_since = 0.0

    def refresh(self) -> None:
        """Looks again; at a URL for what has changed."""
        if self._copy is not None:
            try:
                self._copy.refresh()
            except CheckpointError as error:
                self.unread = error
                return
        self.unread, self.read_at = None, time.time()
        self.holder, self._held_since = self._owner.look()
        is_other, lines = self._tail.new_lines()
        if is_other:
            self.numbers = Numbers()
        for line in lines:
            self.numbers.take(line)
        self._read_recipe()
        self.saved = _newest_save(self.folder / "checkpoints")
        self.failure = _newest_failure(self.folder / FAILURES)
        self.state = self._state()

    def _state(self) -> str:
        heard = self.numbers.unix_seconds
        if self.holder is not None:
            return "training" if heard >= self._held_since else "starting"
        if not self.folder.is_dir():
            return "absent"
        if self.failure is not None and self.failure[0] >= heard:
            return "failed"
        if self.recipe and self.saved and self.saved[0] >= self.recipe.train.steps:
            return "finished"
        is_run = self.numbers.step or (self.folder / "run.json").is_file()
        return "stopped" if is_run else "empty"

    def _read_recipe(self) -> None:
        """The recipe that the run keeps, again only where it was written again."""
        path = self.folder / "recipe.yaml"
        at, self._recipe_at = self._recipe_at, _changed(path)
        if at == self._recipe_at:
            return
        try:
            self.recipe = load_recipe(path.absolute(), check=False).recipe
        except (GlamError, OSError):
            self.recipe = None


def _newest_save(folder: Path) -> tuple[int, float] | None:
    for step, name in sorted(step_names(folder), reverse=True):
        if not isinstance(examined(folder / name), str):
            return step, _changed(folder / name / "meta" / "metadata")
    return None


def _newest_failure(path: Path) -> tuple[float, str] | None:
    try:
        _, when, found = noted_failures(path)
        what, code = found[-1]
    except (OSError, ValueError, LookupError):
        return None
    return when, f"{what[:_MAX_CHARS]} (exit {code})"


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
