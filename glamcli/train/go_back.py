"""A run that goes back by itself (`guard.on_spike: rewind`), as GLaM's and PaLM's were by hand.

When too many updates in a row were skipped, the attempt ends in every process alike, the newest
good step becomes the newest step of the run (`rewind.py`), and the next attempt goes on from there
with the data after the trouble: what was read on the way to it is left out, and some more. The
records of rewinds are the memory of this, so a run that is killed meanwhile does the same.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from glamcli.checkpoint import Checkpoints
from glamcli.config.schema import Recipe
from glamcli.errors import CheckpointError, Preempted, TrainError
from glamcli.hosts.join import Host
from glamcli.progress import Progress
from glamcli.step_folders import good_steps
from glamcli.stored_arrays import verify
from glamcli.train.rewind import rewind, rewinds


class GoBack(Preempted):
    """All processes leave this attempt at the same step, as when the run is asked to stop, to go
    back to an earlier one. It never leaves `train`."""

    def __init__(self, why: str, to: int, skip_batches: int):
        super().__init__(why)
        self.to, self.skip_batches = to, skip_batches
        self.at = time.monotonic()


def plan(recipe: Recipe, checkpoints: Checkpoints, good: int, step: int) -> int | str:
    """How many batches to skip after step `good` when `step` is in trouble, or why going back there
    does not help; of several processes all must call this alike."""
    guard, host = recipe.guard, checkpoints.host
    times = None
    if host.is_first:
        # One that led to a good step has a later one to go back to.
        records = rewinds(checkpoints.folder.parent)
        times = sum(record.automatic and record.to_step >= good for record in records)
    times = host.gather("rewinds", times)[0]
    if times >= guard.max_rewinds:
        return f"going back to step {good} did not help {times} times (`guard.max_rewinds`)"
    skip = step - good + guard.rewind_skip_batches
    if good + skip >= recipe.train.steps:
        return "going back would skip all that is left (`guard.rewind_skip_batches`)"
    return skip


@contextmanager
def going_back(run_dir: Path, host: Host, progress: Progress) -> Iterator[None]:
    """Rewinds the run when what is inside raises `GoBack`, and raises it again. Enter it when the
    folder is locked and before anything writes to it.

    Raises: TrainError when the arrays of that step, and of all good ones before it, are damaged.
    """
    try:
        yield
    except GoBack as back:
        end, why = back.to + back.skip_batches, back.what
        usable = _newest_usable(run_dir, back.to, progress) if host.is_first else None
        to = host.gather("usable", usable)[0]
        if to is None:
            raise TrainError(
                why,
                hint="there is no good checkpoint to go back to that is not damaged; start anew "
                "(`--fresh`) with a lower `optimizer.learning_rate`",
            ) from None
        if host.is_first:
            without = f"without batches {to + 1} to {end}"
            progress.warn(f"{why}; going back to step {to}, and on {without}")
            host.alike("rewound", lambda: rewind(run_dir, to, end - to, why, automatic=True))
        else:
            host.alike("rewound", lambda: None)
        raise


def _newest_usable(run_dir: Path, newest: int, progress: Progress) -> int | None:
    """The newest good step up to this one whose arrays are as they were saved. Later steps are set
    aside for it, so it had better be."""
    folder = run_dir / "checkpoints"
    for step in good_steps(folder):
        if step > newest:
            continue
        try:
            verify(folder / str(step))
            return step
        except CheckpointError as error:
            progress.warn(error.what)
        except (jax.errors.JaxRuntimeError, MemoryError):  # too large for one device: unknown
            return step
    return None
