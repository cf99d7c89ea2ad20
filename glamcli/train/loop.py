"""A training run from recipe to last checkpoint, readable from top to bottom.

    data -> mesh -> checkpoint or new state -> compile once -> step, step, step ... -> saved

Order matters in three places. A step is dispatched before the numbers of the step before are
read, and its batch was on the devices by then, so the devices never wait for this program. What
is due at a step (held-out loss, scores, metrics) is written before the checkpoint of that step, so
that a run resumed from it has lost nothing and repeats nothing; only a run asked to stop saves
without its held-out loss and scores, which it makes up for when it goes on. And everything a person
may have got wrong is refused before anything is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from glamcli.checkpoint import Checkpoints
from glamcli.config import schema
from glamcli.config.schema import Recipe
from glamcli.data.open import Dataset, open_data_together
from glamcli.errors import GlamError, Preempted
from glamcli.hosts.join import ALONE, Host
from glamcli.hosts.pace import Pace
from glamcli.hosts.pulse import Pulse
from glamcli.hosts.signals import Leaving, Left, Stop, listening
from glamcli.hosts.watchdog import LONG, Watchdog
from glamcli.model.decoder import Decoder
from glamcli.parallel.mesh import global_batch, make_mesh
from glamcli.progress import Progress, Silent
from glamcli.train import automesh, identity, programs
from glamcli.train.folder import newest, refuse, take_folder, tell_other_bits, write_run_files
from glamcli.train.heldout import Heldout, mean_nats, tell_unscored
from glamcli.train.meter import FAILED_TASKS, Meter
from glamcli.train.saver import Saver
from glamcli.train.state import State, abstract_state, apart, init_state
from glamcli.trained import Trained


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int
    model: Trained | None = None
    """None when the run was finished already and nothing was done."""
    heldout_nats: dict[str, float] = field(default_factory=dict)
    """loss per source on held-out rows, nats per token."""
    unigram_nats: dict[str, float] = field(default_factory=dict)
    """entropy of the single tokens of the same rows: what frequencies alone would score."""
    failed_evals: int = 0
    """evaluations during training that failed, wholly or for some tasks."""


Evaluate = Callable[[Trained, Progress], Mapping[str, float]]
"""Scores of a model by name, `eval/...`; what due evaluations are is not this program's business.
`FAILED_TASKS` among them counts the tasks that could not be scored."""


def train(
    recipe: Recipe,
    run_dir: Path,
    progress: Progress,
    host: Host = ALONE,
    evaluate: Evaluate | None = None,
) -> Outcome:
    """Trains to the last step, from the newest checkpoint in `run_dir` if there is one.

    Every process of a run calls this alike; the first one writes and tells. `evaluate` is called
    every `every.eval_steps`.

    Raises:
        CheckpointError: the folder is in use, belongs to another run, or cannot be written.
        Preempted: SIGINT or SIGTERM came; everything up to that step is saved.
        TrainError: updates were not finite for too long.
        DataError: a source cannot be read.
        RecipeError: the processes were not started with the same recipe, code or libraries.
        KeyboardInterrupt: interrupted before training started; nothing was lost.
    """
    with ExitStack() as stack:
        stop = stack.enter_context(listening(progress))
        identity.refuse_differences(host, identity.of_program(host, recipe))
        take_folder(run_dir, host, stack)
        checkpoints = Checkpoints(run_dir / "checkpoints", recipe.checkpoints.keep, host)
        start, saved = newest(checkpoints, host, progress)
        if saved is not None:
            refuse(run_dir, start, identity.recipe_differences(saved["recipe"], recipe))
            if start >= recipe.train.steps:
                return Outcome(start)

        dataset = open_data_together(recipe, progress, host)
        identity.refuse_differences(host, dataset.fingerprint)
        stop.at_once = False
        progress = progress if host.is_first else Silent()
        mesh = make_mesh(_layout(recipe, host, progress))
        decoder = programs.make_decoder(recipe, mesh)
        who = identity.identity(recipe, dataset, mesh)
        if saved is not None:
            now = identity.at_step(who, dataset, start)
            refuse(run_dir, start, identity.differences(saved, now))
            tell_other_bits(saved, now, progress)
        if host.is_first:
            write_run_files(run_dir, recipe, who, dataset.tokenizer)

        # Reading ahead starts here and overlaps with compilation.
        here = programs.rows_here(recipe, mesh)
        stream = stack.enter_context(dataset.batches(start, recipe.train.steps - start, here))
        stack.enter_context(closing(checkpoints))
        pace = Pace(host.name) if host.count > 1 else None
        folder = run_dir if host.is_first else None
        meter = Meter(recipe, dataset.source_names, folder, start, progress, pace)
        stack.enter_context(meter)
        stack.enter_context(host.failing_together())
        tell_unscored(dataset, recipe.train.steps, progress)
        run = Run(
            recipe, run_dir, dataset, mesh, decoder, checkpoints, meter, stop, who, progress, host
        )
        run.evaluate = evaluate
        with run.watchdog:
            state = run.restored(start) if saved is not None else run.new_state()
            run.compile()
            state = run.steps(state, start, stream)
            run.finish_saving(recipe.train.steps, state)
        if host.any("stop", stop.requested):
            raise Preempted(
                f"saved at step {recipe.train.steps}, asked to stop",
                hint=f"the run is complete; `glam eval {run_dir}` scores it",
            )
        return run.outcome(state)


class Run:
    """The parts of a run in progress."""

    def __init__(
        self,
        recipe: Recipe,
        run_dir: Path,
        dataset: Dataset,
        mesh: Mesh,
        decoder: Decoder,
        checkpoints: Checkpoints,
        meter: Meter,
        stop: Stop,
        who: Mapping[str, Any],
        progress: Progress,
        host: Host,
    ):
        self.recipe = recipe
        self.run_dir = run_dir
        self.dataset = dataset
        self.mesh = mesh
        self.decoder = decoder
        self.checkpoints = checkpoints
        self.saver = Saver(checkpoints, progress, self._saved)
        self.meter = meter
        meter.last_good = self.saver.newest
        self.stop = stop
        self.who = who
        self.progress = progress
        self.host = host
        self.pulse = Pulse(3)
        seconds = recipe.runtime.step_timeout_seconds if host.count > 1 else None
        self.watchdog = Watchdog(seconds, host.name(host.index), is_first=host.is_first)
        self.heldout = Heldout(
            dataset.prepared.heldout,
            dataset.prepared.train,
            recipe.heldout.rows,
            programs.heldout_rows(recipe),
        )
        self.heldout_nats: dict[str, float] = {}
        self.evaluate: Evaluate | None = None
        self.failed_evals = 0
        self._step: Any = None
        self._together: Any = None
        self._heldout_step: Any = None

    def new_state(self) -> State:
        """The state before the first step."""
        self.watchdog.beat("initialising", LONG)
        with self.progress.phase("initialising"):
            return init_state(self.decoder, self.recipe.optimizer, self.recipe.seed, self.mesh)

    def restored(self, step: int) -> State:
        """The state saved at `step`, laid out for this mesh."""
        self.watchdog.beat(f"restoring step {step}", LONG)
        with self.progress.phase("restoring"):
            stacked = replace(self.decoder, apart=False)
            target = abstract_state(stacked, self.recipe.optimizer, self.mesh)
            state = self.checkpoints.restore(step, target, self.progress.warn)
            if self.decoder.apart:
                state = jax.jit(apart, static_argnums=1)(state, self.decoder.num_blocks)
        self.progress.say(f"continuing from step {step}")
        return state

    def compile(self) -> None:
        """Compiles the one program that every step runs, and the one that prepares a save."""
        self.watchdog.beat("compiling", LONG)
        with self.progress.phase("compiling"):
            names = self.dataset.source_names
            lowered = programs.lower_train_step(self.decoder, self.recipe, len(names), self.mesh)
            self._step = lowered.compile(programs.compiler_options(self.recipe, self.mesh))
            if self.decoder.apart:
                lowered = programs.lower_together(self.decoder, self.recipe, self.mesh)
                self._together = lowered.compile()

    def steps(self, state: State, start: int, stream: Iterator[Mapping[str, np.ndarray]]) -> State:
        """Steps start + 1 to the last; the final state, on its way to the checkpoints."""
        every, last = self.recipe.every, self.recipe.train.steps
        if self.host.any("stop", self.stop.requested):
            raise Preempted(f"asked to stop before step {start + 1}", hint="rerun the same command")
        self._catch_up(start, state)
        with self.progress.phase("training", total=last, unit="steps") as bar:
            bar.advance(start)
            batch = self._put(next(stream))
            self.meter.restart_clock()
            for step in range(start + 1, last + 1):
                self.watchdog.beat(f"in step {step}")
                with self._waiting(), jax.transfer_guard("disallow"):
                    state, sums = self._step(state, batch)  # dispatched, not awaited
                if step < last:
                    batch = self._put(next(stream))
                self.meter.add(step, sums)  # reads the numbers of the step before
                self.saver.poll()
                bar.advance()
                stopping = self._is_asked_to_stop() and step < last
                if step == last or (_is_due(step, every.heldout_steps) and not stopping):
                    self._score_heldout(step, state)
                if _is_due(step, every.eval_steps) and not stopping:
                    self._score_tasks(step, state)
                    # Asked to stop meanwhile, it left them out, and has to leave at this step.
                    if self.host.count == 1:
                        stopping = self.stop.requested and step < last
                due = stopping or step == last or _is_due(step, every.checkpoint_steps)
                if due or self.saver.is_owed:
                    self._save(step, state)
                if stopping:
                    self._leave(step, state)
        return state

    def outcome(self, state: State) -> Outcome:
        """What the finished run hands to whoever asked for it."""
        step = self.recipe.train.steps
        return Outcome(
            step,
            self._model(step, state),
            self.heldout_nats,
            self.heldout.unigram_nats,
            self.failed_evals,
        )

    def _model(self, step: int, state: State) -> Trained:
        known = {name: self.who[name] for name in ("recipe_hash", "data")}
        return Trained(
            self.recipe,
            replace(self.decoder, apart=False),
            self._stacked(state).params,
            self.dataset.tokenizer,
            {"run": str(self.run_dir), "step": step, **known},
            self.dataset.heldout_documents,
            self.run_dir,
            self.host,
        )

    def _put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows of a training batch as part of one array over all devices."""
        layout = programs.abstract_batch(self.recipe, self.mesh, self.recipe.batch.rows)
        return global_batch(batch, programs.rows_here(self.recipe, self.mesh), layout)

    def _waiting(self) -> AbstractContextManager[None]:
        pace = self.meter.pace
        return nullcontext() if pace is None else pace.waiting()

    def _is_asked_to_stop(self) -> bool:
        """Whether any process was, by now or, of several, by the step before."""
        pace = self.meter.pace
        mine = (0.0, 0.0) if pace is None else pace.mine()
        with self._waiting():
            told = self.pulse.beat(self.stop.requested, *mine)
        if told is None:
            return False
        if pace is not None and (warning := pace.add(told[:, 1:])):
            self.progress.warn(warning)
        return bool(told[:, 0].any())

    def _score_heldout(self, step: int, state: State) -> None:
        """Held-out loss of every source, written to the metrics and told; nothing without rows."""
        if self.heldout.num_batches == 0:
            return
        self.meter.flush()
        if self._heldout_step is None:
            self.watchdog.beat("compiling the held-out step", LONG)
            with self.progress.phase("compiling the held-out step"):
                num_sources = len(self.dataset.source_names)
                self._heldout_step = programs.lower_heldout_step(
                    self.decoder, self.recipe, num_sources, self.mesh
                ).compile(programs.compiler_options(self.recipe, self.mesh))
        total = self.heldout.num_batches
        with self.progress.phase("evaluating", total=total, unit="batches") as bar:
            sums = []
            for batch in self.heldout.batches():
                self.watchdog.beat(f"in the held-out loss of step {step}")
                layout = programs.abstract_batch(self.recipe, self.mesh, self.heldout.batch_rows)
                put = global_batch(batch, (range(self.heldout.batch_rows),), layout)
                sums.append(jax.device_get(self._heldout_step(state.params, put)))
                bar.advance()
        self.heldout_nats = mean_nats(self.heldout.names, sums)
        self.meter.heldout(step, self.heldout_nats, self.heldout.unigram_nats)

    def _catch_up(self, step: int, state: State) -> None:
        """What was left out by a run that was asked to stop at this step."""
        every = self.recipe.every
        if step and _is_due(step, every.heldout_steps) and not self._has(step, "heldout/"):
            self._score_heldout(step, state)
        if step and _is_due(step, every.eval_steps) and not self._has(step, "eval/"):
            self._score_tasks(step, state)

    def _has(self, step: int, prefix: str) -> bool:
        """Whether such numbers of a step are on file, which the first process alone can see."""
        return self.host.gather(f"has {prefix}", self.meter.has(step, prefix))[0]

    def _score_tasks(self, step: int, state: State) -> None:
        """Scores of tasks, written to the metrics and told. A failure costs the scores alone."""
        if self.evaluate is None:
            return
        self.meter.flush()

        def is_leaving() -> bool:
            self.watchdog.beat(f"scoring tasks after step {step}", LONG)
            # One of several processes must not leave the others in the middle of a computation.
            return self.stop.requested and self.host.count == 1

        is_leaving()
        values: Mapping[str, float] = {FAILED_TASKS: 1}
        try:
            values = self.evaluate(self._model(step, state), Leaving(self.progress, is_leaving))
        except Left:
            return
        except GlamError as error:
            self.progress.warn(f"step {step}: not scored: {error.what}")
        except Exception as error:  # whatever it was, the training is worth more
            reason = str(error).split("\n")[0][:200]
            self.progress.warn(f"step {step}: not scored: {type(error).__name__}: {reason}")
        # If this process alone failed, the others are in the middle of a computation: it must not
        # send them parts of another one, and the watchdog ends all.
        self.host.wait("scored")
        self.failed_evals += values.get(FAILED_TASKS, 0) > 0
        self.meter.evaluated(step, values)

    def _save(self, step: int, state: State) -> None:
        """Starts a checkpoint; the metrics up to this step are on disk before it is complete."""
        self.watchdog.beat(f"saving step {step}", LONG)
        self.meter.flush()
        self.saver.save(step, self._stacked(state), identity.at_step(self.who, self.dataset, step))
        self.meter.restart_clock()

    def finish_saving(self, step: int, state: State) -> None:
        """Returns when the checkpoint of `step`, the last one, is complete."""
        self.watchdog.beat(f"saving step {step}", LONG)
        with self.progress.phase("saving"):
            meta = identity.at_step(self.who, self.dataset, step)
            self.saver.finish(step, self._stacked(state), meta)

    def _stacked(self, state: State) -> State:
        """The form that outlives the run: of checkpoints and of the finished model."""
        return self._together(state) if self.decoder.apart else state

    def _saved(self, step: int) -> None:
        self.progress.say(f"step {step}: saved")

    def _leave(self, step: int, state: State) -> None:
        self.finish_saving(step, state)
        raise Preempted(f"saved at step {step}, asked to stop", hint="rerun the same command")


def _layout(recipe: Recipe, host: Host, progress: Progress) -> schema.Mesh:
    """The recipe's mesh; with `mesh: auto` what suits the devices of all processes, told."""
    if not recipe.mesh.auto:
        return recipe.mesh
    room = min(host.gather("device memory", automesh.device_bytes()))
    choice = automesh.choose(recipe, jax.device_count(), room)
    progress.say(str(choice))
    return choice.mesh


def _is_due(step: int, period: int | None) -> bool:
    return period is not None and step % period == 0
