"""A trace of what devices and processes do in some steps, for xprof and TensorBoard."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import jax

from glamcli import atomic, libtpu
from glamcli.config.settings import first_and_last
from glamcli.hosts.watchdog import LONG
from glamcli.train.events import Running
from glamcli.train.state import State

FOLDER = "profile"
"""in the run folder; below it lies what xprof looks for, `plugins/profile/STEPS/HOST.xplane.pb`."""


class Profiled(AbstractContextManager["Profiled"]):
    """A training step, and a profile of those steps of `every.profile_steps` that this process
    still trains; also the event between steps that writes it.

    The devices come to rest before the first of them and after the last, so that the trace has
    these steps whole and nothing else. When the run is asked to stop, or fails, the steps so far
    are written. Whatever goes wrong with a trace costs a warning and no step.
    """

    kind = "save"  # of its time

    def __init__(
        self, step: Callable[[int, State, Any], Any], running: Running, start: int, run: Path
    ):
        """`step` is the function (number, state, batch); the run begins after step `start`. `run`
        is the run's folder, or its URL: traces of all processes go there."""
        self._step, self._running, self._traces = step, running, run / FOLDER
        self._folder: Path | None = None
        """for the files of the trace in progress, a temporary one."""
        self._now, self._steps = start, range(0)
        if (wanted := running.recipe.every.profile_steps) is not None:
            self._steps = self._of(*first_and_last(wanted), start)

    def _of(self, first: int, until: int, start: int) -> range:
        """Those of the steps that are to come and can be traced."""
        progress, last = self._running.progress, self._running.recipe.train.steps
        steps = range(max(first, start + 1), min(until, last) + 1)
        if not steps:
            trained = f"this run trains {start + 1} to {last}"
            progress.say(f"no profile of steps {first} to {until}: {trained}")
        elif "tpu" in (os.environ.get("JAX_PLATFORMS") or "tpu") and (reason := libtpu.unfit()):
            mend = "`JAX_PLATFORMS=cpu` does without it, `pip install 'jax[tpu]'` has the right one"
            progress.warn(f"no profile: {reason}; {mend}")
            return range(0)
        return steps

    def __exit__(self, *error: object) -> None:
        self._finish()

    def __call__(self, step: int, state: State, batch: Any) -> Any:
        self._now = step
        if self._steps and step == self._steps[0]:
            jax.block_until_ready(state)
            with self._tolerating():
                self._folder = Path(tempfile.mkdtemp(prefix="glam-profile-"))
                options = jax.profiler.ProfileOptions()
                options.python_tracer_level = 0  # it slows Python down by far, and fills the trace
                jax.profiler.start_trace(self._folder, profiler_options=options)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            return self._step(step, state, batch)

    def is_due(self, step: int, stopping: bool = False) -> bool:
        return self._folder is not None and (stopping or step == self._steps[-1])

    def run(self, step: int, state: State) -> bool:
        """Writes the trace, which ends with this step."""
        run = self._running
        run.watchdog.beat(f"writing the profile of step {step}", LONG)
        run.meter.flush()
        jax.block_until_ready(state)
        self._finish()
        run.meter.restart_clock()
        return False

    def _finish(self) -> None:
        if self._folder is None:
            return
        run, steps = self._running, f"{self._steps[0]}-{self._now}"
        session = self._traces / "plugins" / "profile" / steps
        with self._tolerating():
            jax.profiler.stop_trace()
            traces = [*self._folder.rglob("*.*.*")]
            if not traces:
                raise RuntimeError("the profiler wrote no file")
            for path in traces:
                # Several processes of one host would all write files of its name.
                own = f"process{run.host.index}-" if run.host.count > 1 else ""
                atomic.write(session / (own + path.name), path.read_bytes())
            show = f"`xprof {self._traces}` shows it"
            run.progress.say(f"profile of steps {steps}: {session} ({show})")
        self._drop()

    def _drop(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    @contextmanager
    def _tolerating(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it was, the training is worth more
            self._drop()
            reason = str(error).split("\n")[0][:200] or type(error).__name__
            self._running.progress.warn(f"no profile: {reason}; training goes on")
