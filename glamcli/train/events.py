"""What a run does between its steps: held-out loss, scores of tasks, checkpoints.

Each event says whether it is due after a step; its `run` does it, and returns whether it was cut
short because the run was asked to stop, which then has to stop at this very step. The loop goes
through them in this order, so what is due at a step is in the metrics before the checkpoint of that
step is written, and a run resumed from it has lost nothing and repeats nothing. Only a run that was
asked to stop skips held-out loss and scores, and computes them when it is resumed.
"""

import errno
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from glamcli.checkpoint import Checkpoints
from glamcli.config.schema import Recipe
from glamcli.config.settings import is_due
from glamcli.data.open import Dataset
from glamcli.errors import CheckpointError, GlamError, SaveFailed
from glamcli.hosts.join import Host
from glamcli.hosts.signals import Stop
from glamcli.hosts.watchdog import LONG, Watchdog
from glamcli.model.decoder import Decoder
from glamcli.model.params import stack_blocks
from glamcli.parallel.mesh import global_batch
from glamcli.progress import Progress, duration
from glamcli.train import identity, programs
from glamcli.train.heldout import Heldout, mean_nats
from glamcli.train.meter import Meter
from glamcli.train.metrics import FAILED_TASKS
from glamcli.train.retry import LOOK_SECONDS, Clock, Retry
from glamcli.train.state import State, abstract_state
from glamcli.trained import Trained

Evaluate = Callable[[Trained, Progress, Callable[[], None]], Mapping[str, float]]
"""Scores of a model by name, `eval/...`. It calls its last argument between batches, and lets
through what that raises. `FAILED_TASKS` among the scores counts tasks that could not be scored."""


@dataclass(frozen=True)
class Running:
    """What the events of a run have in common."""

    recipe: Recipe
    run_dir: Path
    dataset: Dataset
    mesh: Mesh
    decoder: Decoder
    run_identity: Mapping[str, Any]
    meter: Meter
    watchdog: Watchdog
    progress: Progress
    host: Host

    def trained(self, step: int, state: State) -> Trained:
        """The model after `step`, to be evaluated."""
        hashes = {name: self.run_identity[name] for name in ("recipe_hash", "data")}
        return Trained(
            self.recipe,
            replace(self.decoder, apart=False),
            self.stacked(state).params,
            self.dataset.tokenizer,
            {"run": str(self.run_dir), "step": step, **hashes},
            self.dataset.heldout_documents,
            self.run_dir,
            self.host,
        )

    @cached_property
    def stacked(self) -> Callable[[State], State]:
        """Gives a state the form of checkpoints and finished models. Compiled at first use."""
        if not self.decoder.apart:
            return lambda state: state
        state = abstract_state(self.decoder, self.recipe.optimizer, self.mesh)
        return jax.jit(stack_blocks).lower(state).compile()


class HeldoutLoss:
    """The held-out loss of every source, every `every.heldout_steps` and after the last step."""

    prefix = "heldout/"  # of its numbers in the metrics
    kind = "eval"  # of its time

    def __init__(self, running: Running):
        self._running = running
        prepared, recipe = running.dataset.prepared, running.recipe
        self.rows = Heldout(
            prepared.heldout, prepared.train, recipe.heldout.rows, programs.heldout_rows(recipe)
        )
        self.nats: dict[str, float] = {}
        """the newest losses by source, nats per token."""

    def is_due(self, step: int, stopping: bool = False) -> bool:
        recipe = self._running.recipe
        return self.rows.num_batches > 0 and (
            step == recipe.train.steps
            or (is_due(step, recipe.every.heldout_steps) and not stopping)
        )

    def run(self, step: int, state: State) -> bool:
        """Scores every source, and writes and prints the losses."""
        run, rows = self._running, self.rows
        run.meter.flush()
        heldout_step = self._compiled
        layout = programs.abstract_batch(run.recipe, run.mesh, rows.batch_rows)
        with run.progress.phase("evaluating", total=rows.num_batches, unit="batches") as bar:
            sums = []
            for batch in rows.batches():
                run.watchdog.beat(f"in the held-out loss of step {step}")
                put = global_batch(batch, (range(rows.batch_rows),), layout)
                sums.append(jax.device_get(heldout_step(state.params, put)))
                bar.advance()
        self.nats = mean_nats(rows.names, sums)
        run.meter.heldout(step, self.nats, rows.unigram_nats)
        return False

    @cached_property
    def _compiled(self) -> Any:
        run = self._running
        run.watchdog.beat("compiling the held-out step", LONG)
        with run.progress.phase("compiling the held-out step"), run.meter.times.spent("compile"):
            num_sources = len(run.dataset.source_names)
            lowered = programs.lower_heldout_step(run.decoder, run.recipe, num_sources, run.mesh)
            return programs.compiled(lowered, programs.compiler_options(run.recipe, run.mesh))


class TaskScores:
    """Scores of tasks, every `every.eval_steps`. A failure costs the scores and nothing else."""

    prefix, kind = "eval/", "eval"

    def __init__(self, running: Running, stop: Stop, evaluate: Evaluate | None):
        self._running = running
        self._stop = stop
        self._evaluate = evaluate
        self.num_failed = 0
        """evaluations that failed, wholly or for some tasks."""

    def is_due(self, step: int, stopping: bool = False) -> bool:
        due = is_due(step, self._running.recipe.every.eval_steps)
        return self._evaluate is not None and due and not stopping

    def run(self, step: int, state: State) -> bool:
        """Scores, or none and True when a process that runs alone is asked to stop meanwhile."""
        run = self._running
        run.meter.flush()

        def between_batches() -> None:
            run.watchdog.beat(f"scoring tasks after step {step}", LONG)
            # One of several processes must not leave the others in the middle of a computation.
            if self._stop.requested and run.host.count == 1:
                raise Abandoned

        assert self._evaluate is not None
        values: Mapping[str, float] = {FAILED_TASKS: 1}
        try:
            between_batches()
            values = self._evaluate(run.trained(step, state), run.progress, between_batches)
        except Abandoned:
            return True
        except GlamError as error:
            run.progress.warn(f"step {step}: not scored: {error.what}")
        except Exception as error:  # whatever it was, the training is worth more
            reason = str(error).split("\n")[0][:200]
            run.progress.warn(f"step {step}: not scored: {type(error).__name__}: {reason}")
        # If this process alone failed, the others are in the middle of a computation: it must not
        # send them parts of another one, and the watchdog ends all.
        run.host.wait("scored")
        self.num_failed += values.get(FAILED_TASKS, 0) > 0
        run.meter.evaluated(step, values)
        return False


class Abandoned(Exception):
    """The run was asked to stop while tasks were scored."""


class Save:
    """A checkpoint, every `every.checkpoint_steps`, after the last step, before the run stops, and
    after a save that failed (`retry.py`). Nothing is lost by continuing after one: the next save
    has the newer state.

    While updates are skipped, the weights are those of an earlier step and may be spoilt: only a
    run that ends or stops saves then, and `good` in the checkpoint says that they are not proven.
    What was due is saved when updates are applied again.

    Raises: CheckpointError, from every method but `is_due`, when saves failed for
        `checkpoints.retry_seconds`, or one of several processes failed: their saves wait for each
        other, so the others could not try again. Also when the run folder is gone.
    """

    kind = "save"

    def __init__(self, running: Running, checkpoints: Checkpoints, clock: Clock | None = None):
        self._running = running
        self._checkpoints = checkpoints
        self._clock = clock or Clock()
        self._retry = Retry(running.recipe.checkpoints.retry_seconds, self._clock)
        self._next_look = 0.0
        self.is_owed = False
        """whether a save failed and none was started since."""
        self._is_saving = False
        self._is_last = False
        self._awaits_good_weights = False

    def is_due(self, step: int, stopping: bool = False) -> bool:
        recipe = self._running.recipe
        self._is_last = stopping or step == recipe.train.steps
        due = self._is_last or is_due(step, recipe.every.checkpoint_steps)
        return due or self._awaits_good_weights or (self.is_owed and self._retry.is_due)

    def poll(self) -> None:
        """Notices how the save in progress ended; call once per training step."""
        run = self._running
        if self._clock.now() >= self._next_look:
            self._look_for_folder()
        self._note(self._checkpoints.poll)
        if self._is_saving and (taken := self._retry.slow()) is not None:
            run.progress.warn(
                f"a save has taken {taken} so far; {self._retry.age} of training not saved"
            )

    def _look_for_folder(self) -> None:
        run, self._next_look = self._running, self._clock.now() + LOOK_SECONDS
        if run.host.is_first and _is_gone(run.run_dir):
            raise CheckpointError(
                f"the run folder {run.run_dir} is gone: deleted or renamed while the run trained",
                hint="put it back, or start again elsewhere with `--run`",
            )

    def run(self, step: int, state: State) -> bool:
        """Starts saving, after the save in progress; the metrics up to this step are on disk by
        then."""
        run = self._running
        run.watchdog.beat(f"saving step {step}", LONG)
        self._look_for_folder()  # a save would make another one
        run.meter.flush()
        self._awaits_good_weights = not (run.meter.health.is_good or self._is_last)
        if self._awaits_good_weights:
            return False
        self._note(self._checkpoints.wait)
        self.is_owed = False
        meta = identity.at_step(run.run_identity, run.dataset, step)
        meta |= {"loss_sums": run.meter.loss_sums, **run.meter.health.saved(step)}
        meta["routers"] = run.meter.routers.saved()
        meta["seconds"] = run.meter.times.seconds()
        self._retry.start()
        self._is_saving = True
        self._note(lambda: self._checkpoints.save(step, run.stacked(state), meta))
        run.meter.restart_clock()
        return False

    def finish(self, step: int, state: State) -> None:
        """Returns when the checkpoint of `step`, which was started, is complete."""
        self._running.watchdog.beat(f"saving step {step}", LONG)
        with self._running.progress.phase("saving"):
            self._note(self._checkpoints.wait)
            while self.is_owed:
                self._retry.wait()
                self.run(step, state)
                self._note(self._checkpoints.wait)

    def _note(self, attempt: Callable[[], int | None]) -> None:
        progress, retry = self._running.progress, self._retry
        try:
            step = attempt()
        except SaveFailed as error:
            self._is_saving = False
            if self._checkpoints.host.count > 1:
                raise
            kept = error.hint or "nothing was written"
            state = f"{kept}; {retry.age} of training not saved"
            if (wait := retry.fail()) is None:
                tried = f"tried for {duration(retry.limit)} (`checkpoints.retry_seconds`)"
                raise SaveFailed(error.what, hint=f"{state}, {tried}") from error
            self.is_owed = True
            progress.warn(
                f"{error.what} ({state}); trying again in {wait}, for {duration(retry.limit)} at"
                f" most: make room in {self._checkpoints.folder}"
            )
        else:
            if step is not None:
                self._is_saving = False
                retry.succeed()
                progress.say(f"step {step}: saved")


def _is_gone(folder: Path) -> bool:
    """Whether there is no such folder, for certain: a file server may just not answer."""
    try:
        return not stat.S_ISDIR(folder.stat().st_mode)
    except OSError as error:
        return error.errno in (errno.ENOENT, errno.ENOTDIR)
