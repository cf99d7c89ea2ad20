"""Reads the numbers of steps one step late, keeps time, and writes and shows both.

Reading a number waits for the step that computes it. So the numbers of a step are read when the
next one is already dispatched. Time spent on held-out loss and on saving does not count as
training. docs/metrics.md explains every key.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from glamcli.checkpoint import Checkpoints
from glamcli.config.schema import Recipe
from glamcli.config.sizes import tokens_per_step
from glamcli.hosts.pace import Pace
from glamcli.hosts.pulse import Pulse
from glamcli.progress import Progress
from glamcli.train import metrics
from glamcli.train.capacity import Capacity, switch_text
from glamcli.train.health import Health
from glamcli.train.loggers import Writer, open_loggers
from glamcli.train.memory_use import MemoryUse
from glamcli.train.metric_files import MetricsFile
from glamcli.train.metrics import FAILED_TASKS, STDERR, LossSums, finite
from glamcli.train.rewind import rewinds, seconds_before
from glamcli.train.router_alarms import RouterAlarms
from glamcli.train.speed import model_speed
from glamcli.train.times import Times


class Meter(AbstractContextManager["Meter"]):
    """The numbers of a run after `start` batches: `metrics.jsonl`, loggers and progress.

    Without a `run_dir` no file is written: of several processes only the first writes.

    A logged loss is the mean since the line before. A checkpoint carries the sums of the steps
    since then (`loss_sums`), so that a resumed run writes the lines of an uninterrupted one.
    """

    def __init__(
        self,
        recipe: Recipe,
        source_names: tuple[str, ...],
        run_dir: Path | None,
        start: int,
        progress: Progress,
        pace: Pace,
        checkpoints: Checkpoints,
        saved: Mapping[str, Any],
        times: Times | None = None,
        devices: Sequence[Any] = (),
    ):
        """`checkpoints` are for the message of a run that gives up; `saved` is the metadata of the
        one that it continues, empty for a new run. `devices` are all that it trains on."""
        self._devices = devices
        self._pace, self._pulse = pace, Pulse()
        self._memory = MemoryUse(jax.local_devices())
        self.times = times or Times()
        self.health = Health(recipe, progress, checkpoints, saved, start)
        self.routers = RouterAlarms(recipe, saved.get("routers", {}))
        self.capacity = Capacity(recipe, saved.get("capacity", {}))
        self.loss_sums: dict[str, LossSums] = saved.get("loss_sums", {})
        self.recipe = recipe
        self.source_names = source_names
        self.progress = progress
        self._first = start + 1
        self._pending: tuple[int, Any] | None = None
        self._latest: dict[str, Any] = {}
        self._recent: Sequence[Mapping[str, Any]] = ()
        self._files: list[Writer] = []
        self._rewinds_total = 0 if run_dir is None else len(rewinds(run_dir))
        if run_dir is not None:
            at = saved.get("step", start)
            file = MetricsFile(run_dir / "metrics.jsonl", at, progress)
            self._recent = file.recent
            self._files = [file, *open_loggers(recipe, run_dir, at, progress)]
            until = max(file.seconds, seconds_before(run_dir))
            self.times.go_on(saved.get("seconds", {}), until)
        self._restart()

    def __exit__(self, *error: object) -> None:
        for file in self._files:
            file.close()

    def add(self, step: int, sums: Any) -> None:
        """Takes the sums of a step just dispatched, and reads those of the step before.

        Raises: TrainError when `health` gives the run up.
        """
        if warning := self.times.step(sums):
            self.progress.warn(f"step {step}: {warning}")
        previous, self._pending = self._pending, (step, sums)
        if previous is not None:
            self._read(*previous)

    def exchange(self, is_asked_to_stop: bool) -> bool:
        """Exchanges with all processes what each has measured since the last call: all call it
        after each step. Whether any is asked to stop, by now or, of several, by the step before."""
        mine = (*self._pace.mine(), *self._memory.mine())
        with self._pace.waiting():
            of_all = self._pulse.beat(is_asked_to_stop, *mine)
        if of_all is None:
            return False
        asked, paces, memory = np.split(of_all, (1, 3), axis=1)
        self._memory.add(memory)
        if warning := self._pace.add(paces):
            self.progress.warn(warning)
        return bool(asked.any())

    def flush(self) -> None:
        """Reads what is pending and puts everything so far on disk."""
        if self._pending is not None:
            self._read(*self._pending)
            self._pending = None
        for file in self._files:
            file.flush()

    def restart_clock(self) -> None:
        """Leaves out the time since the last read: it was not spent on training."""
        self._pace.restart()
        self._restart()

    def _restart(self) -> None:
        self._clock = time.monotonic()
        self._steps_timed = 0

    def heldout(
        self, step: int, nats: Mapping[str, float], unigram_nats: Mapping[str, float]
    ) -> None:
        """Records held-out losses, nats per token."""
        values = {f"heldout/{name}": finite(value) for name, value in nats.items()}
        values |= {f"unigram/{name}": finite(unigram_nats[name]) for name in nats}
        self._write({"step": step, **values})
        losses = ", ".join(
            f"{name} {value:.3f} ({unigram_nats[name]:.3f})" for name, value in nats.items()
        )
        self.progress.say(f"step {step}: held-out loss (unigram entropy) {losses}")
        self.restart_clock()

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        """Records scores of tasks by name, `eval/...`."""
        self._write({"step": step, **{name: finite(value) for name, value in values.items()}})
        shown = [
            f"{name.removeprefix('eval/')} {value:.3f}"
            + (f" ± {values[name + STDERR]:.3f}" if name + STDERR in values else "")
            for name, value in values.items()
            if (name != FAILED_TASKS or value) and not name.endswith(STDERR)
        ]
        self.progress.say(f"step {step}: {', '.join(shown)}")
        self.restart_clock()

    def has(self, step: int, prefix: str) -> bool:
        """Whether the metrics have numbers of `step` with this prefix. Only right while there are
        no lines of later steps."""
        return any(
            line["step"] == step and any(name.startswith(prefix) for name in line)
            for line in self._recent
        )

    def _read(self, step: int, sums: Any) -> None:
        with self._pace.waiting():
            values = jax.device_get(sums)
        self.loss_sums = metrics.add_losses(self.loss_sums, values, self.source_names)
        self._latest = metrics.summarise(values, self.loss_sums, self.recipe)
        alarms = self.routers.notice(self._latest)
        switch = self.capacity.notice(step, values, self._latest)
        self._steps_timed += 1
        self.health.notice(step, values)
        self._latest["spikes_total"] = self.health.spikes_total
        self._latest["rewinds_total"] = self._rewinds_total
        every, last = self.recipe.every.log_steps, self.recipe.train.steps
        if step % every == 0 or step in (1, last) or not self.health.is_good:
            self._write({**self._latest, **self._timing(step)})
            self.health.check_progress(step, self.loss_sums)
            self.loss_sums = {}
        elif step == self._first:
            # Shown at once, for those who wait; not written, so that a resumed run's file is the
            # same as an uninterrupted one's.
            self.progress.step({**self._latest, "steps": last})
        if alarms or switch:
            self._write({"step": step, **({"alarms": alarms} if alarms else {}), **switch})
            for alarm in alarms:
                self.progress.warn(f"step {step}: {alarm}")
        if switch:
            self.progress.say(f"step {step}: {switch_text(switch)}")
        self.health.check(step, values)

    def _timing(self, step: int) -> dict[str, Any]:
        """Mean speed since the last line."""
        seconds = (time.monotonic() - self._clock) / self._steps_timed
        self._restart()
        rate = self._latest["num_targets"] / max(seconds, 1e-9)
        return {
            **self._pace.summary(),
            "seconds_per_step": round(seconds, 6),
            "tokens_per_second": round(rate, 1),
            **model_speed(self.recipe, self._devices, rate),
            "seconds_left": round((self.recipe.train.steps - step) * seconds, 1),
            **self.times.summary(),
            **self._memory.summary(),
        }

    def _write(self, values: Mapping[str, Any]) -> None:
        seen = values["step"] * tokens_per_step(self.recipe)
        values = {"step": 0, "tokens_seen": seen, "unix_seconds": round(time.time(), 3), **values}
        for file in self._files:
            file.write(values)
        if "loss" in values:
            self.progress.step({**values, "steps": self.recipe.train.steps})
