"""A training run from recipe to last checkpoint, readable from top to bottom.

    data -> mesh -> checkpoint or new state -> compile once -> step, step, step ... -> saved

A step is dispatched before the numbers of the step before are read, and its batch was on the
devices by then, so the devices never wait for this program. Every mistake of the user's is refused
before anything is compiled. What is due between steps, and in which order, is in `events.py`.
"""

import gc
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import jax
from jax.sharding import Mesh

from glamcli import faults
from glamcli.checkpoint import Checkpoints
from glamcli.config.schema import Recipe
from glamcli.data.open import Dataset, open_data_together
from glamcli.errors import (
    DamagedCheckpoint,
    DamagedRecord,
    Preempted,
)
from glamcli.hosts.join import ALONE, Host
from glamcli.hosts.pace import Pace
from glamcli.hosts.signals import Stop, listening
from glamcli.hosts.watchdog import make_watchdog
from glamcli.parallel.mesh import global_batch, local_rows, make_mesh
from glamcli.progress import Progress, Silent
from glamcli.storage import Remote
from glamcli.train import automesh, identity, programs
from glamcli.train.beginning import Beginning
from glamcli.train.bucket import Bucket, owned
from glamcli.train.corruption import Checked
from glamcli.train.ending import ending
from glamcli.train.events import Evaluate, HeldoutLoss, Running, TaskScores
from glamcli.train.folder import after_rewinds, newest, refuse_other_recipe, take_folder
from glamcli.train.go_back import GoBack, going_back
from glamcli.train.loggers import check_loggers
from glamcli.train.meter import Meter
from glamcli.train.profile import Profiled
from glamcli.train.room import check_room
from glamcli.train.save import Save
from glamcli.train.state import State, abstract_state
from glamcli.train.step_programs import StepPrograms
from glamcli.train.times import Times
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


def train(
    recipe: Recipe,
    run_dir: Path,
    progress: Progress,
    host: Host = ALONE,
    evaluate: Evaluate | None = None,
    strict: bool = False,
    since: float | None = None,
    origins: Mapping[str, str] = MappingProxyType({}),
) -> Outcome:
    """Trains to the last step, from the newest checkpoint in `run_dir` if there is one.

    Every process calls this alike; the first writes and prints. `evaluate` runs as `every` says.
    A damaged checkpoint is left for an older one with a warning; with `strict` it ends the run.
    `since` is when the program was started, by `time.monotonic`; `origins`, where the recipe's
    values came from, are noted in `run.json`.

    Raises:
        CheckpointError: the folder is in use, belongs to another run, or cannot be written; its
            checkpoints are damaged.
        Preempted: SIGINT or SIGTERM came; everything up to that step is saved.
        TrainError: updates were skipped for too long, or devices compute wrongly (`recipe.guard`).
        PlanError: out of memory. CrashLoop: the last three starts from this step failed.
        DataError: a source cannot be read; the steps before are saved.
        RecipeError: a logger is missing, or the processes differ in recipe, code or libraries.
        KeyboardInterrupt: interrupted before training started; nothing was lost.
    """
    with listening(progress) as stop, ExitStack() as stack:
        bucket = None
        if isinstance(run_dir, Remote):
            bucket = stack.enter_context(owned(run_dir, progress, host))
            run_dir = bucket.folder
        while True:
            try:
                about = (evaluate, strict, origins, bucket, stop, Times(since))
                return _attempt(recipe, run_dir, progress, host, *about)
            except GoBack as back:
                since = back.at
                if bucket is not None:
                    bucket.uploaded(0.0)
            gc.collect()  # the next attempt needs the room of this one's state
            if host.any("stop", stop.requested):
                raise Preempted("went back, asked to stop", hint="rerun the same command")
            stop.at_once = True


def _attempt(
    recipe: Recipe,
    run_dir: Path,
    progress: Progress,
    host: Host,
    evaluate: Evaluate | None,
    strict: bool,
    origins: Mapping[str, str],
    bucket: Bucket | None,
    stop: Stop,
    times: Times,
) -> Outcome:
    """The same until it has to go back. Raises: `GoBack`, when the run folder is ready for it."""
    last = recipe.train.steps
    with ExitStack() as stack:
        identity.refuse_differences(host, identity.of_program(host, recipe))
        if bucket is None:
            take_folder(run_dir, host, stack)
        steps, keep = bucket.new_steps(host) if bucket else None, recipe.checkpoints.keep
        stack.enter_context(going_back(run_dir, host, progress))
        checkpoints = Checkpoints(run_dir / "checkpoints", keep, host, steps)
        saved_step, saved = newest(checkpoints, host)
        with suppress(DamagedCheckpoint):  # an older step is taken, or the run ended, below
            refuse_other_recipe(run_dir, saved_step, saved, recipe)
            if saved_step >= last:
                return Outcome(saved_step)
            after_rewinds(run_dir, saved_step, saved, last, host)
        check_loggers(recipe, host)
        dataset = times.of("data", open_data_together, recipe, progress, host)
        identity.refuse_differences(host, dataset.fingerprint)
        stop.at_once = False
        progress = progress if host.is_first else Silent()
        mesh = make_mesh(automesh.layout(recipe, host, progress))
        decoder = programs.make_decoder(recipe, mesh.shape)
        about = (recipe, run_dir, dataset, mesh, decoder, checkpoints, progress, host, origins)
        begin = Beginning(*about)
        start, saved_step, saved, run_identity, state = begin.first(not saved, strict)
        batches = stack.enter_context(_device_batches(recipe, dataset, mesh, start, times))
        stack.enter_context(checkpoints)
        folder, pace = run_dir if host.is_first else None, Pace(host.name)
        about = (recipe, dataset.source_names, folder, start, progress, pace)
        meter = stack.enter_context(Meter(*about, checkpoints, saved, times, [*mesh.devices.flat]))
        stack.enter_context(ending(run_dir, recipe, start, checkpoints, host))
        watchdog = stack.enter_context(make_watchdog(recipe.runtime, host))
        run = Running(
            recipe, run_dir, dataset, mesh, decoder, run_identity, meter, watchdog, progress, host
        )
        heldout, save = HeldoutLoss(run), Save(run, checkpoints)
        meter.health.unigram_nats = heldout.rows.unigram_nats
        tasks = TaskScores(run, stop, evaluate)
        step_programs, checked = times.of("compile", _compiled_step, run, checkpoints, start)
        place = bucket.url if bucket else run_dir
        traced = Profiled(checked, run, start, place)  # pyright: ignore[reportArgumentType]
        train_step = stack.enter_context(traced)
        _catch_up((heldout, tasks), run, stop, saved_step, state)
        events = (step_programs, train_step, heldout, tasks, save)
        with progress.phase("training", total=last, unit="steps") as bar, times.spent("step"):
            bar.advance(start)
            batch, damaged = next(batches), None
            meter.restart_clock()
            for step in range(start + 1, last + 1):
                watchdog.beat(f"in step {step}")
                faults.start_step(step)
                with pace.waiting(), jax.transfer_guard("disallow"):
                    state, sums = train_step(step, state, batch)  # dispatched, not awaited
                if step < last:
                    batch, damaged = _next(batches, host)
                meter.add(step, sums)  # reads the numbers of the step before
                save.poll()
                bar.advance()
                stopping = meter.exchange(stop.requested) and step < last
                stopping |= damaged is not None
                if _run_due(events, times, step, state, stopping):
                    break
        times.of("save", save.finish, step, state)
        if damaged is not None:
            raise damaged
        _leave_if_asked(run, stop, step)
        model = run.trained(step, state)
        return Outcome(step, model, heldout.nats, heldout.rows.unigram_nats, tasks.num_failed)


@contextmanager
def _device_batches(
    recipe: Recipe, dataset: Dataset, mesh: Mesh, start: int, times: Times
) -> Iterator[Iterator[dict[str, jax.Array]]]:
    """Training batches after step `start`: this process's rows of each, as part of one array over
    all devices. Reading ahead starts at once and overlaps with compilation."""
    layout = programs.training_batch(recipe, mesh)
    rows = local_rows(layout["source"].sharding, recipe.batch.rows)
    with dataset.batches(start, recipe.train.steps - start, rows) as stream:
        placed = (
            global_batch(batch | faults.loss_factors(step, len(batch["source"])), rows, layout)
            for step, batch in enumerate(times.batches(stream, dataset.read_seconds), start + 1)
        )
        yield placed


def _next(
    batches: Iterator[dict[str, jax.Array]], host: Host
) -> tuple[dict[str, jax.Array], DamagedRecord | None]:
    """The next batch, or why there is none, for a process that runs alone to save first."""
    try:
        return next(batches), None
    except DamagedRecord as error:
        if host.count > 1:
            raise
        return {}, error


def _compiled_step(
    run: Running, checkpoints: Checkpoints, start: int
) -> tuple[StepPrograms, Checked]:
    """The programs of the steps after `start`, the first one compiled, and what every step runs;
    compiles the program that prepares a checkpoint as well.

    Raises: CheckpointError when the disk has no room for a checkpoint.
    """
    if run.host.is_first:
        state = abstract_state(run.decoder, run.recipe.optimizer, run.mesh)
        if (warning := check_room(checkpoints, state)) is not None:
            run.progress.warn(warning)
    step_programs = StepPrograms(run, start)
    step_programs.compile_first()
    if run.recipe.guard.replica_steps is not None and run.mesh.size == 1:
        run.progress.warn("`guard.replica_steps` compares nothing: there is one device")
    return step_programs, Checked(step_programs, run.recipe.guard, run.mesh, run.host.name)


def _catch_up(
    events: tuple[HeldoutLoss, TaskScores], run: Running, stop: Stop, step: int, state: State
) -> None:
    """Computes what a run that was asked to stop at `step` left out.

    Raises: Preempted when this one is asked to stop as well; nothing is lost, nothing was new.
    """
    for event in (*events, None):
        if run.host.any("stop", stop.requested):
            raise Preempted(f"asked to stop before step {step + 1}", hint="rerun the same command")
        if event is None or step == 0 or not event.is_due(step):
            continue
        # The first process alone can see what is in the metrics.
        has = run.meter.has(step, event.prefix)
        if not run.host.gather(f"has {event.prefix}", has)[0]:
            run.meter.times.of(event.kind, event.run, step, state)


def _run_due(
    events: tuple[StepPrograms, Profiled, HeldoutLoss, TaskScores, Save],
    times: Times,
    step: int,
    state: State,
    stopping: bool,
) -> bool:
    """Runs what is due after a step; whether the run stops here."""
    for event in events:
        if event.is_due(step, stopping):
            stopping |= times.of(event.kind, event.run, step, state)
    return stopping


def _leave_if_asked(run: Running, stop: Stop, step: int) -> None:
    """Says where the time went.

    Raises: Preempted when the run, which is saved at `step`, was asked to stop.
    """
    run.progress.say(str(run.meter.times))
    is_complete = step == run.recipe.train.steps
    if not is_complete or run.host.any("stop", stop.requested):
        complete = f"the run is complete; `glam eval {run.run_dir}` scores it"
        hint = complete if is_complete else "rerun the same command"
        raise Preempted(f"saved at step {step}, asked to stop", hint=hint)
