"""What a run does between its steps: held-out loss, scores of tasks, checkpoints.

Each event says whether it is due after a step; its `run` does it, and returns whether it was cut
short because the run was asked to stop, which then has to stop at this very step. The loop goes
through them in this order, so what is due at a step is in the metrics before the checkpoint of that
step is written, and a run resumed from it has lost nothing and repeats nothing. Only a run that was
asked to stop skips held-out loss and scores, and computes them when it is resumed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from glamcli.config.schema import Recipe
from glamcli.config.settings import is_due
from glamcli.data.open import Dataset
from glamcli.errors import GlamError
from glamcli.hosts.join import Host
from glamcli.hosts.signals import Stop
from glamcli.hosts.watchdog import LONG, Watchdog
from glamcli.model.decoder import Decoder
from glamcli.model.params import stack_blocks
from glamcli.parallel.mesh import global_batch
from glamcli.progress import Progress
from glamcli.train import programs
from glamcli.train.heldout import Heldout, mean_nats
from glamcli.train.meter import Meter
from glamcli.train.metrics import FAILED_TASKS
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
