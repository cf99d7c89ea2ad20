"""The compiled training steps of a run: one, or one per capacity factor (`capacity.py`).

The first is compiled before training, others between the steps before they are first needed.
"""

from typing import Any

from glamcli.hosts.watchdog import LONG
from glamcli.train import programs
from glamcli.train.events import Running
from glamcli.train.state import State


class StepPrograms:
    """The programs; also the event between steps that compiles one."""

    kind = "compile"  # of its time

    def __init__(self, running: Running, start: int):
        """The run begins after step `start`."""
        self._running = running
        self._start = start
        self._compiled: dict[float | None, Any] = {}

    def __call__(self, step: int) -> Any:
        """The program of this step, (state, batch) -> (state, sums), which is compiled by now."""
        return self._compiled[self._running.meter.capacity.at(step)]

    def compile_first(self) -> None:
        """Compiles the program of the run's first step."""
        self._compile(self._start + 1)

    def is_due(self, step: int, stopping: bool = False) -> bool:
        run = self._running
        is_known = run.meter.capacity.at(step + 1) in self._compiled
        return not (is_known or stopping or step == run.recipe.train.steps)

    def run(self, step: int, state: State) -> bool:
        """Compiles the program of the step after this one."""
        run = self._running
        run.meter.flush()
        self._compile(step + 1)
        run.meter.restart_clock()
        return False

    def _compile(self, step: int) -> None:
        run, factor = self._running, self._running.meter.capacity.at(step)
        run.watchdog.beat("compiling", LONG)
        with run.progress.phase("compiling"):
            num_sources = len(run.dataset.source_names)
            restarts = tuple(stage.from_step for stage in run.dataset.mixture.stages)
            decoder = run.decoder.with_capacity(factor)
            traced = programs.trace_train_step(decoder, run.recipe, num_sources, run.mesh, restarts)
            _ = run.stacked
            options = programs.compiler_options(run.recipe, run.mesh)
            self._compiled[factor] = programs.compiled(traced.lower(), options)
